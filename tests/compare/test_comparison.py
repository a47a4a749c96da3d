"""Comparing several dictionaries gives the numbers of full float64 matrices, and says what it left out."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from safetensors.torch import save_file

from e2e_fast.compare import compare_dictionaries, mean_differences, nearest_others, null_best_mean
from e2e_fast.compare.comparison import default_names
from e2e_fast.compare.dictionaries import recorded_alive

sys.path.insert(0, str(Path(__file__).parent))
import families


def cosines(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.nan_to_num((A @ B.T) / np.outer(np.linalg.norm(A, axis=1), np.linalg.norm(B, axis=1)))


# ------------------------------------------------------------------ within


@pytest.mark.parametrize("name", families.ALL)
@pytest.mark.parametrize(("n", "d"), [(2, 3), (90, 5), (1500, 24)])
def test_nearest_others_are_those_of_the_whole_matrix(name: str, n: int, d: int):
    A = families.ALL[name](n, n, d, seed=n)[0]
    used = np.flatnonzero(np.linalg.norm(A, axis=1) > 0)
    S = cosines(A[used], A[used])
    np.fill_diagonal(S, -np.inf)
    found = nearest_others(A, threads=1)
    if len(used) < 2:
        assert (found.index == -1).all()
        return
    np.testing.assert_allclose(found.similarity[used], S.max(axis=1), atol=1e-12)
    at = np.searchsorted(used, found.index[used])
    np.testing.assert_allclose(S[np.arange(len(used)), at], S.max(axis=1), atol=1e-12)
    left_out = np.setdiff1d(np.arange(n), used)
    assert (found.index[left_out] == -1).all()
    assert np.isnan(found.similarity[left_out]).all()


def test_a_feature_alone_has_no_nearest_other_and_the_dead_do_not_count():
    assert np.isnan(nearest_others(np.ones((1, 4))).similarity).all()
    A = families.random(40, 40, 6)[0]
    A[1] = A[0]
    alive = np.ones(40, dtype=bool)
    assert nearest_others(A).index[0] == 1
    alive[1] = False
    found = nearest_others(A, alive=alive)
    assert found.index[0] not in (0, 1)
    assert found.index[1] == -1


def test_the_null_of_best_matches_is_what_random_directions_give():
    for n, m, d in ((1, 1, 8), (60, 500, 4), (300, 2000, 48), (40, 4000, 512)):
        means = [cosines(*families.random(n, m, d, seed)).max(axis=1).mean() for seed in range(200 if n == 1 else 3)]
        assert null_best_mean(m, d) == pytest.approx(np.mean(means), abs=0.08 if n == 1 else 0.004)
    assert np.isnan(null_best_mean(0, 8))


def test_differences_of_means_have_the_interval_of_scipys_bootstrap():
    rng = np.random.default_rng(0)
    a, b = rng.beta(2, 5, 700), rng.beta(3, 5, 500)
    (difference, low, high) = mean_differences({"a": a, "b": b})["a", "b"]
    assert difference == pytest.approx(a.mean() - b.mean(), abs=1e-15)
    theirs = scipy.stats.bootstrap(
        (a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), n_resamples=2000, rng=1, vectorized=True
    ).confidence_interval  # BCa, as the paper's scripts use it
    width = theirs.high - theirs.low
    assert low == pytest.approx(theirs.low, abs=0.08 * width)
    assert high == pytest.approx(theirs.high, abs=0.08 * width)
    assert mean_differences({"a": a, "b": a[:0]}) == {}


# ------------------------------------------------------------------ several


def test_every_pair_has_the_numbers_of_the_whole_matrix():
    A, B = families.planted(120, 150, 16)
    C = families.duplicated(90, 90, 16)[0]
    rows = {"a": A, "b": B, "c": C}
    found = compare_dictionaries(rows, threads=1)
    assert [(pair.a, pair.b) for pair in found.pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    for pair in found.pairs:
        S = cosines(rows[pair.a], rows[pair.b])
        best = S[scipy.optimize.linear_sum_assignment(S, maximize=True)]
        numbers = pair.summary()
        assert numbers["certified"] is True
        assert numbers["mean"] == pytest.approx(best.mean(), abs=1e-12)
        assert numbers["row_best_mean"] == pytest.approx(S.max(axis=1).mean(), abs=1e-12)
        assert numbers["col_best_mean"] == pytest.approx(S.max(axis=0).mean(), abs=1e-12)
        assert numbers["unmatched"] == [len(S) - len(best), S.shape[1] - len(best)]
        mutual = (S.max(axis=1, keepdims=True) == S) & (S.max(axis=0, keepdims=True) == S)
        if "c" not in (pair.a, pair.b):  # no ties
            assert numbers["mutual"] == mutual.sum()
            assert numbers["fraction_above"]["0.7"] == (best > 0.7).mean()
        assert numbers["agree"] is None
    for one in found.dictionaries:
        S = cosines(rows[one.name], rows[one.name])
        np.fill_diagonal(S, -np.inf)
        numbers = one.summary()
        assert numbers["within_mean"] == pytest.approx(S.max(axis=1).mean(), abs=1e-12)
        assert numbers["within_quantiles"]["0.25"] == pytest.approx(np.quantile(S.max(axis=1), 0.25), abs=1e-12)
        assert numbers["dead"] is None
    assert set(found.differences) == set(itertools.combinations("abc", 2))
    assert json.loads(json.dumps(found.summary()))["pairs"][2]["b"] == "c"


def test_dictionaries_of_other_widths_are_left_out_and_named():
    found = compare_dictionaries({"a": np.eye(4), "b": np.eye(3), "c": -np.eye(4)})
    assert [(pair.a, pair.b) for pair in found.pairs] == [("a", "c")]
    assert [tuple(pair) for pair in found.left_out] == [("a", "b", "d = 4 and 3"), ("b", "c", "d = 3 and 4")]
    assert set(found.differences) == {("a", "c")}


def test_encoders_agree_on_the_share_of_the_decoders_pairs_that_they_make_too():
    rng = np.random.default_rng(0)
    dec, enc, order = rng.standard_normal((50, 12)), rng.standard_normal((50, 12)), rng.permutation(50)
    swapped = order.copy()
    swapped[:10] = np.roll(order[:10], 1)  # ten features have the encoder of another
    saes = {
        "a": SimpleNamespace(W_dec=torch.tensor(dec), W_enc=torch.tensor(enc)),
        "b": SimpleNamespace(W_dec=torch.tensor(dec[order]), W_enc=torch.tensor(enc[swapped])),
        "bare": dec,
    }
    first, *others = compare_dictionaries(saes, encoders=True).pairs
    assert first.agree == 40 / 50
    assert first.summary()["encoder"]["mean"] == pytest.approx(1.0)
    assert [pair.agree for pair in others] == [None, None]


def run_folder(folder: Path, rows: np.ndarray, alive: list[int], samples: int = 48) -> Path:
    folder.mkdir()
    key = "blocks-1-hook_resid_pre.decoder.weight"
    for n in (24, 48):
        save_file({key: torch.tensor(rows.T.copy())}, folder / f"samples_{n}.safetensors")
    record = {"samples": samples, "sparsity/alive_dict_elements_indices_final/blocks.1.hook_resid_pre": alive}
    (folder / "summary.json").write_text(json.dumps(record))
    return folder


def test_features_that_a_run_recorded_as_dead_are_left_out(tmp_path: Path):
    A, B = families.planted(40, 60, 8)
    alive = sorted(np.random.default_rng(0).permutation(40)[:25].tolist())
    A[alive[0]] = 0.0
    folder = run_folder(tmp_path / "run", A, alive)
    used = alive[1:]
    found = compare_dictionaries({"run": folder, "b": B})
    S = cosines(A[used], B)
    expected = S[scipy.optimize.linear_sum_assignment(S, maximize=True)].mean()
    assert found.pairs[0].matching.mean == pytest.approx(expected, abs=1e-12)
    assert found.pairs[0].matching.rows.tolist() == used
    run = found.dictionaries[0]
    assert (run.n, run.used, run.dead, run.zero) == (40, 24, 15, 1)
    assert len(run.similarity) == 24
    everything = compare_dictionaries({"run": folder, "b": B}, keep_dead=True).dictionaries[0]
    assert (everything.used, everything.dead, everything.zero) == (39, None, 1)
    mask = np.arange(40) < 10
    assert compare_dictionaries({"run": folder, "b": B}, alive={"run": mask}).dictionaries[0].dead == 30


def test_the_record_of_a_run_speaks_of_its_last_weights_alone(tmp_path: Path):
    folder = run_folder(tmp_path / "run", np.eye(4), [0, 2])
    assert recorded_alive(folder).tolist() == [0, 2]
    assert recorded_alive(f"{folder}::blocks.1.hook_resid_pre").tolist() == [0, 2]
    assert recorded_alive(f"{folder}::blocks.2.hook_resid_pre") is None
    assert recorded_alive(folder / "samples_24.safetensors") is None
    assert recorded_alive(run_folder(tmp_path / "older", np.eye(4), [0, 2], samples=24)) is None
    assert recorded_alive(np.eye(4)) is None
    with pytest.raises(ValueError, match=r"wrong: the run's record lists alive features up to 9, the dictionary has 4"):
        compare_dictionaries({"wrong": run_folder(tmp_path / "wrong", np.eye(4), [0, 9]), "b": np.eye(4)})


@pytest.mark.parametrize(
    ("dictionaries", "options", "message"),
    [
        ({"a": np.eye(2)}, {}, "at least two dictionaries, got 1"),
        ({"a": np.eye(2), "b": np.full((2, 2), np.nan)}, {}, "b: the dictionary must be finite"),
        ({"a": np.eye(2), "b": np.eye(2)}, {"which": "bias"}, "a: which must be"),
        ({"a": np.eye(2), "b": np.eye(2)}, {"which": "both", "encoders": True}, "which is 'both'"),
        ({"a": np.eye(2), "b": np.eye(2)}, {"alive": {"c": [True, True]}}, r"alive names \['c'\]"),
        ({"a": np.eye(2), "b": np.eye(2)}, {"alive": {"b": [True]}}, r"alive for b must be a boolean mask"),
        ({"a": np.eye(2), "b": np.eye(2)}, {"threads": 0}, r"^threads must lie in \[1, 1024\], got 0"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(dictionaries, options, message: str):
    with pytest.raises(ValueError, match=message):
        compare_dictionaries(dictionaries, **options)


def test_names_are_short_and_no_two_alike(tmp_path: Path):
    a, b = tmp_path / "x" / "run_1", tmp_path / "y" / "run_1"
    assert default_names([a, b, tmp_path / "sae_0.pt"]) == ["x/run_1", "y/run_1", "sae_0"]
    assert default_names([a / "samples_400.safetensors", b / "sae_weights.safetensors"]) == ["x/run_1", "y/run_1"]
    assert default_names([a, a, a]) == ["run_1", "run_1 (2)", "run_1 (3)"]
    assert default_names([f"{a}::blocks.1.hook_resid_pre", f"{a}::blocks.2.hook_resid_pre"]) == [
        "run_1::blocks.1.hook_resid_pre",
        "run_1::blocks.2.hook_resid_pre",
    ]
    assert default_names(["model.v2_2026"]) == ["model.v2_2026"]


def test_comparing_needs_torch_and_numpy_alone():
    code = "import sys, e2e_fast.compare; print([m for m in ('yaml', 'safetensors', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
