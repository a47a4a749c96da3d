"""encode_topk and encode_relu: what they select, in which order, and what reaches the parameters."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from tolerance import assert_as_accurate

from e2e_fast import kernels
from e2e_fast.kernels import _native, reference

encode = importlib.import_module("e2e_fast.kernels.encode")

SHAPES = [(1, 1, 1, 1), (5, 3, 7, 1), (5, 3, 7, 7), (33, 31, 1025, 8), (64, 192, 4099, 32), (3, 130, 9000, 140)]


def inputs(N: int, D: int, F: int, dtype=torch.float32):
    return torch.randn(N, D).to(dtype), (torch.randn(F, D) / D**0.5).to(dtype), (0.3 * torch.randn(F)).to(dtype)


def assert_valid(code: kernels.SparseCode, d_sae: int) -> None:
    used = ~(code.values <= 0)
    assert not code.values[~used].any()
    assert not code.indices[~used].any()
    assert torch.equal(code.count.long(), used.sum(-1))
    for values, indices in zip(used, code.indices, strict=True):
        picked = indices[values].tolist()
        assert len(set(picked)) == len(picked)
        assert all(0 <= j < d_sae for j in picked)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_topk_selects_the_true_winners_in_order(route, shape):
    N, D, F, k = shape
    x, W, b = inputs(N, D, F)
    code, exact = kernels.encode_topk(x, W, b, k), reference.encode_topk(x.double(), W.double(), b.double(), k)
    assert_valid(code, F)
    assert code.values.shape == (N, k)
    assert torch.equal(code.indices.long(), exact.indices)
    assert torch.equal(code.count.long(), exact.count)
    assert_as_accurate("values", code.values, reference.encode_topk(x, W, b, k).values, exact.values)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_relu_keeps_every_positive_score_ascending(route, shape):
    N, D, F, _ = shape
    x, W, b = inputs(N, D, F)
    code, exact = kernels.encode_relu(x, W, b), reference.encode_relu(x.double(), W.double(), b.double())
    assert_valid(code, F)
    assert torch.equal(code.indices.long(), exact.indices)
    assert torch.equal(code.count.long(), exact.count)
    assert_as_accurate("values", code.values, reference.encode_relu(x, W, b).values, exact.values)


@pytest.mark.parametrize("capacity", [0, 1, 5, 2000])
def test_relu_with_a_capacity_keeps_the_first_and_reports_the_true_count(route, capacity):
    x, W, b = inputs(9, 17, 900)
    code, expected = kernels.encode_relu(x, W, b, capacity), reference.encode_relu(x, W, b, capacity)
    assert torch.equal(code.indices.long(), expected.indices)
    assert torch.equal(code.count.long(), expected.count)
    torch.testing.assert_close(code.values, expected.values)


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_screened_scores_select_exactly_what_float32_scores_select(monkeypatch, precision, threads):
    core = _native.native()
    if core is None or not core.native_precision(precision):
        pytest.skip(f"this processor has no {precision} products: nothing is screened")
    N, D, F, k = 96, 256, 12000, 24
    x, W, b = inputs(N, D, F)
    x *= torch.logspace(-3, 3, N)[:, None]
    W[::7] *= 20  # rows of very different norms
    W[5:3000] = W[5] + 1e-4 * torch.randn(2995, D)  # thousands of near ties
    W[4000:4100] = 0
    threshold = torch.linspace(-1, 60, F)[torch.randperm(F)]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    # Never give up: the selection must be right all the same.
    monkeypatch.setattr(encode, "SCREENED_SHARE", {"topk": 2, "relu": 2})
    for bias in (None, b, 100 * b, b - 3):
        codes = []
        for screening in ((precision,), ()):
            monkeypatch.setattr(encode, "SCREENING", screening)
            jump = kernels.encode_jump_relu(x, W, bias, threshold, 0.0)
            codes.append((kernels.encode_topk(x, W, bias, k), kernels.encode_relu(x, W, bias), jump))
        exact = torch.relu(nnf.linear(x.double(), W.double(), None if bias is None else bias.double()))
        rounding = 1e-5 * exact.amax(1, keepdim=True).clamp_min(1e-30)
        for screened, plain in zip(*codes, strict=True):
            dense, other = screened.to_dense(F).double(), plain.to_dense(F).double()
            if isinstance(screened, kernels.JumpCode):
                floor = threshold.clamp_min(0).double()
                assert bool((((exact - floor).abs() <= rounding) | ((dense > 0) == (exact > floor))).all())
                assert bool(((dense == 0) | ((dense > floor) & ((dense - exact).abs() <= rounding))).all())
                continue
            both, either = (dense > 0) & (other > 0), (dense > 0) != (other > 0)
            assert bool(((dense - other).abs() <= rounding)[both].all())
            # Scores that differ by rounding alone may change places; they then lie within rounding of the last winner.
            cut = torch.where(screened.values > 0, screened.values, torch.inf).amin(1, keepdim=True)
            assert bool(((exact - cut).abs() <= rounding)[either].all())
            assert int(either.sum()) <= both.sum() // 100


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_screening_is_in_use_and_steps_aside_where_it_cannot_pay(precision):
    core = _native.native()
    if core is None or not core.native_precision(precision):
        pytest.skip(f"this processor has no {precision} products: nothing is screened")
    x, W, b = inputs(64, 192, 6000)

    def screen(x, W, b, k=8, floor=None):
        selection = core.Selection(len(x), k) if k else core.Positives(len(x), -1)
        share = encode.SCREENED_SHARE["topk" if k else "relu"]
        return selection.screen(x.numpy(), W.numpy(), b.numpy(), precision, share, 2, _native.array(floor))

    assert screen(x, W, b)
    assert not screen(x, W, b, k=0)  # half of all features fire
    assert screen(x, W, b - 20, k=0)
    assert screen(x, W, b, k=0, floor=torch.full((6000,), 20.0))
    assert not screen(x, W, b, k=0, floor=torch.full((6000,), torch.inf))
    with pytest.raises(ValueError, match="no floor"):
        screen(x, W, b, floor=torch.zeros(6000))
    assert not screen(x, W[:1].expand(6000, -1).contiguous(), 0 * b)  # all equal: all are candidates
    for bad in (torch.nan, torch.inf):
        broken = [x.clone(), W.clone(), b.clone()]
        for tensor in broken:
            tensor.view(-1)[-1] = bad
        assert not screen(broken[0], W, b)
        assert not screen(x, broken[1], b)
        assert not screen(x, W, broken[2])


@pytest.mark.parametrize("width", [128, 131, 768])
def test_screened_selection_of_outlier_dimensions(width):
    # As in residual streams: a few dimensions a hundred times as large as the others.
    x, W, b = inputs(70, width, 7000)
    x[:, [3, 77]] *= 100
    W[:, [3, 90]] *= 10
    code, exact = kernels.encode_topk(x, W, b, 16), reference.encode_topk(x.double(), W.double(), b.double(), 16)
    assert torch.equal(code.indices.long(), exact.indices)
    torch.testing.assert_close(code.values.double(), exact.values, rtol=1e-4, atol=1e-4)


def test_bfloat16_weights_are_ranked_by_float32_scores(route):
    x, W, b = inputs(40, 64, 3000, torch.bfloat16)
    code = kernels.encode_topk(x, W, b, 16)
    exact = reference.encode_topk(x.double(), W.double(), b.double(), 16)
    assert code.values.dtype == torch.bfloat16
    assert torch.equal(code.indices.long(), exact.indices)


def test_equal_scores_go_to_the_lower_index(route):
    x = torch.ones(3, 2)
    W = torch.ones(700, 2)
    code = kernels.encode_topk(x, W, None, 5)
    assert code.indices.tolist() == [[0, 1, 2, 3, 4]] * 3
    W[650] = 2
    assert kernels.encode_topk(x, W, None, 3).indices.tolist() == [[650, 0, 1]] * 3
    W[:] = -1
    code = kernels.encode_topk(x, W, None, 3)
    assert not code.values.any()
    assert code.count.tolist() == [0, 0, 0]


def test_winners_at_the_far_end_are_found(route):
    W = torch.arange(1, 5001, dtype=torch.float32)[:, None] * torch.ones(1, 4)
    assert kernels.encode_topk(torch.ones(2, 4), W, None, 3).indices.tolist() == [[4999, 4998, 4997]] * 2
    assert kernels.encode_topk(torch.ones(2, 4), W.flip(0), None, 3).indices.tolist() == [[0, 1, 2]] * 2


def test_nan_propagates_as_the_greatest_score(route):
    x, W, b = inputs(3, 6, 50)
    x[1, 2] = torch.nan
    for code in (kernels.encode_topk(x, W, b, 4), kernels.encode_relu(x, W, b)):
        assert code.values[1, :4].isnan().all()
        assert code.values[[0, 2]].isfinite().all()
    assert kernels.encode_topk(x, W, b, 4).indices[1].tolist() == [0, 1, 2, 3]
    b[7] = torch.nan
    assert kernels.encode_topk(x[:1], W, b, 4).indices[0, 0] == 7


def test_infinite_scores_are_kept(route):
    x, W, b = inputs(2, 6, 50)
    b[9], b[3] = torch.inf, -torch.inf
    code = kernels.encode_topk(x, W, b, 4)
    assert code.indices[:, 0].tolist() == [9, 9]
    assert code.values[:, 0].tolist() == [torch.inf, torch.inf]
    assert 3 not in kernels.encode_relu(x, W, b).indices[:, 1:]


def test_no_tokens_give_an_empty_code(route):
    x, W, b = inputs(0, 6, 50)
    assert kernels.encode_topk(x, W, b, 4).values.shape == (0, 4)
    assert kernels.encode_relu(x, W, b).values.shape == (0, 0)
    assert kernels.encode_relu(x, W, b, 7).values.shape == (0, 7)


@pytest.mark.parametrize("name", ["encode_topk", "encode_relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_encoder_gradients_match_float64(route, name, dtype):
    arguments = inputs(37, 19, 301, dtype)
    options = {"k": 6} if name == "encode_topk" else {}
    upstream = torch.randn(37, 301)

    def gradients(module, dtype):
        leaves = [t.to(dtype).detach().requires_grad_() for t in arguments]
        dense = getattr(module, name)(*leaves, **options).to_dense(301)
        return torch.autograd.grad((dense * upstream.to(dtype)).sum(), leaves)

    exact, naive, ours = gradients(reference, torch.float64), gradients(reference, dtype), gradients(kernels, dtype)
    for what, a, n, e in zip(("dx", "dweight", "dbias"), ours, naive, exact, strict=True):
        assert_as_accurate(what, a, n, e)


def test_gradients_with_stride_zero_are_accepted(route):
    x, W, b = (t.requires_grad_() for t in inputs(6, 5, 40))
    expected = torch.autograd.grad(reference.encode_topk(x, W, b, 3).values.sum(), (x, W, b))
    ours = torch.autograd.grad(kernels.encode_topk(x, W, b, 3).values.sum(), (x, W, b))
    torch.testing.assert_close(ours, expected)


def test_features_that_never_fire_get_exactly_no_gradient(route):
    x, W, b = (t.requires_grad_() for t in inputs(6, 5, 400))
    code = kernels.encode_topk(x, W, b, 3)
    dW, db = torch.autograd.grad(code.values.square().sum(), (W, b))
    silent = torch.ones(400, dtype=torch.bool)
    silent[code.indices.long().flatten()] = False
    assert not dW[silent].any()
    assert not db[silent].any()


def test_float64_inputs_pass_gradcheck(route):
    x, W, b = (t.double().requires_grad_() for t in inputs(4, 3, 12))
    assert torch.autograd.gradcheck(lambda x, W, b: kernels.encode_topk(x, W, b, 3).values, (x, W, b))
    assert torch.autograd.gradcheck(lambda *p: kernels.encode_relu(*p).values, (x, W, b))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, W, b: kernels.encode_topk(x, W, b, 0), r"k must lie in \[1, 50\].*got 0"),
        (lambda x, W, b: kernels.encode_topk(x, W, b, 51), r"k must lie in \[1, 50\].*got 51"),
        (lambda x, W, b: kernels.encode_topk(x[0], W, b, 3), "x must be a matrix"),
        (lambda x, W, b: kernels.encode_relu(x, W[:, 1:], b), "weight must be a matrix .* 6 columns"),
        (lambda x, W, b: kernels.encode_relu(x, W, b[1:]), r"bias must have shape \(50,\), got \(49,\)"),
        (lambda x, W, b: kernels.encode_relu(x, W, b, -3), "capacity must be at least 0 slots, got -3"),
        (lambda x, W, b: kernels.encode_relu(x, W, b.int()), "bias must be floating point"),
    ],
)
def test_bad_arguments_are_refused_by_name(call: Callable[..., Any], message):
    with pytest.raises(ValueError, match=message):
        call(*inputs(4, 6, 50))
