"""Pictures of runs; matplotlib is imported when one is drawn.

>>> from e2e_fast.report import pareto
>>> pareto({"local": [(40.0, 0.10)], "e2e": [(20.0, 0.09)]}, Path("pareto.png"))        # doctest: +SKIP
"""

from e2e_fast.report.plots import pareto

__all__ = ["pareto"]
