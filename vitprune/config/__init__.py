"""Settings of the pipeline and of the Python API as pydantic models."""
