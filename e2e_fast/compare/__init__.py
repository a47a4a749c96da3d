"""Comparing dictionaries: exact one-to-one matching and what surrounds it. Needs torch and numpy alone.

Two of them with `match_dictionaries`, several with `compare_dictionaries`.

>>> import torch
>>> from e2e_fast.compare import match_dictionaries
>>> m = match_dictionaries(torch.eye(3), -torch.eye(3)[[1, 0, 2]], absolute=True)
>>> m.cols.tolist(), m.total, m.certified
([1, 0, 2], 3.0, True)
"""

from e2e_fast.compare.assignment import SparseAssignment, sparse_assignment
from e2e_fast.compare.comparison import Comparison, compare_dictionaries
from e2e_fast.compare.dictionaries import read_dictionary
from e2e_fast.compare.matching import Matching, Progress, match_dictionaries
from e2e_fast.compare.nearest import Nearest, nearest_others
from e2e_fast.compare.statistics import greedy_matching, mean_differences, null_best_mean, null_mean

__all__ = [
    "Comparison",
    "Matching",
    "Nearest",
    "Progress",
    "SparseAssignment",
    "compare_dictionaries",
    "greedy_matching",
    "match_dictionaries",
    "mean_differences",
    "nearest_others",
    "null_best_mean",
    "null_mean",
    "read_dictionary",
    "sparse_assignment",
]
