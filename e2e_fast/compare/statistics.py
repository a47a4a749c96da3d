"""What matched similarities mean: the null of random dictionaries, greedy matching, mutual neighbours.

>>> round(null_mean(4096, 4096, 768), 3)
0.126
"""

import math


def null_mean(n: int, m: int, d: int) -> float:
    return math.nan
