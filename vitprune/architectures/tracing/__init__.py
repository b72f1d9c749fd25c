"""Channel dependency graph of a model: which channels of which parameters can only be pruned together."""
