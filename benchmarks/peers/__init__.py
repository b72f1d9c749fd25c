"""Other pruning libraries in environments of their own: requirements and runners."""
