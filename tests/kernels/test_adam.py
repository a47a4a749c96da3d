"""adam_step and clip_coefficient against torch's optimizer and the reference."""

from typing import Any

import pytest
import torch

from e2e_fast import kernels
from e2e_fast.kernels import reference


def number(value: float) -> torch.Tensor:
    return torch.tensor(float(value))


@pytest.mark.parametrize("module", [kernels, reference], ids=["operator", "reference"])
@pytest.mark.parametrize("shape", [(5, 7), (11,), ()], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fifty_clipped_steps_with_a_schedule_follow_torch(module, shape, weight_decay):
    ours = torch.randn(shape, dtype=torch.float64)
    theirs = ours.clone().requires_grad_()
    m, v = torch.zeros_like(ours), torch.zeros_like(ours)
    optimizer = torch.optim.Adam([theirs], lr=1.0, weight_decay=weight_decay)
    for t in range(1, 51):
        lr = 0.01 * min(1, t / 10) * 0.97**t
        theirs.grad = torch.randn_like(ours) * (1 + t % 3)
        grad = theirs.grad.clone()
        clip, norm = kernels.clip_coefficient([grad], 2.0)
        wide = torch.tensor([t, lr], dtype=torch.float64)
        module.adam_step(ours, grad, m, v, wide[0], wide[1], weight_decay=weight_decay, clip=clip)
        torch.testing.assert_close(torch.nn.utils.clip_grad_norm_([theirs], 2.0), norm)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-10, atol=1e-10)


def test_norms_and_rounded_copy_are_of_the_new_rows():
    p, g = torch.randn(4, 6), torch.randn(4, 6)
    p[2] = g[2] = 0
    results = []
    for module in (kernels, reference):
        new, m, v = p.clone(), torch.zeros_like(p), torch.zeros_like(p)
        norms, shadow = torch.full((4,), torch.nan), torch.full((4, 6), torch.nan, dtype=torch.bfloat16)
        module.adam_step(new, g, m, v, number(1), number(0.1), inverse_norms=norms, shadow=shadow)
        torch.testing.assert_close(norms[[0, 1, 3]], 1 / new[[0, 1, 3]].norm(dim=-1))
        assert norms[2] == pytest.approx(1e12)
        assert torch.equal(shadow, new.bfloat16())
        results.append((new, m, v))
    torch.testing.assert_close(*results)


def test_what_is_written_counts_as_changed():
    """Autograd must see that a parameter was updated, and so must whoever keeps a copy of it."""
    p, g, m, v = (torch.randn(3, 2) for _ in range(4))
    shadow, norms = torch.empty(3, 2), torch.empty(3)
    before = [t._version for t in (p, g, m, v, shadow, norms)]
    kernels.adam_step(p, g, m, v.abs_(), number(1), number(0.1), inverse_norms=norms, shadow=shadow)
    changed = [t._version > b for t, b in zip((p, g, m, v, shadow, norms), before, strict=True)]
    assert changed == [True, False, True, True, True, True]


def test_clipping_leaves_short_gradients_alone():
    grads = [torch.tensor([0.3, 0.4]), torch.zeros(2, 2)]
    coefficient, norm = kernels.clip_coefficient(grads, 1.0)
    assert (float(coefficient), float(norm)) == (1.0, 0.5)
    assert grads[0].tolist() == pytest.approx([0.3, 0.4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": torch.ones(2)}, r"step must be one number, got shape \(2,\)"),
        ({"lr": torch.ones(1, device="meta")}, "lr must be on param's device cpu, got meta"),
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
    arguments |= {"step": number(1), "lr": number(0.1), **change}
    with pytest.raises(ValueError, match=message):
        kernels.adam_step(**arguments)
