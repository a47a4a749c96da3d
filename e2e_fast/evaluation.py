"""How well SAEs preserve a language model: losses, sparsity, downstream reconstruction and cross-entropy.

As in e2e_sae's evaluation, KL and the MSE at later residual streams are measured even where they are not trained on;
means over batches are weighted by their tokens.

>>> from e2e_fast import SAETransformer, evaluate, embedded                                  # doctest: +SKIP
>>> model = SAETransformer.from_local_path("out/my_run")                                     # doctest: +SKIP
>>> evaluate(model, embedded.tokens("heldout", n_ctx=128))["performance/eval/difference_ce_loss"]  # doctest: +SKIP
-0.021
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from e2e_fast import losses
from e2e_fast.losses import InToOrigLoss, LossConfig, WeightedLoss
from e2e_fast.metrics import ActFrequency, step_metrics
from e2e_fast.sources import token_array
from e2e_fast.step import forward_step, original_pass

if TYPE_CHECKING:
    from e2e_fast.lm import LM
    from e2e_fast.sae import SAE
    from e2e_fast.sae_transformer import SAETransformer


def evaluate(
    model: "SAETransformer",
    tokens: "Tensor | np.ndarray | Iterable[Tensor]",
    *,
    loss: LossConfig | None = None,
    batch_size: int = 8,
) -> dict[str, float]:
    """Metrics under e2e_sae's key names (``performance/eval/difference_ce_loss``, ``sparsity/eval/L_0/…``, …).

    tokens: [samples, T], or an iterable of [B, T] batches. ``loss`` is the training loss, whose other terms are then
    reported too. Raises ValueError when there is no batch, and for what is no SAETransformer or no token ids.
    """
    if not hasattr(model, "by_position"):
        raise ValueError(
            f"model must be an SAETransformer, such as run.model or SAETransformer.from_local_path(folder), got a "
            f"{type(model).__name__}"
        )
    loss = losses.with_full_names(loss or losses.e2e(sparsity=0.0), model.lm.positions())
    loss = evaluation_loss(loss, model.lm, list(model.by_position))
    return evaluate_together(model.lm, [(model.by_position, loss)], batches_of(tokens, batch_size))[0]


def evaluation_loss(loss: LossConfig, lm: "LM", positions: list[str]) -> LossConfig:
    """The loss with KL and the MSE at every later ``hook_resid_post`` added at coefficient 0 where they are missing."""
    later = [p for p in lm.positions() if p.endswith("hook_resid_post")]
    first = lm.positions().index(positions[0])
    later = tuple(p for p in later if lm.positions().index(p) > first)
    added: dict[str, Any] = {}
    if loss.logits_kl is None:
        added["logits_kl"] = WeightedLoss(coeff=0.0)
    if loss.in_to_orig is None and later:
        added["in_to_orig"] = InToOrigLoss(total_coeff=0.0, hook_positions=later)
    return loss.model_copy(update=added)


@torch.no_grad()
def evaluate_together(
    lm: "LM", members: "Sequence[tuple[Mapping[str, SAE], LossConfig]]", batches: Iterable[Tensor]
) -> list[dict[str, float]]:
    """`evaluate` of several sets of SAEs, each with its loss, on one original pass a batch.

    The losses name their positions in full. Raises ValueError when there is no batch.
    """
    sums: list[dict[str, Tensor]] = [{} for _ in members]
    n_tokens = 0
    for tokens in batches:
        tokens = tokens.to(lm.device, non_blocking=True)
        original = original_pass(lm, members, tokens)
        for total, (saes, loss) in zip(sums, members, strict=True):
            result = forward_step(lm, saes, loss, tokens, original=original)
            for key, value in step_metrics(result, "eval", tokens).items():
                weighted = value.double() * tokens.numel()
                total[key] = total[key] + weighted if key in total else weighted
        n_tokens += tokens.numel()
    if not n_tokens:
        raise ValueError("evaluation needs at least one batch of tokens, got none")
    return [{key: float(value / n_tokens) for key, value in total.items()} for total in sums]


@torch.no_grad()
def count_together(
    lm: "LM", members: "Sequence[tuple[Mapping[str, SAE], LossConfig]]", batches: Iterable[Tensor], n_tokens: int
) -> list[ActFrequency]:
    """How often the features of several sets of SAEs fire on the first ``n_tokens`` tokens, on one pass a batch."""
    # What a single SAE sees does not depend on it, so the suffix need not run.
    wanted = [(saes, losses.local(0.0) if len(saes) == 1 else loss) for saes, loss in members]
    frequencies = [ActFrequency(n_tokens) for _ in wanted]
    for tokens in batches:
        tokens = tokens.to(lm.device, non_blocking=True)
        original = original_pass(lm, wanted, tokens)
        for frequency, (saes, loss) in zip(frequencies, wanted, strict=True):
            frequency.update(forward_step(lm, saes, loss, tokens, original=original).acts)
        if all(frequency.full for frequency in frequencies):
            break
    return frequencies


def batches_of(tokens: "Tensor | np.ndarray | Iterable[Tensor]", batch_size: int) -> Iterable[Tensor]:
    """Consecutive [batch_size, T] rows of an array (the last batch may be smaller), or the iterable itself."""
    if isinstance(tokens, (np.ndarray, Tensor)):
        ids = token_array(tokens)
        return (torch.from_numpy(ids[i : i + batch_size].astype(np.int64)) for i in range(0, len(ids), batch_size))
    return map(_as_batch, tokens)


def _as_batch(tokens: Any) -> Tensor:
    if not isinstance(tokens, Tensor):
        raise ValueError(f"tokens must be an array [samples, T] or batches of tensors, got a {type(tokens).__name__}")
    return tokens
