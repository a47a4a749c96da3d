"""The variant of linear_kl with products of its own: E = exp(z - tile maximum) in float16 instead of float32 logits."""

from typing import Any

import pytest
import torch
from test_triton_linear_kl import double, oracle, problem
from triton_checks import DEVICE, assert_close, error

from e2e_fast.kernels.triton import _launch
from e2e_fast.kernels.triton import linear_kl as module
from e2e_fast.kernels.triton import linear_kl_dual as dual
from e2e_fast.kernels.triton.linear_kl import linear_kl

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=["dual", "dual_combine"], autouse=True)
def way(request, monkeypatch) -> str:
    """Each of the variants in turn, chosen where a user would choose it."""
    monkeypatch.setitem(_launch.VARIANTS, "linear_kl", {("any", "any", "any"): request.param})
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("N", "D", "V"), [(1, 7, 5), (5, 16, 45), (19, 40, 128), (9, 33, 90)])
def test_loss_and_gradient_match_reference(generator, dtype, bias, N, D, V):
    inputs = problem(generator, dtype, N=N, D=D, V=V, bias=bias)
    loss, gradient = linear_kl(*inputs, None, True)
    expected_loss, expected_gradient = oracle(*double(inputs))
    naive_loss, naive_gradient = oracle(*inputs)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert_close("loss", loss, expected_loss, naive_loss)
    assert_close("gradient", gradient, expected_gradient, naive_gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kl", [1.0, 0.1, 0.01])
def test_gradient_keeps_three_per_mille_at_small_kl(generator, dtype, kl):
    noise = {1.0: 0.5, 0.1: 0.17, 0.01: 0.055}[kl]
    student, teacher, weight, _ = problem(generator, dtype, N=16, D=16, V=200, noise=noise)
    loss, gradient = linear_kl(student, teacher, weight, None, None, True)
    expected_loss, expected_gradient = oracle(*double((student, teacher, weight, None)))
    assert kl / 3 < expected_loss.mean() < kl * 3
    assert error(loss, expected_loss) < 1e-4
    assert error(gradient, expected_gradient) < 3e-3


def emulated(student, teacher, weight, tile=128, storage=torch.float16) -> tuple[Any, Any]:
    """Losses and gradients as the kernels form them, in plain torch: what is rounded there is rounded here."""
    dtype, V = weight.dtype, len(weight)
    tiles = -(-V // tile)

    def parts(h):
        z = h.float() @ weight.float().T
        z = torch.nn.functional.pad(z, (0, tiles * tile - V), value=-torch.inf).view(len(h), tiles, tile)
        m = z.amax(-1, keepdim=True)
        e = (z - m).exp()
        largest = m.amax(1, keepdim=True)
        total = (e.sum(-1, keepdim=True) * (m - largest).exp()).sum(1, keepdim=True)
        return z, e, m, largest, total, (m - largest - total.log()).exp()

    z_s, e_s, _, largest_s, total_s, u_s = parts(student)
    z_t, e_t, m_t, largest_t, total_t, u_t = parts(teacher)
    cross = torch.where(e_t == 0, 0, e_t * (z_t - z_s)).sum(-1, keepdim=True) * (m_t - largest_t).exp()
    loss = cross.sum(1, keepdim=True) / total_t + (largest_s - largest_t) + (total_s.log() - total_t.log())
    difference = u_s * e_s.to(storage).float() - u_t * e_t.to(storage).float()
    scale = 1024 if dtype == torch.float16 else 1
    difference = (difference * scale).flatten(1)[:, :V].to(dtype).float()
    return loss.flatten(), (difference @ weight.float() / scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_emulation_in_plain_torch_is_what_the_kernels_compute(generator, dtype):
    student, teacher, weight, _ = problem(generator, dtype, N=9, D=24, V=90, noise=0.1)
    tile = _launch.blocks("kl_dual", student)["BLOCK_V"]
    loss, gradient = linear_kl(student, teacher, weight, None, None, True)
    expected_loss, expected_gradient = emulated(student, teacher, weight, tile)
    assert error(loss, expected_loss) < 1e-4
    assert error(gradient, expected_gradient) < 2e-4


@pytest.mark.parametrize("way", ["dual"], indirect=True)  # the emulation is one for both
@pytest.mark.parametrize("kl", [1.0, 0.1, 0.01])
def test_precision_at_the_size_of_gpt2(generator, way, kl):
    teacher = torch.randn(64, 768, generator=generator)
    weight = (0.08 * torch.randn(50257, 768, generator=generator)).bfloat16()
    noise = {1.0: 0.75, 0.1: 0.2, 0.01: 0.065}[kl]
    student = (teacher + noise * torch.randn(64, 768, generator=generator)).bfloat16()
    teacher = teacher.bfloat16()
    logits = [h.double() @ weight.double().T for h in (student, teacher)]
    log_s, log_t = (torch.log_softmax(z, -1) for z in logits)
    expected_loss = (log_t.exp() * (log_t - log_s)).sum(-1)
    expected = (log_s.exp() - log_t.exp()) @ weight.double()
    assert kl / 1.5 < expected_loss.mean() < kl * 1.5
    loss, gradient = emulated(student, teacher, weight)
    assert error(loss, expected_loss) < 1e-4
    assert error(gradient, expected) < 3e-3
    if kl < 0.1:  # why E is float16: bfloat16 would not do
        assert error(emulated(student, teacher, weight, storage=torch.bfloat16)[1], expected) > 3e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identical_inputs_give_exactly_zero(generator, dtype):
    _, teacher, weight, bias = problem(generator, dtype, N=20, D=40, V=90, bias=True)
    loss, gradient = linear_kl(teacher.clone(), teacher, weight, bias, None, True)
    assert (loss == 0).all()
    assert (gradient == 0).all()


def test_minus_infinity_is_a_legal_logit(generator):
    student, teacher, weight, bias = problem(generator, torch.float16, V=60, bias=True)
    bias[:33] = -torch.inf  # whole tiles, and more
    loss, gradient = linear_kl(student, teacher, weight, bias, None, True)
    inputs = (student, teacher, weight[33:], bias[33:])
    expected_loss, expected_gradient = oracle(*double(inputs))
    naive_loss, naive_gradient = oracle(*inputs)
    assert_close("loss", loss, expected_loss, naive_loss)
    assert_close("gradient", gradient, expected_gradient, naive_gradient)


def test_student_without_mass_where_the_teacher_has_some_gives_infinity():
    weight = torch.tensor([[-1e10], [0.0], [0.0]], device=DEVICE).bfloat16()
    h = torch.tensor([[1e30], [0.0]], device=DEVICE).bfloat16()  # logits (-inf, 0, 0) and (0, 0, 0)
    loss, gradient = linear_kl(h, h.flip(0), weight, None, None, True)
    assert loss[0] == torch.inf
    assert loss[1].isfinite()
    assert gradient.isfinite().all()
    assert gradient[1] == torch.tensor(-1e10 / 3).bfloat16()


def test_nan_stays_in_its_row(generator):
    student, teacher, weight, _ = problem(generator, torch.bfloat16)
    student[2, 0] = torch.nan
    loss, gradient = linear_kl(student, teacher, weight, None, None, True)
    others = torch.tensor([0, 1, 3, 4], device=DEVICE)
    assert loss[2].isnan()
    assert gradient[2].isnan().all()
    assert loss[others].isfinite().all()
    assert gradient[others].isfinite().all()


def test_logits_far_beyond_the_range_of_an_exponential_do_not_overflow(generator):
    student, teacher, weight, _ = problem(generator, torch.bfloat16, N=4, D=16, V=50)
    inputs = (30 * student, 30 * teacher, weight, None)
    loss, gradient = linear_kl(*inputs, None, True)
    expected_loss, expected_gradient = oracle(*double(inputs))
    assert error(loss, expected_loss) < 1e-5
    assert error(gradient, expected_gradient) < 4e-3


def test_chunks_of_rows_give_the_same_as_one(generator, monkeypatch):
    inputs = problem(generator, torch.float16, N=130, D=4, V=12)
    whole = linear_kl(*inputs, None, True)
    monkeypatch.setattr(dual, "CHUNK_BYTES", 1)
    for part, expected in zip(linear_kl(*inputs, None, True), whole, strict=True):
        assert error(part, expected) < 1e-3


def test_without_gradient_the_loss_is_the_same_and_nothing_else_is_stored(generator, monkeypatch):
    inputs = problem(generator, torch.bfloat16)
    expected = linear_kl(*inputs, None, True)[0]
    launches = []
    run = dual.launch
    monkeypatch.setattr(
        dual, "launch", lambda kernel, *rest, **more: (launches.append(kernel), run(kernel, *rest, **more))
    )
    loss, gradient = linear_kl(*inputs, None, False)
    assert gradient.shape == (0,)
    assert torch.equal(loss, expected)
    assert launches == [dual.kl_dual_kernel, dual.kl_weights_kernel]


def test_no_tokens_give_empty_results(generator):
    student, teacher, weight, _ = problem(generator, torch.bfloat16, N=0)
    loss, gradient = linear_kl(student, teacher, weight, None, None, True)
    assert loss.shape == (0,)
    assert gradient.shape == (0, 7)


def test_strided_inputs_and_a_column_major_unembedding(generator):
    student, teacher, weight, _ = problem(generator, torch.float16, N=6)
    loss, gradient = linear_kl(student[::2], teacher[::2], weight.t().contiguous().t(), None, None, True)
    expected_loss, expected_gradient = linear_kl(student, teacher, weight, None, None, True)
    assert error(loss, expected_loss[::2]) < 1e-6
    assert error(gradient, expected_gradient[::2]) < 1e-3


@pytest.mark.parametrize(
    ("dtype", "softcap", "widest", "runs"),
    [
        (torch.bfloat16, None, 1024, True),
        (torch.bfloat16, 4.0, 1024, False),
        (torch.float32, None, 1024, False),
        (torch.bfloat16, None, 6, False),
    ],
)
def test_problems_it_does_not_serve_go_the_first_way(generator, monkeypatch, dtype, softcap, widest, runs):
    calls = []
    monkeypatch.setattr(dual, "WIDEST", widest)
    monkeypatch.setattr(module, "linear_kl_dual", lambda *a, **k: calls.append(a) or dual.linear_kl_dual(*a, **k))
    inputs = problem(generator, dtype)
    loss, gradient = linear_kl(*inputs, softcap, True)
    assert bool(calls) == runs
    monkeypatch.setitem(_launch.VARIANTS, "linear_kl", {("any", "any", "any"): "logits"})
    for ours, expected in zip((loss, gradient), linear_kl(*inputs, softcap, True), strict=True):
        assert error(ours, expected) < 5e-3


@pytest.mark.parametrize("way", ["dual"], indirect=True)
def test_the_first_way_is_the_default(monkeypatch, generator):
    monkeypatch.undo()
    assert set(_launch.VARIANTS["linear_kl"].values()) == {"logits"}
    monkeypatch.setattr(module, "linear_kl_dual", None)
    linear_kl(*problem(generator, torch.bfloat16), None, True)
