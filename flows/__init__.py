"""Prefect flows and MLflow tracking around the stages; nothing is computed here."""
