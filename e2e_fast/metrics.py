"""What is measured of a batch beside its losses, under e2e_sae's key names.

    L_0, frac_zeros          active features per token; share of zero codes
    explained_variance       mean over tokens of 1 - ‖prediction - target‖² / ‖target - mean(target)‖²
    explained_variance_ln    the same after LayerNorm without affine weights
    *_ce_loss                next-token cross-entropy in nats; difference = original - spliced, negative when worse
    *_top1_accuracy          share of next tokens that are the likeliest
    orig_vs_sae_*            share of positions with equal argmax; total variation distance of the two distributions

Two definitions differ from e2e_sae's code, where they are defects: top-1 accuracy here compares with the *next* token,
and the explained variance of ``out_to_in`` divides by the variance of the input (there: of the reconstruction).

>>> import torch
>>> x = torch.randn(6, 4)
>>> explained_variance(x, x).mean().item()
1.0
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as nnf
from torch import Tensor

from e2e_fast.precision import as_given, exact

if TYPE_CHECKING:
    from e2e_fast.lm import Original, Spliced
    from e2e_fast.sae import SAEActs
    from e2e_fast.step import StepResult

CHUNK_BYTES = 256 * 2**20
"""Memory for the logits of one chunk of rows."""


def explained_variance(prediction: Tensor, target: Tensor, *, layer_norm: bool = False) -> Tensor:
    """(N,) one ratio a token: 1 - squared error / squared distance of the target from its mean over the batch.

    prediction, target [..., d]. The mean of the ratios, not the ratio of the means (as in e2e_sae).
    """
    prediction, target = prediction.flatten(0, -2).float(), target.flatten(0, -2).float()
    if layer_norm:
        prediction = nnf.layer_norm(prediction, prediction.shape[-1:])
        target = nnf.layer_norm(target, target.shape[-1:])
    error = (prediction - target).square().sum(-1)
    variance = (target - target.mean(0)).square().sum(-1)
    return 1 - error / variance


@torch.no_grad()
def step_metrics(result: "StepResult", split: str, tokens: Tensor) -> dict[str, Tensor]:
    """Every metric of one batch as a scalar tensor: losses, explained variance, sparsity and performance.

    ``split`` is "train" or "eval". tokens [B, T].
    """
    metrics = {f"loss/{split}/{name}": value for name, value in result.terms.items()}
    for name in result.terms:
        kind, _, position = name.partition("/")
        pair = _compared(kind, position, result)
        if pair is None:
            continue
        for suffix, layer_norm in (("", False), ("_ln", True)):
            ratios = explained_variance(*pair, layer_norm=layer_norm)
            metrics[f"loss/{split}/{kind}/explained_variance{suffix}/{position}"] = ratios.mean()
            metrics[f"loss/{split}/{kind}/explained_variance{suffix}_std/{position}"] = ratios.std()
    for position, act in result.acts.items():
        metrics.update(_sparsity(act, split, position))
    if result.spliced is not None:
        metrics.update(
            {f"performance/{split}/{k}": v for k, v in performance(result.original, result.spliced, tokens).items()}
        )
    return metrics


def _compared(kind: str, position: str, result: "StepResult") -> tuple[Tensor, Tensor] | None:
    """(prediction, target) of a reconstruction loss."""
    if kind == "out_to_in":
        return result.acts[position].output, result.acts[position].input
    if kind == "out_to_orig":
        return result.acts[position].output, result.original[position]
    if kind == "in_to_orig" and result.spliced is not None:
        return result.spliced[position], result.original[position]
    return None


def _sparsity(act: "SAEActs", split: str, position: str) -> dict[str, Tensor]:
    l0 = act.l0().float().mean()
    return {f"sparsity/{split}/L_0/{position}": l0, f"sparsity/{split}/frac_zeros/{position}": 1 - l0 / act.d_sae}


@torch.no_grad()
def performance(original: "Original", spliced: "Spliced", tokens: Tensor) -> dict[str, Tensor]:
    """Cross-entropy, accuracy and agreement of the two models' outputs, in chunks of rows: never N × V logits.

    tokens [B, T]; returns scalars under e2e_sae's names (without the "performance/{split}/" prefix).
    """
    unembed = original.lm.unembed.exact()
    hidden = exact(torch.stack([original.final, spliced.final]).flatten(1, 2))  # (2, N, D)
    following = torch.cat(
        [tokens[:, 1:], tokens.new_full((len(tokens), 1), -100)], dim=1
    ).flatten()  # -100: no next token
    rows = max(1, CHUNK_BYTES // (8 * unembed.weight.shape[0]))
    ce, correct, agree, distance = torch.zeros(2), torch.zeros(2), torch.zeros(()), torch.zeros(())
    ce, correct, agree, distance = (t.to(hidden.device) for t in (ce, correct, agree, distance))
    for start in range(0, hidden.shape[1], rows):
        chunk, targets = hidden[:, start : start + rows], following[start : start + rows]
        with as_given(chunk.device):  # autocast would round the logits
            log_p = unembed(chunk).float().log_softmax(-1)  # (2, rows, V)
        top = log_p.argmax(-1)
        for i in range(2):
            ce[i] += nnf.nll_loss(log_p[i], targets, ignore_index=-100, reduction="sum")
            correct[i] += (top[i] == targets).sum()
        agree += (top[0] == top[1]).sum()
        distance += 0.5 * (log_p[0].exp() - log_p[1].exp()).abs().sum()
    n, n_next = following.numel(), (following != -100).sum()
    ce, correct = ce / n_next, correct / n_next
    return {
        "orig_model_ce_loss": ce[0],
        "sae_model_ce_loss": ce[1],
        "difference_ce_loss": ce[0] - ce[1],
        "orig_model_top1_accuracy": correct[0],
        "sae_model_top1_accuracy": correct[1],
        "difference_top1_accuracy": correct[0] - correct[1],
        "orig_vs_sae_top1_consistency": agree / n,
        "orig_vs_sae_statistical_distance": distance / n,
    }


def _add_histogram(counts: Tensor, act: "SAEActs") -> None:
    """Adds to counts (d_sae,) on how many tokens each feature fires: in place, and no GPU is waited for."""
    fires = act.code.values.detach() > 0
    if act.is_dense:
        counts += fires.sum(0)
    else:  # an unused slot k adds 0 to feature k: all of them to one would queue up on a GPU, millions in a step
        slots = torch.arange(fires.shape[1], dtype=act.code.indices.dtype, device=fires.device)
        indices = torch.where(fires, act.code.indices, slots)
        counts.scatter_add_(0, indices.flatten().long(), fires.flatten().long())


class ActFrequency:
    """How often each feature fires, counted over a window of at least ``n_tokens`` tokens while training goes on.

    The counts stay on the device until they are asked for.
    """

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.tokens = 0
        self.counts: dict[str, Tensor] = {}

    def update(self, acts: "dict[str, SAEActs]") -> None:
        """Adds a batch."""
        for position, act in acts.items():
            if position not in self.counts:
                self.counts[position] = torch.zeros(act.d_sae, dtype=torch.int64, device=act.code.values.device)
            _add_histogram(self.counts[position], act)
        self.tokens += next(iter(acts.values())).input.shape[:-1].numel()

    @property
    def full(self) -> bool:
        """Whether the window is complete."""
        return self.tokens >= self.n_tokens

    def alive(self, position: str) -> Tensor:
        """Indices of the features that fired at least once."""
        return self.counts[position].nonzero().flatten()

    def frequency(self, position: str) -> Tensor:
        """(d_sae,) share of the tokens on which each feature fired."""
        return self.counts[position].double() / max(self.tokens, 1)

    def metrics(self, suffix: str = "") -> dict[str, float]:
        """``sparsity/alive_dict_elements{suffix}/{position}`` for every position."""
        return {f"sparsity/alive_dict_elements{suffix}/{p}": float(len(self.alive(p))) for p in self.counts}
