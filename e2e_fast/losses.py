"""The losses of local, e2e and e2e+downstream training, as data.

With N tokens, d the width of the SAE's input, a_i the activation at position i and x̂ the SAE's output:

    sparsity      mean_N ‖c‖_p / d                                  every kind
    out_to_in     mean_{N,d} (x̂ - x)²                               local: reconstruct the input
    out_to_orig   mean_{N,d} (x̂ - x_original)²                      differs from out_to_in behind another SAE
    in_to_orig    Σ_i mean_{N,d} (a_i - a_i,original)² / |i|        downstream: later layers stay as they were
    logits_kl     mean_N KL(p_original ‖ p_spliced), in nats        e2e: the output stays as it was

The total is the sum of coefficient × loss. A *balanced* loss keeps the KL on the scale of the MSE, so that the learning
rate and sparsity coefficient of a local run stay right when it goes on with the KL (Karvonen 2025, arXiv 2503.17272):

    balanced      ½ (MSE + stopgrad(MSE / KL) · KL), with MSE = Σ out_to_in over the SAEs

Keys, defaults and formulas are those of e2e_sae (Braun et al. 2024), whose
code computes KL(original ‖ spliced) although its docstring names the other direction.

>>> e2e(sparsity=1.5).kind
'e2e'
>>> local(sparsity=4.0).out_to_in.coeff
1.0
"""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, Self, get_args

import torch
import torch.nn.functional as nnf
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeFloat, model_validator
from torch import Tensor

from e2e_fast.measure import Timings
from e2e_fast.positions import resolve_positions
from e2e_fast.precision import exact

if TYPE_CHECKING:
    from e2e_fast.lm import Original, Spliced
    from e2e_fast.sae import SAEActs

Positions = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)
]
"""One position or a list of them: TransformerLens names, or parts of names that match several."""


LossName = Literal["local", "e2e", "e2e+downstream", "balanced", "balanced+downstream"]
"""The kinds of loss: the paper's three families, and the balanced one of a fine-tune."""

KL_FLOOR = 1e-8
"""nats; added to the KL that a balanced loss divides by."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SparsityLoss(_Frozen):
    """‖c‖_p of the codes, divided by the width of the SAE's input."""

    coeff: NonNegativeFloat
    p_norm: Annotated[NonNegativeFloat, Field(allow_inf_nan=True)] = 1.0
    """0: the L0, which JumpReLU alone can train on. [ours] ``.inf``: the largest code."""


class InToOrigLoss(_Frozen):
    """MSE of later activations; the coefficient is split evenly over the positions."""

    total_coeff: NonNegativeFloat
    hook_positions: Positions = Field(min_length=1)


class WeightedLoss(_Frozen):
    """A loss with nothing but a coefficient. 0 logs it without training on it."""

    coeff: NonNegativeFloat


class LossConfig(_Frozen):
    """What is minimised. All five keys must be given; None leaves a loss out."""

    sparsity: SparsityLoss
    in_to_orig: InToOrigLoss | None = Field()
    out_to_orig: WeightedLoss | None = Field()
    out_to_in: WeightedLoss | None = Field()
    logits_kl: WeightedLoss | None = Field()
    balanced: bool = False
    """Halve ``out_to_in`` and ``logits_kl`` and scale the KL to the size of the MSE, step by step. [ours]"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("out_to_in", "logits_kl"):
            term = getattr(self, name)
            if self.balanced and (term is None or term.coeff == 0):
                raise ValueError(f"balanced needs {name} with a coeff above 0, got {term and term.coeff}")
        return self

    @property
    def is_local(self) -> bool:
        """Whether the loss can be computed without running the LM behind the SAE."""
        return self.logits_kl is None and self.in_to_orig is None

    @property
    def kind(self) -> LossName:
        """Which of the paper's three families this is, or whether it is balanced."""
        if self.is_local:
            return "local"
        if self.in_to_orig is None:
            return "balanced" if self.balanced else "e2e"
        return "balanced+downstream" if self.balanced else "e2e+downstream"

    @property
    def downstream(self) -> tuple[str, ...]:
        """Positions whose activations are compared with the original ones."""
        return self.in_to_orig.hook_positions if self.in_to_orig else ()


def local(sparsity: float, p_norm: float = 1.0) -> LossConfig:
    """Reconstruction: MSE between input and output, plus sparsity."""
    return LossConfig(
        sparsity=SparsityLoss(coeff=sparsity, p_norm=p_norm),
        in_to_orig=None,
        out_to_orig=None,
        out_to_in=WeightedLoss(coeff=1.0),
        logits_kl=None,
    )


def e2e(sparsity: float, p_norm: float = 1.0, kl: float = 1.0) -> LossConfig:
    """End-to-end: KL of the output, plus sparsity; the reconstruction error is logged, not minimised."""
    return LossConfig(
        sparsity=SparsityLoss(coeff=sparsity, p_norm=p_norm),
        in_to_orig=None,
        out_to_orig=None,
        out_to_in=WeightedLoss(coeff=0.0),
        logits_kl=WeightedLoss(coeff=kl),
    )


