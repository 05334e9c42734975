"""What each objective makes of a micro-batch: its loss, its unit, and what the loss is divided by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from luthier.engines.verbs import Batch, Floats, Loss, LossResult
from luthier.spec.objective import DpoObjective, Objective, OrpoObjective, SimpoObjective
from luthier.training import losses
from luthier.training.batches import Item

References = Callable[[Item], Floats]
"""The reference model's log-probabilities of an item's trained tokens."""


REWARDS = ("reward_accuracy", "reward_chosen", "reward_margin", "reward_rejected")
"""What the losses over pairs report beside their value."""


def is_paired(objective: Objective) -> bool:
    """Whether its examples are pairs."""
    return isinstance(objective, DpoObjective | SimpoObjective | OrpoObjective)


def metric_names(objective: Objective) -> tuple[str, ...]:
    """What its loss reports, in one order, also where a process has no example of a step."""
    return REWARDS if is_paired(objective) else ()


def count_units(objective: Objective, items: Sequence[Item]) -> int:
    """What a step's loss is divided by: pairs for preferences, trained tokens for the rest."""
    return len(items) if is_paired(objective) else sum(item.trained_tokens for item in items)


def build_loss(
    objective: Objective, items: Sequence[Item], batch: Batch, *, scale: float, references: References | None
) -> Loss:
    """The loss of a micro-batch."""
    if isinstance(objective, DpoObjective):
        assert references is not None
        reference = np.concatenate([references(item) for item in items])
        return Loss(lambda p: _dpo(objective, p, batch, reference), scale)
    if isinstance(objective, SimpoObjective):
        return Loss(lambda p: losses.simpo(p, batch.offsets, beta=objective.beta, gamma=objective.gamma), scale)
    if isinstance(objective, OrpoObjective):
        return Loss(lambda p: losses.orpo(p, batch.offsets, beta=objective.beta), scale)
    return Loss(losses.cross_entropy, scale, weights=np.ones(len(batch.targets)))


def _dpo(objective: DpoObjective, logprobs: Floats, batch: Batch, reference: Floats) -> LossResult:
    return losses.dpo(
        logprobs,
        batch.offsets,
        reference,
        beta=objective.beta,
        loss=objective.loss,
        label_smoothing=objective.label_smoothing,
        length_normalised=objective.length_normalised,
    )
