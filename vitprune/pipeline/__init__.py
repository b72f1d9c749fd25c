"""The stages of the pipeline and what they read and write."""