def e2e_downstream(
    sparsity: float, positions: Positions, p_norm: float = 1.0, kl: float = 0.5, total_coeff: float = 2.5
) -> LossConfig:
    """End-to-end plus the MSE of later activations. The defaults are the paper's for layers 2 and 6 of GPT-2 small."""
    return e2e(sparsity, p_norm, kl).model_copy(
        update={"in_to_orig": InToOrigLoss(total_coeff=total_coeff, hook_positions=positions)}
    )


def balanced(sparsity: float, p_norm: float = 1.0, in_to_orig: InToOrigLoss | None = None) -> LossConfig:
    """MSE and KL in equal shares: ½ (MSE + stopgrad(MSE / KL) · KL), plus sparsity and, if given, later MSEs."""
    return LossConfig(
        sparsity=SparsityLoss(coeff=sparsity, p_norm=p_norm),
        in_to_orig=in_to_orig,
        out_to_orig=None,
        out_to_in=WeightedLoss(coeff=1.0),
        logits_kl=WeightedLoss(coeff=1.0),
        balanced=True,
    )


def named(name: str, base: LossConfig, at: Sequence[str], available: Sequence[str]) -> LossConfig:
    """The loss of a kind, with the sparsity term of ``base`` and, where the kind has one, its downstream positions.

    Without such positions every later ``hook_resid_pre`` is taken, in the last block its ``hook_resid_post``; ``at``
    are the SAEs' positions, ``available`` the model's, in its order. "balanced+downstream" keeps base's ``total_coeff``
    (0.5, the share of the MSE, without one).
    Raises ValueError for an unknown name and where nothing lies behind the SAEs.
    """
    if name not in get_args(LossName):
        raise ValueError(f"loss must be one of {', '.join(get_args(LossName))}, got {name!r}")
    sparsity = (base.sparsity.coeff, base.sparsity.p_norm)
    if name in ("local", "e2e", "balanced"):
        return {"local": local, "e2e": e2e, "balanced": balanced}[name](*sparsity)
    positions = base.downstream
    if not positions:
        first = min(available.index(position) for position in at)
        behind = available[first + 1 :]
        positions = tuple(p for p in behind if p.endswith("hook_resid_pre"))
        positions = positions or tuple(p for p in behind if p.endswith("hook_resid_post"))
    if not positions:
        raise ValueError(f"{name} needs a residual stream behind the SAE; there is none in this model")
    if name == "e2e+downstream":
        return e2e_downstream(sparsity[0], positions, sparsity[1])
    return balanced(*sparsity, base.in_to_orig or InToOrigLoss(total_coeff=0.5, hook_positions=positions))


def with_full_names(loss: LossConfig, available: Sequence[str]) -> LossConfig:
    """The loss with its downstream positions' names in full, in the network's order.

    Raises ValueError for one that is not ``available``.
    """
    if loss.in_to_orig is None:
        return loss
    names = tuple(resolve_positions(loss.in_to_orig.hook_positions, available))
    return loss.model_copy(update={"in_to_orig": loss.in_to_orig.model_copy(update={"hook_positions": names})})


def compute_loss(
    config: LossConfig,
    acts: Mapping[str, "SAEActs"],
    original: "Original",
    spliced: "Spliced | None",
    kl_rows: Tensor | None = None,
    timings: Timings | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted total (a scalar) and every single loss, unweighted, under e2e_sae's key ("sparsity/{position}").

    ``spliced`` is None in local training. A loss with coefficient 0 is logged and not trained on. ``kl_rows`` [n] are
    the flattened tokens whose KL is averaged; None takes all. ``timings`` receives the seconds of the KL.
    """
    timings = timings or Timings(enabled=False)
    terms: dict[str, Tensor] = {}
    used: list[Tensor] = []

    def add(name: str, coeff: float, value: Tensor, scale: "Tensor | float" = 1.0) -> None:
        terms[name] = value.detach()
        if coeff:
            used.append(coeff * scale * value)

    half = 0.5 if config.balanced else 1.0
    for position, act in acts.items():
        norms = act.norm(config.sparsity.p_norm)
        sparsity = norms.sum() / (norms.numel() * act.input.shape[-1])
        add(f"sparsity/{position}", config.sparsity.coeff, sparsity)
        if config.out_to_in is not None:
            error = nnf.mse_loss(exact(act.input), exact(act.output))
            add(f"out_to_in/{position}", half * config.out_to_in.coeff, error)
        if config.out_to_orig is not None:
            error = nnf.mse_loss(exact(act.output), exact(original[position]))
            add(f"out_to_orig/{position}", config.out_to_orig.coeff, error)
    if spliced is not None:
        if config.in_to_orig is not None:
            share = config.in_to_orig.total_coeff / len(config.in_to_orig.hook_positions)
            for position in config.in_to_orig.hook_positions:
                add(f"in_to_orig/{position}", share, spliced.mse(position))
        if config.logits_kl is not None:
            wanted = torch.is_grad_enabled() and config.logits_kl.coeff > 0
            with timings.phase("KL"), torch.set_grad_enabled(wanted):
                kl = spliced.kl(kl_rows)
            scale: Tensor | float = 1.0
            if config.balanced:
                scale = sum(terms[f"out_to_in/{position}"] for position in acts) / (kl.detach() + KL_FLOOR)
            add("logits_kl", half * config.logits_kl.coeff, kl, scale)

    total = functools.reduce(operator.add, used) if used else next(iter(terms.values())) * 0
    return total, terms
