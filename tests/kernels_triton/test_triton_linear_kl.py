from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_checks import DEVICE, assert_close, error

from e2e_fast import kernels
from e2e_fast.kernels import reference
from e2e_fast.kernels.triton import _launch, linear_kl_dual
from e2e_fast.kernels.triton import linear_kl as module
from e2e_fast.kernels.triton.linear_kl import linear_kl, linear_kl_shared, padded_unembedding

Problem = tuple[Any, Any, Any, Any]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def problem(generator, dtype, N=5, D=7, V=45, noise=0.3, bias=False) -> Problem:
    """Hidden states with peaked softmaxes, the student near the teacher."""
    teacher = torch.randn(N, D, generator=generator, dtype=torch.float64)
    student = teacher + noise * torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    b = torch.randn(V, generator=generator, dtype=torch.float64) if bias else None
    return student.to(DEVICE, dtype), teacher.to(DEVICE, dtype), weight.to(DEVICE, dtype), _to(b, dtype)


def _to(tensor, dtype):
    return None if tensor is None else tensor.to(DEVICE, dtype)


def oracle(student, teacher, weight, bias, softcap=None) -> Any:
    """Loss of each token and the gradient of their sum, through autograd, in the dtype of the inputs."""
    student = student.detach().clone().requires_grad_()
    rows = [
        reference.linear_kl(student[n : n + 1], teacher[n : n + 1], weight, bias, softcap=softcap)
        for n in range(student.shape[0])
    ]
    loss = torch.stack(rows)
    loss.sum().backward()
    return loss.detach(), student.grad


def double(inputs: Problem) -> Problem:
    student, teacher, weight, bias = inputs
    return student.double(), teacher.double(), weight.double(), None if bias is None else bias.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bias", "softcap"), [(False, None), (True, None), (True, 4.0)])
def test_loss_and_gradient_match_reference(generator, dtype, bias, softcap):
    inputs = problem(generator, dtype, bias=bias)
    loss, gradient = linear_kl(*inputs, softcap, True)
    expected_loss, expected_gradient = oracle(*double(inputs), softcap)
    naive_loss, naive_gradient = oracle(*inputs, softcap)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    assert_close("loss", loss, expected_loss, naive_loss)
    assert_close("gradient", gradient, expected_gradient, naive_gradient)


@pytest.mark.parametrize("kl", [1.0, 0.1, 0.01])
def test_bfloat16_gradient_keeps_three_per_mille_at_small_kl(generator, kl):
    # The noise for which the KL comes out near the one named; bf16 logits would miss by 5 to 40 % here.
    noise = {1.0: 0.5, 0.1: 0.17, 0.01: 0.055}[kl]
    student, teacher, weight, _ = problem(generator, torch.bfloat16, N=16, D=16, V=90, noise=noise)
    loss, gradient = linear_kl(student, teacher, weight, None, None, True)
    expected_loss, expected_gradient = oracle(*double((student, teacher, weight, None)))
    assert kl / 3 < expected_loss.mean() < kl * 3
    assert error(loss, expected_loss) < 1e-4
    assert error(gradient, expected_gradient) < 3e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_identical_inputs_give_exactly_zero(generator, dtype, softcap):
    _, teacher, weight, bias = problem(generator, dtype, bias=True)
    loss, gradient = linear_kl(teacher.clone(), teacher, weight, bias, softcap, True)
    assert (loss == 0).all()
    assert (gradient == 0).all()


def test_minus_infinity_is_a_legal_logit(generator):
    student, teacher, weight, bias = problem(generator, torch.float64, V=60, bias=True)
    bias[:33] = -torch.inf  # the whole first block, and more
    loss, gradient = linear_kl(student, teacher, weight, bias, None, True)
    expected_loss, expected_gradient = oracle(student, teacher, weight[33:], bias[33:])
    assert error(loss, expected_loss) < 1e-12
    assert error(gradient, expected_gradient) < 1e-12


def test_nan_stays_in_its_row(generator):
    student, teacher, weight, _ = problem(generator, torch.float32)
    student[2, 0] = torch.nan
    loss, gradient = linear_kl(student, teacher, weight, None, None, True)
    others = torch.tensor([0, 1, 3, 4], device=DEVICE)
    assert loss[2].isnan()
    assert gradient[2].isnan().all()
    assert loss[others].isfinite().all()
    assert gradient[others].isfinite().all()


def test_loss_is_blind_to_a_shift_of_all_logits(generator):
    student, teacher, weight, _ = problem(generator, torch.float64)
    shifted = weight + torch.randn(1, weight.shape[1], generator=generator, dtype=torch.float64).to(DEVICE)
    loss, gradient = linear_kl(student, teacher, weight, None, None, True)
    loss_shifted, gradient_shifted = linear_kl(student, teacher, shifted, None, None, True)
    assert error(loss_shifted, loss) < 1e-11
    assert error(gradient_shifted, gradient) < 1e-11


def test_loss_equals_the_bregman_divergence_of_the_log_partition_function(generator):
    # KL(p_t‖p_s) = A(h_s) - A(h_t) - ∇A(h_t)·(h_s - h_t) with A(h) = logsumexp(W h): an oracle without softmax ratios.
    student, teacher, weight, _ = problem(generator, torch.float64)
    loss, _ = linear_kl(student, teacher, weight, None, None, False)
    h = teacher.clone().requires_grad_()
    A = torch.logsumexp(nnf.linear(h, weight), -1)
    (slope,) = torch.autograd.grad(A.sum(), h)
    bregman = torch.logsumexp(nnf.linear(student, weight), -1) - A.detach() - (slope * (student - teacher)).sum(-1)
    assert error(loss, bregman) < 1e-10


