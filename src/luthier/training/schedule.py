"""The learning rate of each step: a warm-up, then cosine, linear or constant."""

from __future__ import annotations

import math

from luthier.spec.optim import Optim


def learning_rate(step: int, steps: int, optim: Optim) -> float:
    """The rate of step `step` (from 0) of `steps`; the first step already moves, and so does the last."""
    assert optim.learning_rate is not None
    warmup = optim.warmup_steps or 0
    if step < warmup:
        return optim.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    if optim.schedule == "linear":
        return optim.learning_rate * (1 - share)
    if optim.schedule == "cosine":
        return optim.learning_rate * (1 + math.cos(math.pi * share)) / 2
    return optim.learning_rate
