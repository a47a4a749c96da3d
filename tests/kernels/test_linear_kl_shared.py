"""linear_kl of several students against one teacher: the same numbers as one by one, and the teacher's logits once."""

import importlib
from typing import Any

import pytest
import torch
from tolerance import assert_as_accurate

from e2e_fast import kernels
from e2e_fast.kernels import reference


def inputs(S: int, N: int, D: int, V: int, dtype=torch.float32, bias=True) -> tuple[Any, ...]:
    teacher = torch.randn(N, D)
    students = teacher + torch.tensor([1.0, 0.1, 0.03, 0.0])[:S, None, None] * torch.randn(S, N, D)
    weight = 3 * torch.randn(V, D) / D**0.5
    return *(t.to(dtype) for t in (students, teacher, weight)), torch.randn(V).to(dtype) if bias else None


def losses_and_gradient(function, students, *rest, scale=1.0, **options):
    students = students.detach().clone().requires_grad_()
    losses = function(students, *rest, **options)
    weights = scale * torch.arange(1, len(losses) + 1, dtype=losses.dtype)  # each student's gradient its own factor
    return losses.detach(), torch.autograd.grad((weights * losses).sum(), students)[0]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("S", "N", "D", "V"), [(1, 3, 5, 7), (4, 41, 33, 1271), (2, 7, 64, 2049)])
def test_losses_and_gradients_match_float64(route, S, N, D, V, softcap):
    args = inputs(S, N, D, V)
    exact = losses_and_gradient(reference.linear_kl_shared, *(t.double() for t in args), softcap=softcap)
    naive = losses_and_gradient(reference.linear_kl_shared, *args, softcap=softcap)
    ours = losses_and_gradient(kernels.linear_kl_shared, *args, softcap=softcap)
    assert ours[0].shape == (S,)
    assert_as_accurate("gradient", ours[1], naive[1], exact[1])
    assert ((ours[0] - exact[0]).abs() <= 2 * (naive[0] - exact[0]).abs() + 1e-6 * (1 + exact[0])).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_student_gets_what_it_gets_alone(route, dtype):
    students, *rest = inputs(4, 19, 24, 300, dtype)
    losses, gradients = losses_and_gradient(kernels.linear_kl_shared, students, *rest)
    for s, student in enumerate(students):
        student = student.clone().requires_grad_()
        loss = kernels.linear_kl(student, *rest)
        assert torch.equal(losses[s], loss)
        (gradient,) = torch.autograd.grad((s + 1) * loss, student)
        torch.testing.assert_close(gradients[s], gradient)
    assert losses[3] == 0
    assert not gradients[3].any()


def test_without_the_core_the_teachers_logits_are_formed_once_a_chunk(monkeypatch):
    module = importlib.import_module("e2e_fast.kernels.linear_kl")
    students, teacher, weight, _ = inputs(3, 40, 8, 50)
    whole = losses_and_gradient(kernels.linear_kl_shared, students, teacher, weight)
    products = []
    linear = module.linear
    monkeypatch.setattr(module, "native", lambda: None)
    monkeypatch.setattr(module, "linear", lambda *a: products.append(a[0].shape) or linear(*a))
    monkeypatch.setattr(module, "CHUNK_BYTES", 16 * 4 * 50)  # chunks of 16 tokens: three
    chunked = losses_and_gradient(kernels.linear_kl_shared, students, teacher, weight)
    assert len(products) == 3 * (1 + 2 * 3)
    torch.testing.assert_close(chunked, whole)


def test_without_gradient_the_backward_products_are_skipped(route):
    students, *rest = inputs(2, 4, 6, 20)
    loss, dstudents = torch.ops.e2e_fast.linear_kl_shared(students, *rest, None, False)
    assert loss.shape == (2, 4)
    assert dstudents.shape == (0,)


def test_inputs_may_have_any_strides(route):
    students, *rest = inputs(2, 6, 10, 77)
    expected = losses_and_gradient(kernels.linear_kl_shared, students, *rest)
    strided = students.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    torch.testing.assert_close(losses_and_gradient(kernels.linear_kl_shared, strided, *rest), expected)


def test_float64_inputs_pass_gradcheck(route):
    students, *rest = inputs(2, 3, 4, 9, torch.float64)
    assert torch.autograd.gradcheck(
        lambda s: kernels.linear_kl_shared(s, *rest, softcap=3.0), students.requires_grad_()
    )


def test_a_sum_of_losses_hands_back_a_gradient_of_stride_zero(route):
    students, *rest = inputs(2, 5, 6, 20)
    students.requires_grad_()
    kernels.linear_kl_shared(students, *rest).sum().backward()
    _, expected = losses_and_gradient(kernels.linear_kl_shared, students[:1].detach(), *rest)
    torch.testing.assert_close(students.grad[:1], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t, w, b: (s[0], t, w, b), r"students must have shape \(S, N, D\) with S ≥ 1, got \(4, 6\)"),
        (lambda s, t, w, b: (s[:0], t, w, b), "with S ≥ 1"),
        (lambda s, t, w, b: (s, t[:2], w, b), r"teacher must have shape \(4, 6\) as each student, got \(2, 6\)"),
        (lambda s, t, w, b: (s, t, w[:, :2], b), "weight must be a matrix"),
        (lambda s, t, w, b: (s, t, w, b[:3]), "bias must have shape"),
        (lambda s, t, w, b: (s.long(), t, w, b), "students must be floating point"),
    ],
)
def test_bad_shapes_are_refused_with_the_argument_named(change, message):
    with pytest.raises(ValueError, match=message):
        kernels.linear_kl_shared(*change(*inputs(3, 4, 6, 20)))


def test_softcap_must_be_positive():
    with pytest.raises(ValueError, match="softcap must be positive and finite, got 0"):
        kernels.linear_kl_shared(*inputs(2, 4, 6, 20), softcap=0)
