"""The baseline: end-to-end and local training as one would write them first, and as e2e_sae does.

The whole model runs twice from the tokens, both times to full logits; the KL is ``F.kl_div`` of two log-softmaxes; the
SAE is dense, with a normalised copy of its decoder in the graph. Attention is the same as ours (SDPA), so that the
comparison is of the training step and not of the attention.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn


class DenseSAE(nn.Module):
    """relu(x W_encᵀ + b_enc), times the normalised decoder."""

    def __init__(self, d_in: int, d_sae: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(d_in, d_sae)
        self.decoder = nn.Linear(d_sae, d_in)
        nn.init.orthogonal_(self.decoder.weight.detach().T)

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(self.encoder(x))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c = self.encode(x)
        return nnf.linear(c, nnf.normalize(self.decoder.weight, dim=0), self.decoder.bias), c


def _block_input(model: Any, layer: int, replace: Any) -> Any:
    """A hook on the input of block ``layer``: keeps it, or puts ``replace(x)`` in its place."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        x = replace(args[0] if args else kwargs["hidden_states"])
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    return blocks[layer].register_forward_pre_hook(hook, with_kwargs=True)


def e2e_step(
    model: Any,
    sae: DenseSAE,
    tokens: Tensor,
    layer: int,
    sparsity: float,
    kl: float = 1.0,
    downstream: Mapping[int, float] | None = None,
) -> Tensor:
    """Forward and backward of KL + L1 / d; gradients are added to the SAE's parameters.

    ``downstream`` gives the coefficients of the MSE at the inputs of later blocks.
    """
    keep = downstream is not None
    with torch.no_grad():
        original = model(tokens, output_hidden_states=keep)
        target = original.logits.log_softmax(-1)
    codes: list[Tensor] = []

    def insert(x: Tensor) -> Tensor:
        x_hat, c = sae(x)
        codes.append(c)
        return x_hat

    handle = _block_input(model, layer, insert)
    try:
        spliced = model(tokens, output_hidden_states=keep)
        prediction = spliced.logits.log_softmax(-1)
    finally:
        handle.remove()
    divergence = nnf.kl_div(prediction.flatten(0, 1), target.flatten(0, 1), log_target=True, reduction="batchmean")
    loss = kl * divergence + sparsity * codes[0].norm(p=1, dim=-1).mean() / sae.encoder.in_features
    for later, coeff in (downstream or {}).items():
        loss = loss + coeff * nnf.mse_loss(spliced.hidden_states[later], original.hidden_states[later])
    loss.backward()
    return loss.detach()


class _Stop(Exception):
    pass


@torch.no_grad()
def _activation(model: Any, tokens: Tensor, layer: int) -> Tensor:
    """The input of block ``layer``; the reference runs that block too, to see its hooks fire, and stops there."""
    seen: list[Tensor] = []

    def stop(x: Tensor) -> Tensor:
        raise _Stop

    handles = [_block_input(model, layer, lambda x: (seen.append(x), x)[1]), _block_input(model, layer + 1, stop)]
    try:
        model(tokens)
    except _Stop:
        return seen[0]
    finally:
        for handle in handles:
            handle.remove()
    raise ValueError(f"layer must be below the last block's, got {layer}")


def local_step(model: Any, sae: DenseSAE, tokens: Tensor, layer: int, sparsity: float) -> Tensor:
    """Forward and backward of MSE + L1 / d; the model stops behind block ``layer``, as the reference does."""
    x = _activation(model, tokens, layer)
    x_hat, c = sae(x)
    loss = nnf.mse_loss(x_hat, x) + sparsity * c.norm(p=1, dim=-1).mean() / sae.encoder.in_features
    loss.backward()
    return loss.detach()
