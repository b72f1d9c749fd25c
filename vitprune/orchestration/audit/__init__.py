"""Verify a finished run against its artifacts and its MLflow records."""
