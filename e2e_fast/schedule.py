"""What each optimizer step minimises, and at which learning rate.

A run is a row of phases, each with its loss; without ``schedule`` there is one. The cheap route to an end-to-end SAE is
local training with a short fine-tune on the KL (Karvonen 2025, arXiv 2503.17272)::

    schedule:
      - {until: 0.95, loss: local}
      - {loss: balanced, lr: 1e-4}        # without lr, the run's learning rate goes on

The share of the rate that step ``step`` uses, of a run or of a phase with its own ``lr``:

    cosine    step / warmup, then from 1 to ``min_lr_factor`` along half a cosine; the first update has rate 0
    linear    (step + 1) / warmup, then 1, then a line down over the cooldown, never below ``min_lr_factor``

>>> [round(_factor("cosine", step, warmup=2, total=6, cooldown=0, floor=0.0), 3) for step in range(6)]
[0.0, 0.5, 1.0, 0.854, 0.5, 0.146]
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from e2e_fast import losses
from e2e_fast.config import Config, PhaseConfig
from e2e_fast.losses import LossConfig


class Phase(NamedTuple):
    """A stretch of optimizer steps."""

    loss: LossConfig
    first: int
    """The optimizer step it begins with."""
    end: int | None
    """The optimizer step after its last; None where the data decides."""
    lr: float | None
    """Its own peak learning rate; None: the run's goes on."""
    warmup: int
    """Optimizer steps up to ``lr``."""


def phases(config: Config, at: Sequence[str], available: Sequence[str]) -> list[Phase]:
    """The phases of a run, their positions' names in full.

    ``at`` are the SAEs' positions, ``available`` the model's. Raises ValueError for positions that are not there.
    """
    rows = config.schedule or (PhaseConfig(loss=config.loss),)
    starts = config.phase_starts
    return [
        Phase(
            losses.with_full_names(
                losses.named(row.loss, config.loss, at, available) if isinstance(row.loss, str) else row.loss, available
            ),
            first,
            end,
            row.lr,
            row.warmup_samples // config.samples_per_step,
        )
        for row, first, end in zip(rows, starts, [*starts[1:], config.n_optimizer_steps], strict=True)
    ]


def learning_rate(config: Config, phase: Phase, step: int) -> float:
    """The learning rate of optimizer step ``step`` (from 0) of a run, which lies in ``phase``."""
    if phase.lr is None:
        return config.lr * lr_factor(config, step)
    length = None if phase.end is None else phase.end - phase.first
    factor = _factor(config.lr_schedule, step - phase.first, phase.warmup, length, 0, config.min_lr_factor)
    return phase.lr * factor


def lr_factor(config: Config, step: int) -> float:
    """Share of the run's ``lr`` that optimizer step ``step`` (from 0) uses."""
    per_step = config.samples_per_step
    warmup, cooldown = config.warmup_samples // per_step, config.cooldown_samples // per_step
    return _factor(config.lr_schedule, step, warmup, config.n_optimizer_steps, cooldown, config.min_lr_factor)


def _factor(
    kind: Literal["linear", "cosine"], step: int, warmup: int, total: int | None, cooldown: int, floor: float
) -> float:
    if kind == "cosine":
        assert total is not None  # Config requires n_samples for this schedule
        if step < warmup:
            return step / warmup
        progress = (step - warmup) / max(1, total - warmup)
        return max(floor, floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    if step < warmup:
        return (step + 1) / warmup
    if total is not None and cooldown and step >= total - cooldown:
        return max(floor, 1 - (step - (total - cooldown)) / cooldown)
    return 1.0
