"""What can be pruned in which model."""
