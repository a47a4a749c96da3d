"""The trainer's Adam: torch's own or our operator, with one state; and the copies it leaves for the next forward."""

import copy
from typing import Any

import pytest
import torch

import e2e_fast
from e2e_fast import checkpoint, files, kernels
from e2e_fast.optimizer import Adam
from e2e_fast.precision import arithmetic


def train(sae: e2e_fast.SAE, optimizer: Any, steps: int, start: int = 0) -> list[float]:
    """Reconstruction losses of some clipped steps with a schedule."""
    losses = []
    for t in range(start, start + steps):
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(t))
        loss = (sae(x).output - x).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.clip(0.5)
        optimizer.param_groups[0]["lr"] = 0.02 * 0.97**t
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


def make(own: bool | None) -> tuple[e2e_fast.SAE, Adam]:
    torch.manual_seed(0)
    sae = e2e_fast.SAE(16, 64, k=4)
    return sae, Adam(sae.parameters(), 0.02, sae.shadows.values(), own=own)


def test_our_operator_and_torchs_adam_train_alike() -> None:
    (a, ours), (b, theirs) = make(True), make(None)
    assert (ours.own, theirs.own) == (True, False)
    losses, expected = train(a, ours, 50), train(b, theirs, 50)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses[-1] < 0.7 * losses[0]
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_torchs_adam_is_used_as_it_is_on_a_cpu() -> None:
    (a, ours), (b, _) = make(None), make(None)
    plain = torch.optim.Adam(b.parameters(), lr=0.02, fused=True)
    plain.clip = lambda norm: torch.nn.utils.clip_grad_norm_(b.parameters(), norm)  # pyright: ignore
    assert train(a, ours, 5) == train(b, plain, 5)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("first", [True, False])
def test_a_run_goes_on_with_the_other_from_a_checkpoint(first: bool, tmp_path: Any) -> None:
    whole, optimizer = make(first)
    train(whole, optimizer, 20)
    half, optimizer = make(first)
    train(half, optimizer, 10)
    names = [name for name, _ in half.named_parameters()]
    path = checkpoint.save_resume(tmp_path, 10, optimizer, names, {}, {})
    saved = files.load_tensors(path)
    assert {key.rsplit(".", 1)[1] for key in saved} == {"step", "exp_avg", "exp_avg_sq"}
    other, optimizer = make(not first)
    other.load_state_dict(half.state_dict())
    checkpoint.load_resume(path, optimizer, names)
    train(other, optimizer, 10, start=10)
    assert all(float(state["step"]) == 20 for state in optimizer.state.values())
    for p, q in zip(other.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_the_copies_are_those_of_the_parameters_after_each_step() -> None:
    sae, optimizer = make(True)
    train(sae, optimizer, 3)
    for name, shadow in sae.shadows.items():
        parameter = getattr(sae, name)
        assert shadow.holds(parameter)
        assert shadow.rounded is not None
        assert torch.equal(shadow.rounded, parameter.bfloat16())
    norms = sae.shadows["W_dec"].inverse_norms
    assert norms is not None
    torch.testing.assert_close(norms, 1 / sae.W_dec.detach().norm(dim=-1))
    assert sae.shadows["W_enc"].inverse_norms is None


def outputs(sae: e2e_fast.SAE, x: torch.Tensor) -> list[torch.Tensor]:
    with arithmetic("bf16", "cpu"):
        output = sae(x).output
    return [output, *torch.autograd.grad(output.square().sum(), list(sae.parameters()))]


def test_a_forward_pass_with_the_copies_equals_one_without() -> None:
    sae, optimizer = make(True)
    train(sae, optimizer, 3)
    x = torch.randn(8, 16)
    with_copies = outputs(sae, x)
    for shadow in sae.shadows.values():
        shadow.forget()
    for a, b in zip(with_copies, outputs(sae, x), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
    # A copy that is not the parameter would be seen.
    train(sae, optimizer, 1, start=3)
    assert sae.shadows["W_dec"].rounded is not None
    sae.shadows["W_dec"].rounded.mul_(2)
    assert not torch.allclose(outputs(sae, x)[0], with_copies[0], rtol=0.1)


CHANGES: dict[str, Any] = {
    "in place": lambda sae: sae.W_dec.mul_(2),
    "by loading": lambda sae: sae.load_state_dict({name: 2 * t for name, t in sae.state_dict().items()}),
    "by another optimizer": lambda sae: torch.optim.SGD(sae.parameters(), lr=1.0).step(),
    "by new storage": lambda sae: setattr(sae.W_dec, "data", 2 * sae.W_dec.data),
    "by a new parameter": lambda sae: setattr(sae, "W_dec", torch.nn.Parameter(2 * sae.W_dec)),
}


@pytest.mark.parametrize("how", CHANGES)
def test_copies_are_not_used_once_a_parameter_changed(how: str) -> None:
    sae, optimizer = make(True)
    train(sae, optimizer, 2)
    x = torch.randn(8, 16)
    sae.W_dec.grad = torch.ones_like(sae.W_dec)
    with torch.no_grad():
        CHANGES[how](sae)
    assert not sae.shadows["W_dec"].holds(sae.W_dec)
    fresh = copy.deepcopy(sae)
    for shadow in fresh.shadows.values():
        shadow.forget()
    for a, b in zip(outputs(sae, x)[:1], outputs(fresh, x)[:1], strict=True):
        assert torch.equal(a, b)


def test_adam_says_what_it_does_not_do() -> None:
    sae, optimizer = make(True)
    with pytest.raises(ValueError, match="closure must be None"):
        optimizer.step(lambda: None)
    assert optimizer.clip(None) is None
    assert optimizer.clip(1.0) == 0  # no gradients yet
    kernels.decode(sae.encode_sparse(torch.randn(3, 16)), sae.W_dec).sum().backward()
    norm = optimizer.clip(1e-3)
    assert norm is not None
    assert float(norm) > 1e-3


def test_float64_parameters_keep_float64_norms() -> None:
    torch.manual_seed(0)
    sae = e2e_fast.SAE(4, 8, k=2).double()
    optimizer = Adam(sae.parameters(), 0.01, sae.shadows.values(), own=True)
    x = torch.randn(5, 4).double()
    (sae(x).output - x).square().sum().backward()
    optimizer.step()
    norms = sae.shadows["W_dec"].inverse_norms
    assert norms is not None
    torch.testing.assert_close(norms, 1 / sae.W_dec.detach().norm(dim=-1), rtol=1e-14, atol=0)


def test_hooks_run_once_a_step_whatever_other_optimizers_there_are():
    torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])  # torch then wraps torch.optim.Adam.step, which ours calls
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer, calls = Adam([parameter], lr=0.1), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert calls == ["before", "after"]
