"""The matching is SciPy's float64 optimum, its certificate holds over all pairs, and nothing but speed changes it."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from e2e_fast.compare import Matching, match_dictionaries
from e2e_fast.kernels.neighbours import PRECISIONS

sys.path.insert(0, str(Path(__file__).parent))
import families

SIZES = [(400, 400, 24), (300, 500, 48), (500, 300, 96), (1, 1, 5), (1, 40, 3), (60, 60, 1), (50, 70, 1), (90, 90, 2)]


def cosines(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """The full matrix in float64; zero rows give 0."""
    norms = [np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (A, B)]
    a, b = (np.divide(x, norm, out=np.zeros(x.shape), where=norm > 0) for x, norm in zip((A, B), norms, strict=True))
    return a @ b.T


def audit(m: Matching, S: np.ndarray) -> None:
    """One-to-one, optimal, certified; prices prove it over the whole matrix; bests are the matrix's."""
    n, k = S.shape
    rows = np.setdiff1d(np.arange(n), m.left_out_rows)
    cols = np.setdiff1d(np.arange(k), m.left_out_cols)
    kept = S[np.ix_(rows, cols)]
    assert len(m.rows) == min(len(rows), len(cols))
    if kept.size == 0:
        assert (m.total, m.upper_bound, m.certified) == (0.0, 0.0, True)
        assert np.isnan(m.row_best_similarity).all()
        assert np.isnan(m.col_best_similarity).all()
        return
    assert len(np.unique(m.rows)) == len(m.rows)
    assert len(np.unique(m.cols)) == len(m.cols)
    assert np.abs(m.similarity - S[m.rows, m.cols]).max(initial=0) <= 1e-12
    i, j = linear_sum_assignment(kept, maximize=True)
    assert abs(m.total - kept[i, j].sum()) <= 1e-9
    assert m.certified
    assert m.gap <= 1e-9
    # The audit of the certificate uses nothing of the search: prices cover every pair, and add up to the bound.
    assert (kept - m.row_price[rows, None] - m.col_price[cols]).max(initial=-np.inf) <= 1e-9
    prices = m.row_price[rows].sum() + m.col_price[cols].sum()
    assert abs(prices - m.upper_bound) <= 1e-9
    larger_side = m.col_price[cols] if len(rows) < len(cols) else m.row_price[rows]
    if len(rows) != len(cols):
        assert larger_side.min(initial=0) >= -1e-12
    assert np.abs(m.row_best_similarity[rows] - kept.max(1, initial=-1)).max(initial=0) <= 1e-12
    assert np.abs(m.col_best_similarity[cols] - kept.max(0, initial=-1)).max(initial=0) <= 1e-12
    assert np.abs(S[rows, m.row_best[rows]] - m.row_best_similarity[rows]).max(initial=0) <= 1e-12
    assert np.abs(S[m.col_best[cols], cols] - m.col_best_similarity[cols]).max(initial=0) <= 1e-12
    assert (m.row_best[m.left_out_rows] == -1).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("n", "m", "d"), SIZES, ids=lambda v: str(v))
@pytest.mark.parametrize("family", families.ALL)
def test_total_equals_scipys_optimum_and_certificate_holds(family: str, n: int, m: int, d: int, precision: str):
    A, B = families.ALL[family](n, m, d)
    audit(match_dictionaries(A, B, precision=precision), cosines(A, B))


@pytest.mark.parametrize("family", ["random", "planted", "clustered"])
@pytest.mark.parametrize(("n", "m"), [(3000, 3000), (1500, 2500)])
def test_large_problems_equal_scipys_optimum(family: str, n: int, m: int):
    A, B = (x.astype(np.float32) for x in families.ALL[family](n, m, 64))
    audit(match_dictionaries(A, B), cosines(A, B))


@pytest.mark.parametrize("family", ["random", "planted", "clustered"])
@pytest.mark.parametrize(("n", "m"), [(900, 900), (700, 1000)])
def test_matching_is_the_same_for_any_blocks_threads_precision_and_seed(family: str, n: int, m: int):
    A, B = families.ALL[family](n, m, 80)
    first = match_dictionaries(A, B, precision="float32", threads=1)
    assert (first.tie_group == -1).all()
    variants: list[dict[str, Any]] = [
        {"precision": "int8"}, {"precision": "bfloat16"}, {"block_rows": 8}, {"block_rows": 100_000}, {"threads": 3},
        {"candidates": 4}, {"candidates": 300}, {"seed": 7}, {"precision": "int8", "threads": 2, "block_rows": 24},
    ]  # fmt: skip
    for options in variants:
        other = match_dictionaries(A, B, **options)
        assert np.array_equal(first.cols, other.cols), options
        assert np.array_equal(first.similarity, other.similarity), options
        assert np.array_equal(first.row_best, other.row_best), options
        assert np.array_equal(first.col_best, other.col_best), options


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_inputs_of_every_dtype_are_matched_as_they_are(dtype: torch.dtype):
    A, B = (torch.from_numpy(x).to(dtype) for x in families.planted(200, 230, 32))
    audit(match_dictionaries(A * 3, B * 0.1), cosines((A * 3).double().numpy(), (B * 0.1).double().numpy()))


