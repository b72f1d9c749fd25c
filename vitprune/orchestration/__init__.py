"""Run the pipeline under DVC and Prefect, record it in MLflow and audit it."""
