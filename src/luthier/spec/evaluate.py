"""The `[evaluate]` table: when the held-out rows are measured and what follows from it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from luthier.spec.part import Part


class Evaluate(Part):
    """Evaluation while training, early stopping, and which weights are final."""

    every_steps: int = Field(0, ge=0)
    """Measure the held-out rows every N steps; 0 measures at the end only."""
    early_stop_patience: int | None = Field(None, ge=1)
    """Stop after this many evaluations without improvement."""
    min_improvement: float = Field(0.0, ge=0)
    """An evaluation counts as better only by more than this."""
    best_metric: Literal["loss", "perplexity", "token_accuracy"] = "loss"
    """The held-out metric that decides which checkpoint is best."""
    keep: Literal["best", "last"] = "last"
    """Which weights become the final ones."""