def test_rows_of_very_different_norms_and_a_heavy_dimension():
    A, B = families.clustered(300, 300, 40)
    A[:, 3] *= 50
    A *= np.logspace(-12, 12, 300)[:, None]
    audit(match_dictionaries(A, B, precision="int8"), cosines(A, B))


def test_transposing_the_problem_transposes_the_answer():
    A, B = families.planted(300, 420, 32)
    m, t = match_dictionaries(A, B), match_dictionaries(B, A)
    assert sorted(zip(m.rows, m.cols, strict=True)) == sorted(zip(t.cols, t.rows, strict=True))
    assert np.array_equal(m.row_best, t.col_best)
    assert np.array_equal(m.mutual[np.argsort(m.mutual[:, 1])], t.mutual[:, ::-1])


def test_mutual_neighbours_are_each_others_best():
    A, B = families.planted(200, 220, 16)
    S, mutual = cosines(A, B), match_dictionaries(A, B).mutual
    expected = [(i, S[i].argmax()) for i in range(200) if S[:, S[i].argmax()].argmax() == i]
    assert list(map(tuple, mutual)) == expected


@pytest.mark.parametrize(("n", "m"), [(40, 40), (30, 45), (45, 30)])
@pytest.mark.parametrize("family", ["random", "clustered", "duplicated"])
def test_margin_never_exceeds_the_true_loss_of_forbidding_the_pair(family: str, n: int, m: int):
    A, B = families.ALL[family](n, m, 6)
    S, found = cosines(A, B), match_dictionaries(A, B)
    losses = []
    for i, j in zip(found.rows, found.cols, strict=True):
        forbidden = S.copy()
        forbidden[i, j] = -100
        r, c = linear_sum_assignment(forbidden, maximize=True)
        losses.append(found.total - forbidden[r, c].sum())
    assert (found.margin <= np.array(losses) + 1e-12).all()
    assert (found.margin[found.tie_group == -1] > 0).mean() > 0.5
    # A pair is exchangeable exactly when forbidding it costs nothing.
    assert np.array_equal(found.tie_group >= 0, np.array(losses) < 1e-10)


def test_time_limit_returns_a_matching_with_a_valid_bound():
    A, B = families.clustered(1200, 1200, 64)
    m = match_dictionaries(A, B, candidates=4, time_limit=0.0)
    r, c = linear_sum_assignment(S := cosines(A, B), maximize=True)
    assert not m.certified
    assert m.stats["rounds"] == 0
    assert m.total <= S[r, c].sum() + 1e-9 <= m.upper_bound + 2e-9
    assert m.gap > 1e-6
    assert len(np.unique(m.cols)) == 1200


def test_zero_rows_are_left_out_or_kept_on_request():
    A, B = families.with_zero_rows(80, 100, 12)
    dropped, kept = match_dictionaries(A, B), match_dictionaries(A, B, zero_rows="keep")
    assert dropped.left_out_rows.tolist() == list(range(0, 80, 8))
    assert dropped.left_out_cols.tolist() == list(range(1, 100, 5))
    assert not set(dropped.rows) & set(dropped.left_out_rows)
    assert np.isnan(dropped.row_best_similarity[0])
    assert len(kept.rows) == 80
    audit(kept, cosines(A, B))


def test_alive_masks_leave_features_out_and_keep_their_numbers():
    A, B = families.planted(120, 120, 16)
    alive_a, alive_b = np.arange(120) % 3 > 0, np.arange(120) > 25
    m = match_dictionaries(A, B, alive=(alive_a, torch.from_numpy(alive_b)))
    assert alive_a[m.rows].all()
    assert alive_b[m.cols].all()
    audit(m, cosines(A, B))


def test_nothing_alive_gives_an_empty_certified_matching():
    m = match_dictionaries(np.zeros((3, 4)), np.ones((5, 4)))
    assert (len(m.rows), m.total, m.certified, m.gap) == (0, 0.0, True, 0.0)
    assert m.left_out_rows.tolist() == [0, 1, 2]
    assert np.isnan(m.mean)
    assert m.mutual.shape == (0, 2)


def test_absolute_ignores_signs():
    A, B = families.planted(300, 350, 24)
    B *= np.where(np.arange(350) % 2, 1, -1)[:, None]
    m = match_dictionaries(A, B, absolute=True)
    S = np.abs(cosines(A, B))
    r, c = linear_sum_assignment(S, maximize=True)
    assert abs(m.total - S[r, c].sum()) <= 1e-9
    assert np.abs(m.row_best_similarity - S.max(1)).max() <= 1e-12


def test_center_subtracts_each_sides_mean():
    A, B = families.planted(100, 100, 16)
    A, B = A + 3.0, B - 2.0
    m = match_dictionaries(A, B, center=True)
    audit(m, cosines(A - A.mean(0), B - B.mean(0)))


