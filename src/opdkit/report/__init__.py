"""The report of a run: one self-contained HTML file with results, curves and a token viewer."""

from opdkit.report.write import write_report

__all__ = ["write_report"]
