"""Pictures and tables of runs; matplotlib is imported when one is drawn."""

from e2e_fast.report.plots import pareto

__all__ = ["pareto"]
