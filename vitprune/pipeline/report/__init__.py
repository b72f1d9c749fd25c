"""The report: one self-contained page made of what the stages left behind."""

from vitprune.pipeline.report.page import write_report

__all__ = ["write_report"]
