"""Channel dependency graph of a model, from one traced forward pass."""
