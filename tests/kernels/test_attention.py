"""attention: forward and gradients against float64, at shapes that fit no block."""

from typing import Any

import pytest
import torch
from tolerance import assert_as_accurate

from e2e_fast import kernels
from e2e_fast.kernels import _native, reference

# B, H, K, T, D
SHAPES = [
    (1, 1, 1, 1, 1), (40, 3, 3, 2, 4), (2, 4, 2, 13, 8), (1, 6, 2, 48, 16), (1, 2, 1, 49, 17), (3, 2, 2, 64, 24),
    (1, 3, 1, 131, 33), (2, 2, 2, 200, 64), (1, 1, 1, 70, 130),
]  # fmt: skip


def inputs(B: int, H: int, K: int, T: int, D: int, size: float = 1.0) -> list[torch.Tensor]:
    return [size * torch.randn(B, heads, T, D) for heads in (H, K, K)]


def run(function: Any, q, k, v, dout, scale=None, **options):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = function(*leaves, scale=scale or q.shape[-1] ** -0.5, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def compare(q, k, v, dout=None, scale=None, **options):
    dout = torch.randn(q.shape[0], q.shape[2], q.shape[1], q.shape[3]) if dout is None else dout
    exact = run(reference.attention, q.double(), k.double(), v.double(), dout, scale, **options)
    naive = run(reference.attention, q, k, v, dout, scale, **options)
    ours = run(kernels.attention, q, k, v, dout, scale, **options)
    for name, *tensors in zip(("out", "dq", "dk", "dv"), ours, naive, exact, strict=True):
        assert_as_accurate(name, *tensors)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_and_its_gradients_match_float64(route, shape):
    compare(*inputs(*shape))


@pytest.mark.parametrize("size", [0.0, 4.0, 12.0])
def test_scores_may_be_equal_or_hundreds_apart(route, size):
    compare(*inputs(2, 2, 1, 101, 16, size))


def test_layouts_of_joint_projections_are_read_as_they_lie(route):
    B, H, T, D = 2, 3, 53, 16
    q, k, v = (t.view(B, T, H, D).transpose(1, 2) for t in torch.randn(B, T, 3 * H * D).split(H * D, dim=2))
    compare(q, k, v)
    compare(*(torch.randn(B, H, D, T).mT for _ in range(3)))


def test_gradient_of_a_sum_is_expanded(route):
    B, H, T, D = 2, 2, 19, 6
    compare(*inputs(B, H, H, T, D), dout=torch.ones(()).expand(B, T, H, D))


def test_another_scale(route):
    compare(*inputs(1, 2, 2, 33, 8), scale=1.0)


@pytest.mark.parametrize("window", [3, 5, 47, 64, 120, 200])
@pytest.mark.parametrize("shape", [(2, 2, 1, 13, 8), (1, 3, 1, 131, 33)], ids=str)
def test_a_window(route, shape, window):
    compare(*inputs(*shape), window=window)


def test_a_window_of_one_token_is_the_value(route):
    q, k, v = inputs(1, 4, 2, 50, 8)
    out, *gradients = run(kernels.attention, q, k, v, torch.ones(1, 50, 4, 8), window=1)
    torch.testing.assert_close(out, v.repeat_interleave(2, dim=1).transpose(1, 2))
    for got, want in zip(gradients, (torch.zeros_like(q), torch.zeros_like(k), torch.full_like(v, 2)), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "softcap"), [(1.0, 0.5), (1.0, 5.0), (1.0, 50.0), (4.0, 5.0), (4.0, 50.0)])
def test_a_soft_cap(route, size, softcap):
    compare(*inputs(2, 4, 2, 101, 16, size), softcap=softcap)
    compare(*inputs(1, 2, 2, 70, 8, size), softcap=softcap, window=30, scale=1.0)


