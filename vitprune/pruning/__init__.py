"""From importance scores to masks and pruned models."""
