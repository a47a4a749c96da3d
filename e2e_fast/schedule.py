"""The learning rate of each optimizer step.

    cosine    step / warmup, then from 1 to ``min_lr_factor`` along half a cosine; the first update has rate 0
    linear    (step + 1) / warmup, then 1, then a line down over the cooldown, never below ``min_lr_factor``

Counts of samples in the configuration become optimizer steps of ``effective_batch_size`` sequences.

>>> [round(_factor("cosine", step, warmup=2, total=6, cooldown=0, floor=0.0), 3) for step in range(6)]
[0.0, 0.5, 1.0, 0.854, 0.5, 0.146]
"""

import math
from typing import Literal

from e2e_fast.config import Config


def lr_factor(config: Config, step: int) -> float:
    """Share of ``lr`` that optimizer step ``step`` (from 0) of a run uses."""
    per_step = config.effective_batch_size or config.batch_size
    total = config.n_samples // per_step if config.n_samples else None
    warmup, cooldown = config.warmup_samples // per_step, config.cooldown_samples // per_step
    return _factor(config.lr_schedule, step, warmup, total, cooldown, config.min_lr_factor)


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
