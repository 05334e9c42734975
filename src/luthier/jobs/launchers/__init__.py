"""Where trainers run: five calls, so that a cluster's own scheduler can stand where a plain subprocess does.

A launcher starts, watches and ends processes; it decides nothing. What a trainer did is in its attempt's folder, never
in what the launcher says.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from luthier.jobs.attempt import Identity
from luthier.jobs.capacity import Capacity

SignalName = Literal["TERM", "KILL"]


@dataclass(frozen=True)
class Launch:
    """What is started: the trainer of this attempt's folder, whose `spec.json` is written."""

    folder: Path
    token: str
    devices: tuple[int, ...] = ()
    threads: int | None = None
    """Processor threads of its own; all of the machine's when absent."""
    memory_bytes: int | None = None
    """Memory that its plan may count on; all of the machine's when absent."""


@dataclass(frozen=True)
class Ended:
    """The process is gone. The code is known to its parent only; that of a signal is negative."""

    code: int | None = None


class Launcher(Protocol):
    """The five calls."""

    def submit(self, launch: Launch) -> Identity:
        """Start it; returns at once."""

    def poll(self, ref: Identity) -> Ended | None:
        """None while the very process of this reference lives."""

    def signal(self, ref: Identity, name: SignalName) -> None:
        """TERM goes to the trainer; KILL ends all that it started as well. Nothing is ever sent to another process."""

    def logs(self, launch: Launch) -> str:
        """The end of what it said, for those who run the server."""

    def capacity(self) -> Capacity:
        """What trainers may use here in all."""
