"""The CPU operators against plain torch: correctness first, then the ratio of alternate runs.

A whole autoencoder step without optimizer at GPT-2's width (N = 1,024, D = 768, F = 46,080), and the KL head with
GPT-2's vocabulary. The dense baselines are what libraries do: five matrix products and a normalised copy of W_dec.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from e2e_fast import kernels

N, D, F, K = 1024, 768, 46080, 32
ROUNDS = 5


@pytest.fixture(scope="module")
def autoencoder() -> list[Tensor]:
    """x, W_enc, b_enc, W_dec, b_dec."""
    torch.manual_seed(0)
    parameters = [torch.randn(F, D) / D**0.5, torch.zeros(F), torch.randn(F, D), torch.zeros(D)]
    return [torch.randn(N, D), *(p.requires_grad_() for p in parameters)]


def step(x_hat: Tensor, values: Tensor, x: Tensor, parameters: list[Tensor]) -> tuple[Tensor, ...]:
    """All gradients of MSE plus a little sparsity."""
    loss = (x_hat - x).square().mean() + 1e-3 * values.sum() / N
    return torch.autograd.grad(loss, parameters)


def dense_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> tuple[Tensor, ...]:
    values, indices = torch.topk(nnf.linear(x, W_enc, b_enc), K, dim=-1)
    values = values.relu()
    code = torch.zeros(N, F).scatter(1, indices, values)
    return step(code @ nnf.normalize(W_dec, dim=-1) + b_dec, values, x, [W_enc, b_enc, W_dec, b_dec])


def gathered_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> tuple[Tensor, ...]:
    """Dense encoder; decoder by embedding_bag; its encoder gradient by index_add, as sparse libraries do."""
    with torch.no_grad():
        top, indices = torch.topk(nnf.linear(x, W_enc, b_enc), K, dim=-1)
    values = top.relu().requires_grad_()
    unit = nnf.normalize(W_dec, dim=-1)
    x_hat = nnf.embedding_bag(indices, unit, per_sample_weights=values, mode="sum") + b_dec
    dvalues, dW_dec, db_dec = step(x_hat, values, x, [values, W_dec, b_dec])
    dz = dvalues * (values > 0)
    flat = indices.flatten()
    dW_enc = torch.zeros(F, D).index_add_(0, flat, (dz[..., None] * x[:, None, :]).view(-1, D))
    db_enc = torch.zeros(F).index_add_(0, flat, dz.flatten())
    return dW_enc, db_enc, dW_dec, db_dec


def fused_topk(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    x_hat, code = kernels.autoencode(x, *parameters, k=K)
    return step(x_hat, code.values, x, list(parameters))


def dense_relu(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> tuple[Tensor, ...]:
    code = torch.relu(nnf.linear(x, W_enc, b_enc))
    return step(code @ nnf.normalize(W_dec, dim=-1) + b_dec, code, x, [W_enc, b_enc, W_dec, b_dec])


def fused_relu(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    x_hat, code = kernels.autoencode(x, *parameters)
    return step(x_hat, code.values, x, list(parameters))


BANDWIDTH = 0.02


class DenseJump(torch.autograd.Function):
    """z [z > θ] and [z > θ], with the rectangle's straight-through gradients, as the JumpReLU paper writes them."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        active = (z > threshold).to(z.dtype)
        ctx.save_for_backward(z, threshold, active)
        return z * active, active

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        z, threshold, active = ctx.saved_tensors
        dc, dactive = gradients
        rectangle = ((z - threshold).abs() < BANDWIDTH / 2).to(z.dtype)
        return dc * active, (rectangle * (threshold * dc + dactive)).sum(0) / -BANDWIDTH


def jump_gradients(x_hat: Tensor, l0: Tensor, x: Tensor, parameters: list[Tensor]) -> tuple[Tensor, ...]:
    """All gradients of MSE plus a little L0."""
    return torch.autograd.grad((x_hat - x).square().mean() + 1e-3 * l0.mean(), parameters)


def dense_jump(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    W_enc, b_enc, W_dec, b_dec, threshold = parameters
    code, active = DenseJump.apply(nnf.linear(x, W_enc, b_enc), threshold)
    x_hat = code @ nnf.normalize(W_dec, dim=-1) + b_dec
    return jump_gradients(x_hat, active.sum(-1), x, list(parameters))


def fused_jump(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    *weights, threshold = parameters
    x_hat, code = kernels.autoencode(x, *weights, threshold=threshold, bandwidth=BANDWIDTH)
    assert isinstance(code, kernels.JumpCode)
    return jump_gradients(x_hat, code.l0, x, list(parameters))


def assert_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], tolerance: float = 1e-5) -> None:
    for a, b in zip(ours, theirs, strict=True):
        error, size = (float(t.detach().norm()) for t in (a - b, b))
        assert error <= tolerance * size


