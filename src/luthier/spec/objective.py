"""The `[objective]` table: what the loss rewards."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from luthier.spec.part import Part


class SftObjective(Part):
    """Imitate the answers: cross-entropy on the trained tokens."""

    kind: Literal["sft"] = "sft"
    """Supervised fine-tuning on conversations."""


class PretrainObjective(Part):
    """Go on pretraining on plain text, for domain adaptation."""

    kind: Literal["pretrain"]
    """Continued pretraining on packed plain text, every token trained."""


class DpoObjective(Part):
    """Prefer the chosen answer to the rejected one, measured against a reference."""

    kind: Literal["dpo"]
    """Direct preference optimisation on pairs."""
    beta: float = Field(0.1, gt=0)
    """How strongly the model is held to the reference."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """Shape of the loss over the margin."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed share of pairs whose labels are swapped."""
    length_normalised: bool = False
    """Divide each answer's log-probability by its length."""


class SimpoObjective(Part):
    """Preference optimisation without a reference, on length-normalised log-probabilities."""

    kind: Literal["simpo"]
    """SimPO on pairs."""
    beta: float = Field(2.0, gt=0)
    """Scale of the reward."""
    gamma: float = Field(1.0, ge=0)
    """Margin by which the chosen answer should win."""


class OrpoObjective(Part):
    """Imitation and preference in one loss, by the odds ratio."""

    kind: Literal["orpo"]
    """ORPO on pairs."""
    beta: float = Field(0.1, gt=0)
    """Weight of the preference beside the imitation."""


Objective = Annotated[
    SftObjective | PretrainObjective | DpoObjective | SimpoObjective | OrpoObjective,
    Field(discriminator="kind"),
]
