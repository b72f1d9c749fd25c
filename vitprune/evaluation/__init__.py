"""Accuracy, cost, latency and checks of a model."""
