"""The `[output]` table: where the run folder goes and what is kept in it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from luthier.spec.part import Part


class Output(Part):
    """Where results go and how often state is saved."""

    dir: str | None = None
    """Folder in which the run folder is made; when absent, `runs` in the working directory."""
    save_every_steps: int = Field(0, ge=0)
    """Save a checkpoint every N steps; 0 saves at the end only."""
    keep_checkpoints: int | None = Field(None, ge=1)
    """Keep the weights of only the newest N checkpoints; when absent every one is kept for adapters."""
    merge: bool = False
    """Merge the adapter into the base at the end."""
    sinks: list[Literal["tensorboard", "wandb"]] = []
    """Where losses and metrics go besides the run folder; W&B stays offline unless its own variables say otherwise."""
    wandb_project: str | None = Field(None, min_length=1)
    """Project of W&B that the run belongs to; when absent, WANDB_PROJECT, else `luthier`."""
    model_id_file: str | None = None
    """File that receives the `ft:` id of the result."""
