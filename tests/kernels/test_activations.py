"""encode_batch_topk and encode_jump_relu: what they select, and the straight-through gradients of the thresholds."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from tolerance import assert_as_accurate

from e2e_fast import kernels
from e2e_fast.kernels import reference

encode = importlib.import_module("e2e_fast.kernels.encode")

SHAPES = [(1, 1, 1, 1), (5, 3, 7, 1), (5, 3, 7, 7), (33, 31, 1025, 8), (64, 192, 4099, 32)]


def inputs(N: int, D: int, F: int, dtype=torch.float32):
    return torch.randn(N, D).to(dtype), (torch.randn(F, D) / D**0.5).to(dtype), (0.3 * torch.randn(F)).to(dtype)


# --- BatchTopK ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_topk_keeps_the_largest_of_the_whole_batch(route, shape):
    N, D, F, k = shape
    x, W, b = inputs(N, D, F)
    code = kernels.encode_batch_topk(x, W, b, k)
    exact = reference.encode_batch_topk(x.double(), W.double(), b.double(), k)
    assert torch.equal(code.indices.long(), exact.indices)
    assert torch.equal(code.count.long(), exact.count)
    assert not code.overflowed().any()
    assert_as_accurate("values", code.values, reference.encode_batch_topk(x, W, b, k).values, exact.values)
    dense = torch.relu(nnf.linear(x.double(), W.double(), b.double()))
    assert int(code.count.sum()) == min(k * N, int((dense > 0).sum()))


def test_a_token_may_take_the_places_of_all_others(route):
    """Its winners outnumber what is looked at first by far: it alone is asked again."""
    x, W = torch.full((40, 1), 1e-3), torch.linspace(1, 2, 3000)[:, None]
    x[17] = 1.0
    code = kernels.encode_batch_topk(x, W, None, 5)
    assert code.count[17] == 200
    assert int(code.count.sum()) == 200
    assert code.indices[17].tolist() == list(range(2800, 3000))
    x[3] = 1.0
    assert kernels.encode_batch_topk(x, W, None, 5).count[[3, 17]].tolist() == [100, 100]


def test_scores_equal_to_the_threshold_are_all_kept(route):
    x, W = torch.tensor([[1.0], [1.0], [0.5]]), torch.tensor([[2.0], [1.0], [2.0], [-1.0]])
    assert kernels.encode_batch_topk(x, W, None, 1).count.tolist() == [2, 2, 0]
    code = kernels.encode_batch_topk(x, W, None, 4)  # 12 asked for, 9 are positive
    assert code.count.tolist() == [3, 3, 3]
    assert code.indices.tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize("capacity", [0, 1, 5, 2000])
def test_batch_topk_with_a_capacity_keeps_the_first_and_reports_the_true_count(route, capacity):
    x, W, b = inputs(9, 17, 900)
    code, expected = kernels.encode_batch_topk(x, W, b, 6, capacity), reference.encode_batch_topk(x, W, b, 6, capacity)
    assert torch.equal(code.indices.long(), expected.indices)
    assert torch.equal(code.count.long(), expected.count)
    torch.testing.assert_close(code.values, expected.values)


def test_batch_topk_of_bfloat16_is_selected_from_float32_scores(route):
    x, W, b = inputs(40, 64, 3000, torch.bfloat16)
    code = kernels.encode_batch_topk(x, W, b, 16)
    exact = reference.encode_batch_topk(x.double(), W.double(), b.double(), 16)
    assert code.values.dtype == torch.bfloat16
    assert torch.equal(code.indices.long(), exact.indices)


def test_batch_topk_lets_nan_through(route):
    x, W, b = inputs(6, 6, 50)
    x[1, 2] = torch.nan
    code = kernels.encode_batch_topk(x, W, b, 3)
    assert code.values[1].isnan().any()
    assert code.values[[0, 2, 3, 4, 5]].isfinite().all()


# --- JumpReLU -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bandwidth", [0.0, 0.05, 0.6])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 7), (33, 31, 1025), (64, 192, 4099)], ids=str)
def test_jump_relu_keeps_what_exceeds_its_threshold(route, shape, bandwidth):
    N, D, F = shape
    x, W, b = inputs(N, D, F)
    threshold = 0.02 + torch.rand(F)
    code = kernels.encode_jump_relu(x, W, b, threshold, bandwidth)
    exact = reference.encode_jump_relu(x.double(), W.double(), b.double(), threshold.double(), bandwidth)
    assert torch.equal(code.indices.long(), exact.indices)
    assert torch.equal(code.count.long(), exact.count)
    assert torch.equal(code.band, exact.band)
    assert torch.equal(code.l0.double(), exact.l0)
    z = nnf.linear(x.double(), W.double(), b.double())
    torch.testing.assert_close(code.to_dense(F).double(), torch.where(z > threshold, z, 0), rtol=1e-5, atol=1e-5)
    if N * F > 100:
        assert bool(code.band.any()) == (bandwidth > 0)


def test_a_score_equal_to_its_threshold_is_silent_and_a_negative_threshold_counts_as_zero(route):
    x, W = torch.ones(1, 1), torch.tensor([[0.5], [0.75], [0.25], [-0.25]])
    code = kernels.encode_jump_relu(x, W, None, torch.tensor([0.5, 0.5, -1.0, -1.0]), 0.0)
    assert code.to_dense(4).tolist() == [[0.0, 0.75, 0.25, 0.0]]


@pytest.mark.parametrize("capacity", [0, 1, 5, 2000])
def test_jump_relu_with_a_capacity_truncates_and_says_so(route, capacity):
    x, W, b = inputs(9, 17, 900)
    threshold = torch.rand(900)
    code = kernels.encode_jump_relu(x, W, b, threshold, 0.1, capacity)
    expected = reference.encode_jump_relu(x, W, b, threshold, 0.1, capacity)
    for ours, theirs in zip(code, expected, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float())
    assert bool(code.overflowed().all()) == (capacity < 900)


@pytest.mark.parametrize("capacity", [1, 5])
def test_what_has_no_slot_gives_its_threshold_no_gradient(route, capacity):
    x, W, b = inputs(9, 17, 90)
    theta = torch.full((90,), 0.4).requires_grad_()

    def gradient(module):
        return torch.autograd.grad(module.encode_jump_relu(x, W, b, theta, 0.5, capacity).l0.sum(), theta)[0]

    assert gradient(kernels).any()
    torch.testing.assert_close(gradient(kernels), gradient(reference))


def composed(module, leaves, W_dec, b_dec, bandwidth, upstream):
    """Gradients through the operators one by one: of a decoded code, its values and its L0."""
    code = module.encode_jump_relu(*leaves, bandwidth)
    y = module.decode(code, W_dec, b_dec)
    loss = (y * upstream.to(y.dtype)).sum() + y.square().sum() + code.to_dense(301).square().sum() + code.l0.sum() / 7
    return torch.autograd.grad(loss, (*leaves, W_dec, b_dec))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_through_encoder_and_decoder_match_float64(route, dtype):
    arguments = [
        *inputs(37, 19, 301, dtype),
        0.1 + 0.3 * torch.rand(301),
        torch.randn(301, 19).to(dtype),
        torch.randn(19),
    ]
    upstream = torch.randn(37, 19)

    def gradients(module, dtype):
        *leaves, W_dec, b_dec = [t.to(dtype).detach().requires_grad_() for t in arguments]
        return composed(module, leaves, W_dec, b_dec, 0.3, upstream)

    exact, naive, ours = gradients(reference, torch.float64), gradients(reference, dtype), gradients(kernels, dtype)
    for what, a, n, e in zip(
        ("dx", "dW_enc", "db_enc", "dthreshold", "dW_dec", "db_dec"), ours, naive, exact, strict=True
    ):
        assert_as_accurate(what, a, n, e)


def test_the_straight_through_gradient_is_that_of_the_mean(route):
    """Over many tokens L is smooth in θ: its central difference over the bandwidth is what the gradient estimates."""
    scores = torch.linspace(0, 2, 200_000, dtype=torch.float64)[:, None]
    W_enc, W_dec, width = torch.ones(1, 1).double(), torch.full((1, 1), 3.0).double(), 0.01

    def loss(theta):
        code = kernels.encode_jump_relu(scores, W_enc, None, theta, width)
        return (kernels.decode(code, W_dec) - scores / 4).square().mean() + 0.7 * code.l0.mean()

    theta = torch.tensor([0.8]).double().requires_grad_()
    (ours,) = torch.autograd.grad(loss(theta), theta)
    with torch.no_grad():
        difference = (loss(theta + width / 2) - loss(theta - width / 2)) / width
    # A score z has density 1/2; losing it changes the squared error by (z/4)² - (3z/4)² and the L0 by one.
    assert float(difference) == pytest.approx(-0.5 * (0.5 * 0.8**2 + 0.7), rel=1e-3)
    # The error being quadratic, the slopes on both sides of the jump add up to it: half a band would not do.
    assert float(ours) == pytest.approx(float(difference), rel=0.01)


def test_the_l0_gradient_is_the_central_difference_of_the_count(route):
    x, W, b = (t.double() for t in inputs(500, 5, 9))
    theta, width = torch.full((9,), 0.4).double().requires_grad_(), 0.2
    (ours,) = torch.autograd.grad(kernels.encode_jump_relu(x, W, b, theta, width).l0.sum(), theta)
    for j in range(9):
        step = torch.zeros(9).double()
        step[j] = width / 2
        above, below = (kernels.encode_jump_relu(x, W, b, theta.detach() + s, 0.0).l0.sum() for s in (step, -step))
        assert float(ours[j]) == pytest.approx(float(above - below) / width)


def test_thresholds_at_rest_get_no_gradient_from_far_scores(route):
    x, W, b = inputs(6, 5, 40)
    theta = torch.full((40,), 50.0).requires_grad_()
    code = kernels.encode_jump_relu(x, W, b, theta)
    assert code.values.shape == (6, 0)
    (gradient,) = torch.autograd.grad(code.l0.sum() + kernels.decode(code, W).sum(), theta)
    assert not gradient.any()


def test_gradients_twice_agree_to_the_bit(route):
    x, W, b = inputs(64, 16, 300)
    results = []
    for _ in range(2):
        theta = torch.full((300,), 0.3).requires_grad_()
        code = kernels.encode_jump_relu(x, W, b, theta, 0.5)
        loss = kernels.decode(code, W).square().sum() + code.l0.sum()
        results.append(torch.autograd.grad(loss, theta)[0])
    assert torch.equal(*results)


def test_no_tokens_give_an_empty_code(route):
    x, W, b = inputs(0, 6, 50)
    theta = torch.ones(50, requires_grad=True)
    assert kernels.encode_batch_topk(x, W, b, 4).values.shape == (0, 0)
    assert kernels.encode_batch_topk(x, W, b, 4, 7).values.shape == (0, 7)
    code = kernels.encode_jump_relu(x, W, b, theta)
    assert code.values.shape == (0, 0)
    assert kernels.encode_jump_relu(x, W, b, theta, capacity=7).values.shape == (0, 7)
    assert not torch.autograd.grad(code.l0.sum(), theta)[0].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, W, b: kernels.encode_batch_topk(x, W, b, 0), r"k must lie in \[1, 50\].*got 0"),
        (lambda x, W, b: kernels.encode_batch_topk(x, W, b, 3, -1), "capacity must be at least 0 slots, got -1"),
        (lambda x, W, b: kernels.encode_jump_relu(x, W, b, b[1:]), r"threshold must have shape \(50,\), got \(49,\)"),
        (lambda x, W, b: kernels.encode_jump_relu(x, W, b, b, -0.1), "bandwidth must be finite and at least 0"),
        (lambda x, W, b: kernels.encode_jump_relu(x, W, b, b, capacity=-1), "capacity must be at least 0 slots"),
    ],
)
def test_bad_arguments_are_refused_by_name(call: Callable[..., Any], message):
    with pytest.raises(ValueError, match=message):
        call(*inputs(4, 6, 50))
