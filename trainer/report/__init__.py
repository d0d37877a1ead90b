"""Turns the files of a finished (or broken off) run into plots, ``report.html`` and a summary."""

from trainer.report.build import build_report

__all__ = ["build_report"]