@pytest.mark.parametrize("baseline", [dense_topk, gathered_topk], ids=["dense torch", "gathering torch"])
def test_topk_step(duel: Callable[..., Any], autoencoder: list[Tensor], baseline: Callable[..., Any]) -> None:
    assert_same(fused_topk(*autoencoder), baseline(*autoencoder))
    duel(
        f"TopK step, k = {K}, against {baseline.__name__}",
        lambda: fused_topk(*autoencoder),
        lambda: baseline(*autoencoder),
        rounds=ROUNDS,
    )


def score_of(l0: int, x: Tensor, W_enc: Tensor) -> Tensor:
    """The score that ``l0`` features of a token exceed."""
    with torch.no_grad():
        sample = nnf.linear(x[:32], W_enc).flatten()
        return sample.kthvalue(sample.numel() - 32 * l0).values


L0 = 50
# Of 47 million scores a few lie within rounding of their threshold and may fall on either side; each moves the
# encoder's gradients by one part in √(active entries), and a threshold's by one in √(entries of the band).
CROSSING = 1e-5 + 4 / (N * L0) ** 0.5


def test_relu_step(duel: Callable[..., Any], autoencoder: list[Tensor]) -> None:
    x, W_enc, b_enc, W_dec, b_dec = autoencoder
    shifted = (b_enc.detach() - score_of(L0, x, W_enc)).requires_grad_()
    arguments = (x, W_enc, shifted, W_dec, b_dec)
    _, code = kernels.autoencode(*arguments)
    assert 0.8 * L0 < float(code.count.float().mean()) < 1.2 * L0
    assert_same(fused_relu(*arguments), dense_relu(*arguments), CROSSING)
    duel(
        f"ReLU step at L0 {L0}, against dense torch",
        lambda: fused_relu(*arguments),
        lambda: dense_relu(*arguments),
        rounds=ROUNDS,
    )


def test_jump_relu_step(duel: Callable[..., Any], autoencoder: list[Tensor]) -> None:
    x, W_enc, *rest = autoencoder
    threshold = torch.full((F,), float(score_of(L0, x, W_enc)), requires_grad=True)
    arguments = (x, W_enc, *rest, threshold)
    ours, theirs = fused_jump(*arguments), dense_jump(*arguments)
    assert_same(ours[:-1], theirs[:-1], CROSSING)
    band = kernels.encode_jump_relu(x, W_enc, rest[0], threshold, BANDWIDTH).band
    assert_same(ours[-1:], theirs[-1:], 4 / float(band.sum()) ** 0.5)
    duel(
        f"JumpReLU step at L0 {L0}, against dense torch",
        lambda: fused_jump(*arguments),
        lambda: dense_jump(*arguments),
        rounds=ROUNDS,
    )


@pytest.mark.parametrize("width", [64, 768])
def test_linear_kl(duel: Callable[..., Any], width: int) -> None:
    torch.manual_seed(0)
    tokens, vocabulary = 2048, 50257
    weight = 3 * torch.randn(vocabulary, width) / width**0.5
    teacher = torch.randn(tokens, width)
    student = (teacher + 0.1 * torch.randn(tokens, width)).requires_grad_()

    def eager() -> tuple[Tensor, ...]:
        log_s = nnf.log_softmax(student @ weight.t(), dim=-1)
        with torch.no_grad():
            log_t = nnf.log_softmax(teacher @ weight.t(), dim=-1)
        loss = nnf.kl_div(log_s, log_t, log_target=True, reduction="batchmean")
        return loss, *torch.autograd.grad(loss, student)

    def fused() -> tuple[Tensor, ...]:
        loss = kernels.linear_kl(student, teacher, weight)
        return loss, *torch.autograd.grad(loss, student)

    assert_same(fused(), eager(), 1e-4)  # in float32 the two gradients differ by 1.6e-5 at D = 768
    result = duel(f"linear_kl with gradient, D = {width}, V = 50,257", fused, eager, ROUNDS)
    assert result.memory < 1 / 8
