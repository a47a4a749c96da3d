"""Adam against torch.optim.Adam: moments, clipping, norms, copies."""

import pytest
import torch
from triton_checks import DEVICE, error

from e2e_fast.kernels import clip_coefficient
from e2e_fast.kernels.triton.adam import adam_step

BETAS, EPS, LR = (0.9, 0.999), 1e-8, 0.01


def tensors(generator, dtype, *shape):
    def normal():
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    return normal(), [normal() for _ in range(3)]


def torch_adam(param, grads, **options):
    """Parameters, first and second moments after torch's own Adam."""
    param = param.clone().requires_grad_()
    optimizer = torch.optim.Adam([param], lr=LR, betas=BETAS, eps=EPS, foreach=False, **options)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    state = optimizer.state[param]
    return param.detach(), state["exp_avg"], state["exp_avg_sq"]


def number(value):
    return torch.tensor(float(value), device=DEVICE)


def run(param, grads, **options):
    param, m, v = param.clone(), torch.zeros_like(param), torch.zeros_like(param)
    for step, grad in enumerate(grads, start=1):
        adam_step(param, grad, m, v, number(step), number(LR), BETAS, EPS, **options)
    return param, m, v


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(3, 21), (1, 5), (37,)], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_follows_torch(generator, dtype, shape, weight_decay):
    param, grads = tensors(generator, dtype, *shape)
    for ours, theirs in zip(
        run(param, grads, weight_decay=weight_decay), torch_adam(param, grads, weight_decay=weight_decay), strict=True
    ):
        # Step size and bias corrections reach the kernel as float32, also for float64 parameters.
        assert error(ours, theirs) < 3e-7


def test_adam_clips_by_a_coefficient_on_the_device(generator):
    param, grads = tensors(generator, torch.float32, 3, 21)
    coefficient = torch.tensor([0.25], device=DEVICE)
    for ours, theirs in zip(
        run(param, grads, clip_coefficient=coefficient), torch_adam(param, [0.25 * g for g in grads]), strict=True
    ):
        assert error(ours, theirs) < 3e-7


def test_adam_writes_the_norms_and_the_rounded_copy_of_the_new_rows(generator):
    param, grads = tensors(generator, torch.float32, 4, 37)
    param[2] = 0
    grads[0][2] = 0
    norms = torch.full((4,), torch.nan, device=DEVICE)
    shadow = torch.full((4, 37), torch.nan, device=DEVICE, dtype=torch.bfloat16)
    updated, _, _ = run(param, grads[:1], inverse_norms=norms, shadow=shadow)
    assert torch.equal(shadow, updated.bfloat16())
    assert error(norms, 1 / updated.norm(dim=-1).clamp_min(1e-12)) < 1e-6
    assert norms[2] == pytest.approx(1e12)


def test_norms_do_not_change_the_update(generator):
    param, grads = tensors(generator, torch.float32, 4, 37)
    norms = torch.empty(4, device=DEVICE)
    for plain, with_norms in zip(run(param, grads), run(param, grads, inverse_norms=norms), strict=True):
        assert torch.equal(plain, with_norms)


def test_an_unused_row_still_moves_by_its_momentum(generator):
    param, grads = tensors(generator, torch.float32, 2, 8)
    grads[1].zero_()
    one, two = run(param, grads[:1])[0], run(param, grads[:2])[0]
    assert (one != two).all()


def test_fifty_clipped_steps_with_a_schedule_follow_torch(generator):
    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    ours, theirs = ([t.clone() for t in start] for start in [(normal(3, 21), normal(5))] * 2)
    for p in theirs:
        p.requires_grad_()
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in ours]
    optimizer = torch.optim.Adam(theirs, lr=LR, foreach=False)
    for t in range(1, 51):
        lr = LR * min(1, t / 10) * 0.97**t
        for p in theirs:
            p.grad = normal(*p.shape) * (1 + t % 3)
        clip, norm = clip_coefficient([p.grad for p in theirs], 5.0)
        for p, q, (m, v) in zip(ours, theirs, moments, strict=True):
            adam_step(p, q.grad.clone(), m, v, number(t), number(lr), BETAS, EPS, clip_coefficient=clip)
        assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs, 5.0))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        assert error(p, q) < 1e-6


def test_the_step_on_the_device_is_what_counts(generator):
    """The same launch, with another number behind the same pointer, as in a replayed CUDA graph."""
    param, grads = tensors(generator, torch.float32, 3, 21)
    step, lr = number(0), number(LR)
    p, m, v = param.clone(), torch.zeros_like(param), torch.zeros_like(param)
    for grad in grads:
        step += 1
        adam_step(p, grad, m, v, step, lr, BETAS, EPS)
    for ours, theirs in zip((p, m, v), run(param, grads), strict=True):
        assert torch.equal(ours, theirs)
