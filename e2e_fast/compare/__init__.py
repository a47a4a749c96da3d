"""Comparing dictionaries: exact one-to-one matching and what surrounds it. Needs torch and numpy alone.

>>> import torch
>>> from e2e_fast.compare import match_dictionaries
>>> m = match_dictionaries(torch.eye(3), -torch.eye(3)[[1, 0, 2]], absolute=True)
>>> m.cols.tolist(), m.total, m.certified
([1, 0, 2], 3.0, True)
"""

from e2e_fast.compare.assignment import SparseAssignment, sparse_assignment
from e2e_fast.compare.dictionaries import read_dictionary
from e2e_fast.compare.matching import Matching, Progress, match_dictionaries
from e2e_fast.compare.statistics import greedy_matching, null_mean

__all__ = [
    "Matching",
    "Progress",
    "SparseAssignment",
    "greedy_matching",
    "match_dictionaries",
    "null_mean",
    "read_dictionary",
    "sparse_assignment",
]