def test_a_window_hides_what_is_before_it(route):
    q, k, v = inputs(1, 2, 2, 150, 8)
    before = kernels.attention(q, k, v, scale=0.3, window=20)[:, 100:]
    k[:, :, :81], v[:, :, :81] = 0, 0
    assert torch.equal(kernels.attention(q, k, v, scale=0.3, window=20)[:, 100:], before)


@pytest.mark.parametrize("shape", [(0, 2, 1, 5, 4), (2, 2, 1, 0, 4)], ids=str)
def test_no_tokens_are_no_work(route, shape):
    B, H, _, T, D = shape
    q, k, v = inputs(*shape)
    out, *gradients = run(kernels.attention, q, k, v, torch.empty(B, T, H, D))
    assert out.numel() == 0
    assert all(g.shape == t.shape for g, t in zip(gradients, (q, k, v), strict=True))


def test_later_tokens_do_not_count(route):
    q, k, v = inputs(1, 2, 2, 150, 8)
    before = kernels.attention(q, k, v, scale=0.3)[:, :77]
    for t in (q, k, v):
        t[:, :, 77:] = torch.randn(1, 2, 73, 8)
    assert torch.equal(kernels.attention(q, k, v, scale=0.3)[:, :77], before)


def test_nan_reaches_its_own_token(route):
    q, k, v = inputs(1, 1, 1, 90, 8)
    q[0, 0, 80] = torch.nan
    out = kernels.attention(q, k, v, scale=0.3)
    assert out[0, 80].isnan().all()
    assert out[0, torch.arange(90) != 80].isfinite().all()


def test_result_has_the_same_bits_for_any_number_of_threads():
    assert _native.has_native()  # torch promises no such thing
    q, k, v = inputs(1, 4, 2, 301, 16)
    dout, threads, results = torch.randn(1, 301, 4, 16), torch.get_num_threads(), []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        results.append(run(kernels.attention, q, k, v, dout))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_float64_passes_gradcheck():
    leaves = [t.double().requires_grad_() for t in inputs(1, 4, 2, 5, 3)]
    assert torch.autograd.gradcheck(lambda q, k, v: kernels.attention(q, k, v, scale=0.7), leaves)
    assert torch.autograd.gradcheck(lambda *t: kernels.attention(*t, scale=0.7, window=2, softcap=1.5), leaves)


def test_second_derivatives_are_refused_not_wrong():
    leaves = [t.requires_grad_() for t in inputs(1, 1, 1, 5, 3)]
    (g,) = torch.autograd.grad(kernels.attention(*leaves, scale=1.0).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(g.sum(), leaves[0])


def test_shapes_that_do_not_fit_are_refused():
    q, k, v = inputs(1, 4, 2, 5, 3)
    with pytest.raises(ValueError, match="multiple of k's heads"):
        kernels.attention(q[:, :3], k, v, scale=1.0)
    with pytest.raises(ValueError, match="k and v must have shape"):
        kernels.attention(q, k[:, :, :4], v[:, :, :4], scale=1.0)
    with pytest.raises(ValueError, match="k and v must have shape"):
        kernels.attention(q, k, v[..., :2], scale=1.0)


@pytest.mark.parametrize("wrong", [{"window": 0}, {"window": -1}, {"softcap": 0.0}, {"softcap": -5.0}], ids=str)
def test_windows_and_soft_caps_are_positive(wrong):
    with pytest.raises(ValueError, match="window and softcap must be positive or None"):
        kernels.attention(*inputs(1, 2, 2, 5, 3), scale=1.0, **wrong)


def test_compiled_core_refuses_what_does_not_fit():
    core = _native.native()
    assert core is not None
    q = torch.zeros(1, 1, 4, 8).numpy()
    with pytest.raises(ValueError, match="scratch"):
        core.attention(q, q, q, 1.0, 1, 0.0, q.copy(), q[..., :2].copy(), q[0, 0, 0].copy(), 1)
    with pytest.raises(ValueError, match="rows contiguous"):
        core.attention(q, q, q[..., ::2], 1.0, 1, 0.0, q.copy(), q[..., :2].copy(), q.copy(), 1)
