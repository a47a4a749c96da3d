"""KL(teacher ‖ student) over the vocabulary, from final hidden states, without the N × V logits.

    z_t = h_t W_Uᵀ + b_U    z_s = h_s W_Uᵀ + b_U    (softcap: z ← c·tanh(z / c))
    KL_n = Σ_v p_t (log p_t - log p_s)              ∂KL_n/∂z_s = p_s - p_t    ∂KL_n/∂h_s = (p_s - p_t) W_U

The unembedding is frozen, so the gradient needs W_U but never a gradient of W_U: it is computed in the forward pass,
rows in chunks, and the backward pass is a multiplication. Three matrix products in all. Logits stay in float32 up to
the difference p_s - p_t: rounded to bfloat16 they put 12 % error on the gradient at KL 0.15 and 40 % at 0.013.

Operator: ``e2e_fast::linear_kl(student, teacher, weight, bias?, softcap?, need_grad) -> (loss, dstudent)``; loss (N,)
float32 (float64 for float64 inputs), dstudent (N, D) the gradient of the *sum* of the losses in student's dtype, or
shape (0,) without ``need_grad``.

>>> import torch
>>> h, W_U = torch.randn(5, 8), torch.randn(11, 8)
>>> linear_kl(h, h, W_U).item()
0.0
>>> student = (h + 0.1).requires_grad_()
>>> linear_kl(student, h, W_U).backward()
>>> student.grad.shape
torch.Size([5, 8])
>>> linear_kl_shared(torch.stack([h, student.detach()]), h, W_U).shape
torch.Size([2])
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from e2e_fast.kernels._buffers import empty
from e2e_fast.kernels._checks import accumulator, check_bias, check_devices, check_matrix
from e2e_fast.kernels._gemm import CHUNK_BYTES, linear, row_chunks
from e2e_fast.kernels._native import array, native


def linear_kl(
    student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None = None, *, softcap: float | None = None
) -> Tensor:
    """KL(teacher ‖ student) over the vocabulary in nats, mean over tokens; the gradient goes to ``student`` alone.

    student, teacher (N, D) final hidden states (after the last norm), weight (V, D) unembedding, bias (V,). ``softcap``
    c replaces the logits z by c·tanh(z / c) (Gemma 2). A teacher logit of -inf is legal (probability 0); a student
    logit of -inf where the teacher has mass gives inf. NaN propagates. Identical inputs give exactly 0, loss and
    gradient. Once differentiable. Raises ValueError on shapes that do not fit.
    """
    check_matrix("student", student)
    check_matrix("weight", weight, student.shape[1], "(V, D)")
    check_bias("bias", bias, weight.shape[0])
    if teacher.shape != student.shape:
        raise ValueError(f"teacher must have student's shape {tuple(student.shape)}, got {tuple(teacher.shape)}")
    check_devices("student", student, teacher=teacher, weight=weight, bias=bias)
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be positive and finite, got {softcap}")
    need_grad = student.requires_grad and torch.is_grad_enabled()
    bias = None if bias is None else bias.detach()
    loss, _ = _linear_kl(student, teacher.detach(), _frozen(weight), bias, softcap, need_grad)
    return loss.mean()


def linear_kl_shared(
    students: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None = None, *, softcap: float | None = None
) -> Tensor:
    """`linear_kl` of S students against one teacher, whose logits are formed once: 1 + 2·S products instead of 3·S.

    students (S, N, D), teacher (N, D), weight (V, D), bias (V,) → S losses in nats, each a mean over tokens. For
    sweeps: several SAEs spliced into one batch. Everything else is as in `linear_kl`, the errors too.
    """
    if students.dim() != 3 or students.shape[0] == 0:
        raise ValueError(f"students must have shape (S, N, D) with S ≥ 1, got {tuple(students.shape)}")
    check_matrix("students", students[0])
    check_matrix("weight", weight, students.shape[2], "(V, D)")
    check_bias("bias", bias, weight.shape[0])
    if teacher.shape != students.shape[1:]:
        raise ValueError(
            f"teacher must have shape {tuple(students.shape[1:])} as each student, got {tuple(teacher.shape)}"
        )
    check_devices("students", students, teacher=teacher, weight=weight, bias=bias)
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be positive and finite, got {softcap}")
    need_grad = students.requires_grad and torch.is_grad_enabled()
    bias = None if bias is None else bias.detach()
    loss, _ = _linear_kl_shared(students, teacher.detach(), _frozen(weight), bias, softcap, need_grad)
    return loss.mean(1)


def _frozen(weight: Tensor) -> Tensor:
    """The weight as a constant: itself where it asks for no gradient, since a GPU keeps this tensor's padded copy."""
    return weight.detach() if weight.requires_grad else weight


