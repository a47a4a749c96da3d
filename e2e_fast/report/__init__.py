"""A page about runs, and pictures of them; matplotlib is imported when one is drawn.

>>> from e2e_fast.report import pareto, write_report
>>> pareto({"local": [(40.0, 0.10)], "e2e": [(20.0, 0.09)]}, Path("pareto.png"))        # doctest: +SKIP
>>> write_report(["out/demo/runs"], "report.html")                                       # doctest: +SKIP
"""

from e2e_fast.report.page import write_report
from e2e_fast.report.plots import pareto
from e2e_fast.report.runs import Evaluation

__all__ = ["Evaluation", "pareto", "write_report"]
