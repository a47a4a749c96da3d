"""linear_kl: forward and gradient against float64, at the small divergences where good autoencoders live."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from tolerance import assert_as_accurate, relative_error

from e2e_fast import kernels
from e2e_fast.kernels import _native, reference

SHAPES = [(1, 1, 2), (3, 5, 7), (41, 33, 1271), (33, 64, 2049), (17, 130, 50257)]


def inputs(N: int, D: int, V: int, delta: float, dtype=torch.float32, bias=True):
    teacher = torch.randn(N, D)
    student = teacher + delta * torch.randn(N, D)
    weight = 3 * torch.randn(V, D) / D**0.5
    return [t.to(dtype) for t in (student, teacher, weight)] + [torch.randn(V).to(dtype) if bias else None]


def loss_and_gradient(function, student, *rest, **options):
    student = student.detach().clone().requires_grad_()
    loss = function(student, *rest, **options)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def compare(student, teacher, weight, bias, **options):
    exact_inputs = [None if t is None else t.double() for t in (student, teacher, weight, bias)]
    exact = loss_and_gradient(reference.linear_kl, *exact_inputs, **options)
    naive = loss_and_gradient(reference.linear_kl, student, teacher, weight, bias, **options)
    ours = loss_and_gradient(kernels.linear_kl, student, teacher, weight, bias, **options)
    assert_as_accurate("gradient", ours[1], naive[1], exact[1])
    # A single small number may come out exact in plain torch by luck: its share of the logits' rounding is the floor.
    assert abs(ours[0] - exact[0]) <= 2 * abs(naive[0] - exact[0]) + 1e-6 * (1 + float(exact[0]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("delta", [1.0, 0.1, 0.03])
def test_loss_and_gradient_match_float64(route, shape, delta):
    N, D, V = shape
    compare(*inputs(N, D, V, delta))


@pytest.mark.parametrize("softcap", [30.0, 2.0])
def test_soft_capped_logits_match_float64(route, softcap):
    compare(*inputs(19, 24, 1000, 0.2), softcap=softcap)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_large_bias_is_rounded_once(route, softcap):
    student, teacher, weight, bias = inputs(37, 82, 313, 0.1)
    compare(student, teacher, weight, 30 * bias, softcap=softcap)


def test_bfloat16_inputs_keep_float32_logits(route):
    compare(*inputs(31, 64, 3001, 0.1, torch.bfloat16))
    student, teacher, weight, bias = inputs(31, 64, 3001, 0.03, torch.bfloat16)
    _, exact = loss_and_gradient(reference.linear_kl, *(t.double() for t in (student, teacher, weight, bias)))
    _, ours = loss_and_gradient(kernels.linear_kl, student, teacher, weight, bias)
    assert relative_error(ours, exact) < 4e-3  # one rounding of the result; bfloat16 logits give tens of percent here


def test_identical_inputs_give_exactly_zero(route):
    student, teacher, weight, bias = inputs(9, 40, 5003, 0.0)
    for softcap in (None, 5.0):
        loss, gradient = loss_and_gradient(kernels.linear_kl, student, teacher, weight, bias, softcap=softcap)
        assert loss == 0
        assert not gradient.any()


def test_loss_is_the_mean_over_tokens_in_nats(route):
    teacher, student = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [1.0]])
    weight = torch.tensor([[0.0], [3.0]]).log1p()  # odds 1 : 4
    expected = (0.2 * torch.tensor(0.4).log() + 0.8 * torch.tensor(1.6).log()) / 2
    torch.testing.assert_close(kernels.linear_kl(student, teacher, weight), expected)


def test_gradient_is_the_same_when_its_sum_has_stride_zero_or_a_factor(route):
    student, teacher, weight, _ = inputs(5, 8, 50, 0.1, bias=False)
    _, gradient = loss_and_gradient(kernels.linear_kl, student, teacher, weight)
    student.requires_grad_()
    loss, dstudent = torch.ops.e2e_fast.linear_kl(student, teacher, weight, None, None, True)
    loss.sum().backward()
    torch.testing.assert_close(student.grad, 5 * gradient)
    torch.testing.assert_close(dstudent, 5 * gradient)
    student.grad = None
    (-2.5 * kernels.linear_kl(student, teacher, weight)).backward()
    torch.testing.assert_close(student.grad, -2.5 * gradient)


def test_inputs_may_have_any_strides(route):
    student, teacher, weight, bias = inputs(6, 10, 77, 0.1)
    loss, gradient = loss_and_gradient(kernels.linear_kl, student, teacher, weight, bias)
    strided = [t.t().contiguous().t() for t in (student, teacher, weight)]
    loss_2, gradient_2 = loss_and_gradient(kernels.linear_kl, *strided, bias)
    torch.testing.assert_close((loss_2, gradient_2), (loss, gradient))


def test_only_the_student_gets_a_gradient(route):
    student, teacher, weight, bias = (t.requires_grad_() for t in inputs(4, 6, 20, 0.1))
    kernels.linear_kl(student, teacher, weight, bias).backward()
    assert student.grad is not None
    assert teacher.grad is weight.grad is bias.grad is None


def test_without_gradient_the_backward_product_is_skipped(route):
    student, teacher, weight, bias = inputs(4, 6, 20, 0.1)
    _, dstudent = torch.ops.e2e_fast.linear_kl(student, teacher, weight, bias, None, False)
    assert dstudent.numel() == 0


def test_vocabulary_entries_of_teacher_probability_zero_are_legal(route):
    student, teacher, weight, bias = inputs(7, 9, 101, 0.2)
    bias[::3] = -torch.inf  # both masked
    loss, gradient = loss_and_gradient(kernels.linear_kl, student, teacher, weight, bias)
    keep = bias.isfinite()
    expected = loss_and_gradient(kernels.linear_kl, student, teacher, weight[keep], bias[keep])
    torch.testing.assert_close((loss, gradient), expected)


def test_student_without_mass_where_the_teacher_has_some_gives_infinity(route):
    weight = torch.tensor([[-1e10], [0.0]])
    student, teacher = torch.tensor([[1e30]]), torch.tensor([[0.0]])  # logits (-inf, 0) and (0, 0)
    assert kernels.linear_kl(student, teacher, weight) == torch.inf
    assert kernels.linear_kl(teacher, student, weight).isfinite()


@pytest.mark.parametrize("who", [0, 1])
def test_nan_stays_in_its_row(route, who):
    args = inputs(5, 6, 40, 0.1)
    args[who][2, 3] = torch.nan
    student = args[0].requires_grad_()
    loss, _ = torch.ops.e2e_fast.linear_kl(student, *args[1:], None, True)
    assert loss.isnan().tolist() == [False, False, True, False, False]


def test_shifting_every_logit_of_a_token_changes_nothing(route):
    student, teacher, weight, bias = inputs(6, 8, 60, 0.1)
    loss, gradient = loss_and_gradient(kernels.linear_kl, student, teacher, weight, bias)
    shifted = loss_and_gradient(kernels.linear_kl, student, teacher, weight, bias + 40)
    torch.testing.assert_close(shifted, (loss, gradient), rtol=1e-3, atol=1e-6)


def test_no_tokens_give_an_empty_mean_like_torch(route):
    student, teacher, weight, bias = inputs(0, 6, 40, 0.1)
    loss, gradient = loss_and_gradient(kernels.linear_kl, student, teacher, weight, bias)
    assert loss.isnan()
    assert gradient.shape == (0, 6)


def test_float64_inputs_pass_gradcheck(route):
    student, teacher, weight, bias = inputs(3, 4, 9, 0.5, torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: kernels.linear_kl(s, teacher, weight, bias, softcap=3.0), student)


def test_gradient_equals_the_difference_of_expected_unembeddings(route):
    """∂KL/∂h = E_student[W] - E_teacher[W] (the Bregman form of the divergence)."""
    student, teacher, weight, _ = inputs(4, 6, 30, 0.2, bias=False)
    _, gradient = loss_and_gradient(kernels.linear_kl, student, teacher, weight)
    mean_s, mean_t = (nnf.softmax(h @ weight.t(), -1) @ weight for h in (student, teacher))
    torch.testing.assert_close(gradient * 4, mean_s - mean_t, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t, w, b: (s[0], t, w, b), "student must be a matrix"),
        (lambda s, t, w, b: (s, t[:2], w, b), "teacher must have student's shape"),
        (lambda s, t, w, b: (s, t, w[:, :2], b), "weight must be a matrix"),
        (lambda s, t, w, b: (s, t, w, b[:3]), "bias must have shape"),
        (lambda s, t, w, b: (s.long(), t, w, b), "student must be floating point"),
    ],
)
def test_bad_shapes_are_refused_with_the_argument_named(change: Callable[..., Any], message):
    with pytest.raises(ValueError, match=message):
        kernels.linear_kl(*change(*inputs(4, 6, 20, 0.1)))


@pytest.mark.parametrize("softcap", [-1, torch.inf])
def test_softcap_must_be_positive_and_finite(softcap):
    with pytest.raises(ValueError, match=f"softcap must be positive and finite, got {softcap}"):
        kernels.linear_kl(*inputs(4, 6, 20, 0.1), softcap=softcap)


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_vector_exponential_and_tanh_are_within_their_stated_error(level):
    core = _native.native()
    assert core is not None
    try:
        core.simd_force(level)
    except ValueError as error:
        pytest.skip(str(error))
    ulp = 2.0**-23
    try:
        x = torch.cat([torch.linspace(-87.3, 88, 400_001), torch.linspace(-1e-3, 1e-3, 10_001)])
        y = torch.empty_like(x)
        core.exp_lanes(x.numpy(), y.numpy())
        exact = x.double().exp()
        assert float(((y - exact).abs() / exact).max()) < 2 * ulp
        core.tanh_lanes(x.numpy(), y.numpy())
        exact = x.double().tanh()
        assert float(((y - exact).abs() / exact.abs().clamp_min(1e-30)).max()) < 3 * ulp
        special = torch.tensor([-torch.inf, -200.0, -0.0, 0.0, torch.nan])
        y = torch.empty_like(special)
        core.exp_lanes(special.numpy(), y.numpy())
        assert y[:4].tolist() == [0, 0, 1, 1]
        assert y[4].isnan()
        core.tanh_lanes(torch.tensor([torch.inf, -torch.inf]).numpy(), y[:2].numpy())
        assert y[:2].tolist() == [1, -1]
    finally:
        core.simd_force(core.simd_best())
