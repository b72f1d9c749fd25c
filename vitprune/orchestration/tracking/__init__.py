"""Log runs to MLflow; registry of models."""
