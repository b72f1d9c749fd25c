"""Template of a user project: a git and DVC repository with the pipeline, created by `vitprune init`."""

from vitprune.pipeline.project_template.create import Choice, create_project, shipped_pipeline

__all__ = ["Choice", "create_project", "shipped_pipeline"]
