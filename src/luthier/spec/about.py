"""The `[about]` table: the promise of a recipe we ship, measured."""

from __future__ import annotations

from luthier.spec.part import Part


class About(Part):
    """What a recipe is for and what it promises; nothing in it changes the run."""

    title: str = ""
    """One line that says what the run makes."""
    command: str = ""
    """The exact command that runs it."""
    hardware: str = ""
    """The machine on which the promise was measured."""
    minutes: float | None = None
    """How long it took there."""
    promise: str = ""
    """The result to expect, with its number."""
    evidence: str = ""
    """Where the number comes from."""
