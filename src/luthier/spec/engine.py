"""The `[engine]` table: the thing that trains."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from luthier.spec.part import Part


class Engine(Part):
    """Which engine executes the run; the result means the same on each."""

    kind: Literal["torch", "trl", "mlx", "tinker"] = "torch"
    """The engine's name."""
    model: str | None = Field(None, min_length=1)
    """Name of the base on a Tinker service, where it is another than `model.base`; of engine `tinker` alone."""
