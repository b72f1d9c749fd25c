"""HTML report of a run: one self-contained page from the artifacts of the stages."""

from vitprune.pipeline.report.page import write_report

__all__ = ["write_report"]