def test_joint_matching_weighs_encoder_and_decoder():
    (dec_a, dec_b), (enc_a, enc_b) = families.planted(90, 110, 16), families.random(90, 110, 16, seed=5)

    class SAE:
        def __init__(self, decoder, encoder):
            self.W_dec, self.W_enc = torch.from_numpy(decoder), torch.from_numpy(encoder)

    a, b = SAE(dec_a, enc_a), SAE(dec_b, enc_b)
    m = match_dictionaries(a, b, which="both", encoder_share=0.25)
    S = 0.75 * cosines(dec_a, dec_b) + 0.25 * cosines(enc_a, enc_b)
    r, c = linear_sum_assignment(S, maximize=True)
    assert abs(m.total - S[r, c].sum()) <= 1e-9
    encoder = match_dictionaries(a, b, which="encoder")
    audit(encoder, cosines(enc_a, enc_b))


def test_progress_names_stages_and_ends_proven():
    seen = []
    A, B = families.clustered(400, 400, 32)
    match_dictionaries(A, B, candidates=8, on_progress=seen.append)
    stages = [p.stage for p in seen]
    assert stages[:4] == ["quantize", "sweep", "candidates", "solve"]
    assert "price" in stages
    assert stages[-1] == "done"
    assert seen[-1].unproven == 0
    assert [p.seconds for p in seen] == sorted(p.seconds for p in seen)


def bad(x: np.ndarray, value: float, row: int) -> np.ndarray:
    x = x.copy()
    x[row, 2] = value
    return x


GOOD = families.random(6, 6, 4)[0]


@pytest.mark.parametrize(
    ("A", "B", "options", "message"),
    [
        (bad(GOOD, np.nan, 4), GOOD, {}, "A must be finite, but has NaN or infinite entries in 1 rows: 4"),
        (GOOD, bad(GOOD, np.inf, 2), {}, "B must be finite.* rows: 2"),
        (GOOD, GOOD[:, :3], {}, "d = 4 and 3"),
        (GOOD[:0], GOOD, {}, r"A must not be empty, got shape \(0, 4\)"),
        (GOOD, GOOD[0], {}, r"B must be a matrix .* got shape \(4,\)"),
        (GOOD.astype(int), GOOD, {}, "floating-point"),
        (GOOD, GOOD, {"precision": "float8"}, "precision must be"),
        (GOOD, GOOD, {"zero_rows": "no"}, "zero_rows must be"),
        (GOOD, GOOD, {"candidates": 0}, "candidates must be at least 1"),
        (GOOD, GOOD, {"threads": 0}, r"threads must lie in \[1, 1024\]"),
        (GOOD, GOOD, {"which": "encoder"}, "needs encoder weights"),
        (GOOD, GOOD, {"alive": (np.ones(5, bool), None)}, r"alive for A must be a boolean mask of shape \(6,\)"),
    ],
)
def test_bad_input_is_refused_with_what_was_wrong(A, B, options, message: str):
    with pytest.raises(ValueError, match=message):
        match_dictionaries(A, B, **options)


@pytest.mark.shared
def test_clip_class_names_are_recovered(shared: Path):
    folder = shared / "dictionaries" / "clip-classes"
    names = [json.loads((folder / f"{key}_names.json").read_text()) for key in ("lvis", "o365")]
    # "arctic_(type_of_shoe)" and "Potted Plant": letters alone, without what stands in brackets.
    names = [[re.sub("[^a-z]", "", name.lower().split("(")[0]) for name in side] for side in names]
    A, B = np.load(folder / "lvis_v1_clip_a+cname.npy"), np.load(folder / "o365_clip_a+cnamefix.npy")
    row_of, col_of = ({name: i for i, name in enumerate(side)} for side in names)
    common = sorted(row_of.keys() & col_of.keys())
    m = match_dictionaries(A, B)
    audit(m, cosines(A.astype(np.float64), B.astype(np.float64)))
    partner = dict(zip(m.rows, m.cols, strict=True))
    assert len(common) == 196
    assert sum(partner.get(row_of[name]) == col_of[name] for name in common) == 194
    assert m.mean == pytest.approx(0.946, abs=5e-4)


@pytest.mark.shared
def test_unrelated_saes_match_at_the_null(shared: Path):
    folder = shared / "dictionaries" / "sae-cnn-seeds"
    m = match_dictionaries(folder / "sae_0.pt", folder / "sae_1.pt")
    assert m.certified
    assert m.shape == (128, 128, 256)
    assert m.mean == pytest.approx(0.153, abs=5e-4)
    assert m.mean == pytest.approx(m.null_mean, rel=0.02)


@pytest.mark.shared
def test_word_vectors_match_themselves_in_another_order(shared: Path):
    vectors = json.loads((shared / "dictionaries" / "word2vec-1000" / "wordvecs1000.json").read_text())["vectors"]
    A = np.array(list(vectors.values()), dtype=np.float32)
    order = np.random.default_rng(0).permutation(len(A))
    m = match_dictionaries(A, A[order])
    audit(m, cosines(A, A[order]))
    assert np.array_equal(order[m.cols], m.rows)