def test_chunks_of_rows_give_the_same_as_one(generator, monkeypatch):
    inputs = problem(generator, torch.float64, N=130, D=4, V=12)
    whole = linear_kl(*inputs, None, True)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    for part, expected in zip(linear_kl(*inputs, None, True), whole, strict=True):
        assert error(part, expected) < 1e-12


def test_without_gradient_the_loss_is_the_same(generator):
    inputs = problem(generator, torch.float32)
    loss, gradient = linear_kl(*inputs, None, False)
    assert gradient.shape == (0,)
    assert torch.equal(loss, linear_kl(*inputs, None, True)[0])


def test_students_sharing_a_teacher_get_what_each_gets_alone(generator):
    student, teacher, weight, bias = problem(generator, torch.float32, bias=True)
    students = torch.stack([student, teacher, 2 * student])
    losses, gradients = linear_kl_shared(students, teacher, weight, bias, None, True)
    for s in range(3):
        loss, gradient = linear_kl(students[s], teacher, weight, bias, None, True)
        assert torch.equal(losses[s], loss)
        assert torch.equal(gradients[s], gradient)


def test_no_tokens_give_empty_results(generator):
    student, teacher, weight, _ = problem(generator, torch.float32, N=0)
    loss, gradient = linear_kl(student, teacher, weight, None, None, True)
    assert loss.shape == (0,)
    assert gradient.shape == (0, 7)


def test_strided_inputs_and_a_column_major_unembedding(generator):
    student, teacher, weight, _ = problem(generator, torch.float32, N=6)
    loss, gradient = linear_kl(student[::2], teacher[::2], weight.t().contiguous().t(), None, None, True)
    expected_loss, expected_gradient = linear_kl(student, teacher, weight, None, None, True)
    assert error(loss, expected_loss[::2]) < 1e-6
    assert error(gradient, expected_gradient[::2]) < 1e-6


def test_padded_unembedding_is_kept_until_the_weight_changes():
    weight = torch.randn(45, 8, device=DEVICE)
    padded = padded_unembedding(weight, torch.float32)
    assert padded.shape == (64, 8)
    assert torch.equal(padded[:45], weight)
    assert (padded[45:] == 0).all()
    assert padded_unembedding(weight, torch.float32) is padded
    weight[0] = 7
    assert torch.equal(padded_unembedding(weight, torch.float32)[:45], weight)
    assert padded_unembedding(weight, torch.bfloat16).dtype == torch.bfloat16
    assert padded_unembedding(weight, torch.float32) is padded  # recorded CUDA graphs go on reading this address


def test_padded_unembedding_of_an_evaluation_is_filled_anew_in_training():
    weight = torch.randn(45, 8, device=DEVICE)
    with torch.inference_mode():
        padded = padded_unembedding(weight, torch.float32)
    weight[0] = 7
    assert padded_unembedding(weight, torch.float32) is padded
    assert torch.equal(padded[:45], weight)


def test_aligned_unembedding_is_not_copied():
    weight = torch.randn(128, 8, device=DEVICE)
    assert padded_unembedding(weight, torch.float32) is weight


def test_integer_inputs_are_refused():
    z = torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="expected bfloat16"):
        linear_kl(z, z, z, None, None, True)


def test_operators_trace_on_fake_cuda_tensors():
    with FakeTensorMode():
        student, teacher, weight = (torch.empty(n, 8, device="cuda", dtype=torch.bfloat16) for n in (5, 5, 45))
        students = torch.empty(3, 5, 8, device="cuda", dtype=torch.bfloat16)
        loss, dstudent = torch.ops.e2e_fast.linear_kl(student, teacher, weight, None, None, True)
        losses, dstudents = torch.ops.e2e_fast.linear_kl_shared(students, teacher, weight, None, None, True)
        mean = kernels.linear_kl(student, teacher, weight)
    assert (loss.shape, losses.shape, mean.shape) == ((5,), (3, 5), ())
    assert (dstudent.shape, dstudents.shape) == ((5, 8), (3, 5, 8))
    assert {t.device.type for t in (loss, losses, mean, dstudent, dstudents)} == {"cuda"}
    assert (loss.dtype, dstudent.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("need_grad", [True, False])
@pytest.mark.parametrize("way", ["logits", "dual", "dual_combine"])
def test_launching_reads_no_number_off_the_device(monkeypatch, way, need_grad):
    # Fake tensors hold no data: an .item(), or a shape that depends on values, raises.
    launched = []
    for place in (module, linear_kl_dual):
        monkeypatch.setattr(place, "launch", lambda kernel, *_, **__: launched.append(kernel))
    monkeypatch.setitem(_launch.VARIANTS, "linear_kl", {("any", "any", "any"): way})
    with FakeTensorMode():
        student, teacher, weight = (torch.empty(n, 16, dtype=torch.bfloat16, device=DEVICE) for n in (300, 300, 45))
        loss, gradient = linear_kl(student, teacher, weight, torch.empty(45, device=DEVICE), None, need_grad)
    assert loss.shape == (300,)
    assert gradient.shape == ((300, 16) if need_grad else (0,))
    assert len(launched) == (1 if way == "logits" else 2 + need_grad)
