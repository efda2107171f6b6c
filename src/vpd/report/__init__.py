"""The report: one self-contained page that explains a run, made from the files of its folder."""

from vpd.report.page import write_report

__all__ = ["write_report"]
