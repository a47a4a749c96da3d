"""Pairs of dictionaries to match, by name: each is easy to get wrong in its own way."""

import numpy as np


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def random(n: int, m: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Independent directions."""
    rng = np.random.default_rng(seed)
    return unit(rng.standard_normal((n, d))), unit(rng.standard_normal((m, d)))


def planted(n: int, m: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Half of the smaller side has a noisy twin (cosine .6 to .99), the rest is random."""
    rng = np.random.default_rng(seed)
    A, B = random(n, m, d, seed)
    return A, _plant(A, B, rng)


def clustered(n: int, m: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Clusters of unequal sizes that differ between the sides, so that surplus features must leave their cluster."""
    rng = np.random.default_rng(seed)
    k, spectrum = max(2, n // 40), 1 / np.sqrt(1 + 8 * np.arange(d) / d)
    centres = unit(rng.standard_normal((k, d)) * spectrum)
    weight = np.arange(1, k + 1) ** -0.8

    def side(size: int) -> np.ndarray:
        label = rng.choice(rng.permutation(k), size, p=weight / weight.sum())
        return unit(0.65 * centres[label] + 0.76 * unit(rng.standard_normal((size, d)) * spectrum))

    A, B = side(n), side(m)
    return A, _plant(A, B, rng)


def duplicated(n: int, m: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A tenth of the rows on either side are the same vector."""
    A, B = random(n, m, d, seed)
    A[: n // 10] = A[0]
    B[: m // 10] = A[0]
    return A, B


def negative(n: int, m: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Every similarity is negative."""
    A, B = random(n, m, d, seed)
    return np.abs(A), -np.abs(B)


def permuted(n: int, m: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """B holds A's rows in another order, and more rows where m > n."""
    rng = np.random.default_rng(seed)
    A = unit(rng.standard_normal((max(n, m), d)))
    return A[:n], A[rng.permutation(max(n, m))[:m]]


def with_zero_rows(n: int, m: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An eighth of A's rows and a fifth of B's are zero."""
    A, B = random(n, m, d, seed)
    A[::8], B[1::5] = 0.0, 0.0
    return A, B


def identical(n: int, m: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """All rows of both sides are one vector."""
    return np.ones((n, d)), np.ones((m, d))


ALL = {f.__name__: f for f in (random, planted, clustered, duplicated, negative, permuted, with_zero_rows, identical)}


def _plant(A: np.ndarray, B: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    half = min(len(A), len(B)) // 2
    cosine = rng.uniform(0.6, 0.99, (half, 1))
    twins = cosine * A[rng.permutation(len(A))[:half]]
    noise = unit(rng.standard_normal((half, A.shape[1])))
    B[rng.permutation(len(B))[:half]] = unit(twins + np.sqrt(1 - cosine**2) * noise)
    return B
