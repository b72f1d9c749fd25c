"""Atomic files, Parquet tables, progress bars, process groups and evaluation mode."""