@torch.library.custom_op("e2e_fast::linear_kl", mutates_args=(), device_types="cpu")
def _linear_kl(
    student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, need_grad: bool
) -> tuple[Tensor, Tensor]:
    loss, dstudents = _cpu(student[None], teacher, weight, bias, softcap, need_grad)
    return loss[0], dstudents[0] if need_grad else dstudents


def _cpu(
    students: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """Losses (S, N) and gradients (S, N, D) in students' dtype, or shape (0,)."""
    dtype = accumulator(students, teacher, weight)
    core = native() if dtype == torch.float32 else None
    h_s, h_t, w = (t.detach().to(dtype) for t in (students, teacher, weight))
    b = None if bias is None else bias.detach().to(dtype)
    loss = torch.empty(students.shape[:2], dtype=dtype)
    dstudents = torch.empty(students.shape, dtype=dtype) if need_grad else None
    if core is not None:
        threads, (S, N, D), V = torch.get_num_threads(), students.shape, weight.shape[0]
        scratch = empty(core.linear_kl_scratch(S, N, D, V, need_grad, threads))
        core.linear_kl(
            array(h_s), array(h_t), array(w), array(b), softcap or 0.0,
            loss.numpy(), array(dstudents), array(scratch), threads,
        )  # fmt: skip
    else:
        for rows in row_chunks(teacher.shape[0], 4 * weight.shape[0], CHUNK_BYTES):
            z_t = linear(h_t[rows], w, b)
            for s in range(students.shape[0]):
                loss[s, rows], dz = _rows(z_t, linear(h_s[s, rows], w, b), softcap)
                if dstudents is not None:
                    dstudents[s, rows] = linear(dz, w.t())
    return loss, students.new_empty(0) if dstudents is None else dstudents.to(students.dtype)


def _rows(z_t: Tensor, z_s: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Losses (n,) and their gradient with respect to ``z_s`` (n, V) from raw logits (n, V)."""
    tanh = None
    if softcap is not None:
        tanh = torch.tanh(z_s / softcap)
        z_t, z_s = softcap * torch.tanh(z_t / softcap), softcap * tanh
    log_t, log_s = torch.log_softmax(z_t, -1), torch.log_softmax(z_s, -1)
    p_t = log_t.exp()
    loss = torch.where(p_t == 0, 0, p_t * (log_t - log_s)).sum(-1)
    dz = log_s.exp_().sub_(p_t)
    return loss, dz if tanh is None else dz.mul_(1 - tanh * tanh)


@_linear_kl.register_fake
def _(student, teacher, weight, bias, softcap, need_grad):
    loss = student.new_empty(student.shape[0], dtype=accumulator(student, teacher, weight))
    return loss, student.new_empty(student.shape if need_grad else (0,))


@_linear_kl.register_kernel("cuda")
def _(student, teacher, weight, bias, softcap, need_grad):
    from e2e_fast.kernels.triton.linear_kl import linear_kl as launch

    return launch(student, teacher, weight, bias, softcap, need_grad)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


@once_differentiable
def _backward(ctx, dloss, _):
    (dstudent,) = ctx.saved_tensors
    dh = None if dloss is None else (dstudent * dloss[..., None]).to(dstudent.dtype)
    return dh, None, None, None, None, None


_linear_kl.register_autograd(_backward, setup_context=_setup_context)


# --- Several students -----------------------------------------------------------------------------------------------


@torch.library.custom_op("e2e_fast::linear_kl_shared", mutates_args=(), device_types="cpu")
def _linear_kl_shared(
    students: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, need_grad: bool
) -> tuple[Tensor, Tensor]:
    return _cpu(students, teacher, weight, bias, softcap, need_grad)


@_linear_kl_shared.register_fake
def _(students, teacher, weight, bias, softcap, need_grad):
    loss = students.new_empty(students.shape[:2], dtype=accumulator(students, teacher, weight))
    return loss, students.new_empty(students.shape if need_grad else (0,))


@_linear_kl_shared.register_kernel("cuda")
def _(students, teacher, weight, bias, softcap, need_grad):
    from e2e_fast.kernels.triton.linear_kl import linear_kl_shared as launch

    return launch(students, teacher, weight, bias, softcap, need_grad)


_linear_kl_shared.register_autograd(_backward, setup_context=_setup_context)
