"""Accuracy of pruned models."""
