"""A project of the user's own: a git and DVC repository with the pipeline, made by `vitprune init`."""

from vitprune.pipeline.project_template.create import Choice, create_project

__all__ = ["Choice", "create_project"]
