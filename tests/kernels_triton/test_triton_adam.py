from typing import Any

import pytest
import torch
from triton_checks import DEVICE, error

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


def run(param, grads, **options):
    param, m, v = param.clone(), torch.zeros_like(param), torch.zeros_like(param)
    for step, grad in enumerate(grads, start=1):
        adam_step(param, grad, m, v, step, LR, BETAS, EPS, **options)
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 0}, "step must count from 1, got 0"),
        ({"grad": torch.zeros(3, 2)}, r"grad must have param's shape \(2, 3\), got \(3, 2\)"),
        (
            {"exp_avg": torch.zeros(3, 2).t()},
            r"exp_avg is updated in place and must be contiguous, got strides \(1, 2\)",
        ),
        ({"inverse_norms": torch.zeros(3)}, r"inverse_norms must have shape \(2,\), got \(3,\)"),
    ],
)
def test_adam_refuses_what_does_not_fit(change, message):
    arguments: dict[str, Any] = {name: torch.zeros(2, 3) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    arguments |= {"step": 1, "lr": LR, "betas": BETAS, "eps": EPS, **change}
    with pytest.raises(ValueError, match=message):
        adam_step(**arguments)
