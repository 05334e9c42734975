"""The `[optim]` table: how far, how fast and with how many examples a step."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from luthier.spec.part import Part

DEFAULT_RATES = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4}
"""The learning rate of each method where none is given."""
PAIRS_RATE_SHARE = 0.1
"""Of that, what an objective over pairs takes."""


class Optim(Part):
    """The optimizer, its schedule and the size of a step."""

    kind: Literal["adamw", "adam", "adamw_8bit", "adafactor"] = "adamw"
    """The optimizer."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate; when absent it follows the method."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_ratio: float | None = Field(None, ge=0, le=1)
    """Share of the steps spent warming up; 0.03 when neither this nor `warmup_steps` is given."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps spent warming up, instead of a share."""
    weight_decay: float = Field(0.0, ge=0)
    """Pull of every trained weight towards zero."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    max_skipped_steps: int = Field(0, ge=0)
    """Steps with a non-finite loss or gradient that may be skipped before the run stops."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the training rows; `steps` wins when it is given."""
    steps: int = Field(0, ge=0)
    """Optimizer steps; 0 means that `epochs` decides."""
    batch: int = Field(16, ge=1)
    """Examples in one optimizer step; a preference pair counts as one."""
    micro_batch: int | None = Field(None, ge=1)
    """Examples computed at once; when absent it follows from memory. It never changes the result."""
