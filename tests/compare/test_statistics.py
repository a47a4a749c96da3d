"""The null is what random dictionaries give; greedy matching is exactly greedy."""

import sys
from pathlib import Path

import numpy as np
import pytest

from e2e_fast.compare import greedy_matching, match_dictionaries, nearest_others, null_mean

sys.path.insert(0, str(Path(__file__).parent))
import families


@pytest.mark.parametrize(
    ("n", "m", "d", "repeats"),
    [
        (3000, 3000, 64, 1),
        (1000, 1000, 768, 1),
        (500, 500, 4, 4),
        (800, 800, 16, 2),
        (700, 1400, 64, 2),
        (200, 2000, 32, 4),
    ],
)
def test_null_mean_is_within_one_percent_of_random_dictionaries(n: int, m: int, d: int, repeats: int):
    means = [match_dictionaries(*families.random(n, m, d, seed)).mean for seed in range(repeats)]
    assert null_mean(n, m, d) == pytest.approx(np.mean(means), rel=0.01)


def test_null_mean_grows_with_the_number_of_features_and_falls_with_the_dimension():
    assert null_mean(1000, 1000, 64) < null_mean(4000, 4000, 64) < null_mean(4000, 4000, 32)
    assert null_mean(50, 80, 16) == null_mean(80, 50, 16)
    assert np.isnan(null_mean(5, 5, 1))
    assert np.isnan(null_mean(0, 5, 8))


@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 16), (3, 3, 4), (12, 12, 3), (12, 12, 16), (5, 50, 3), (20, 20, 4)])
def test_null_mean_of_a_few_features_is_close_or_not_given(n: int, m: int, d: int):
    drawn = np.mean([match_dictionaries(*families.random(n, m, d, seed)).mean for seed in range(300)])
    null = null_mean(n, m, d)
    assert np.isnan(null) or null == pytest.approx(drawn, rel=0.1)
    assert np.isnan(null) == ((n, m, d) in [(1, 1, 16), (3, 3, 4), (12, 12, 3)])


def greedy_by_sorting(S: np.ndarray) -> list[tuple[int, int]]:
    free_row, free_col, pairs = np.ones(S.shape[0], bool), np.ones(S.shape[1], bool), []
    order = np.argsort(-S, axis=None, kind="stable")
    for i, j in zip(*(x.tolist() for x in np.divmod(order, S.shape[1])), strict=True):
        if len(pairs) == min(S.shape):
            break
        if free_row[i] and free_col[j]:
            free_row[i] = free_col[j] = False
            pairs.append((i, j))
    return sorted(pairs)


@pytest.mark.parametrize(("n", "m"), [(2060, 2050), (60, 90), (90, 60)])
@pytest.mark.parametrize("family", ["random", "planted", "clustered"])
def test_greedy_takes_pairs_by_falling_similarity(family: str, n: int, m: int):
    A, B = families.ALL[family](n, m, 40)
    greedy = greedy_matching(A, B, candidates=16)
    assert list(map(tuple, greedy)) == greedy_by_sorting(A @ B.T)
    similarity = (A @ B.T)[greedy[:, 0], greedy[:, 1]]
    assert similarity.sum() <= match_dictionaries(A, B).total + 1e-9


@pytest.mark.parametrize("function", [nearest_others, lambda A, **options: greedy_matching(A, A, **options)])
def test_no_thread_at_all_is_refused_before_the_compiled_core_divides_by_it(function):
    with pytest.raises(ValueError, match=r"threads must lie in \[1, 1024\], got 0"):
        function(np.eye(3), threads=0)


def test_greedy_matching_without_candidates_is_refused():
    with pytest.raises(ValueError, match="candidates must be at least 1, got 0"):
        greedy_matching(np.eye(3), np.eye(3), candidates=0)
