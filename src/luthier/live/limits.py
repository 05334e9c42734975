"""How much of the service one project may hold at a time, and how long things are kept."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from luthier.errors import QuotaError


@dataclass(frozen=True)
class LiveSettings:
    """What an administrator decides of live models."""

    most_models: int = 256
    """Models of one project in sessions that go on."""
    most_waiting: int = 4096
    """Commands of one project that wait."""
    most_waiting_bytes: int = 1 << 30
    """What those carry."""
    most_samples: int = 8192
    """Sampling requests of one project on their way."""
    most_open: int = 64
    """Models in the memory of one host."""
    most_hosts: int = 2
    """Hosts, which is base models, in memory."""
    turn_seconds: float = 30.0
    """How long a model that works may keep its place while others wait for one."""
    snapshot_seconds: float = 20.0
    """Work that may have to be done again after a crash."""
    snapshot_bytes: int = 64 << 20
    """The same in bytes of requests, which are kept until a snapshot is past them."""
    gradient_bytes: int = 1 << 30
    """What requests may hold whose gradients were added up since the last step: they are kept until the next."""
    settle_seconds: float = 10.0
    """How long a model is idle before what it did is put into a snapshot."""
    idle_seconds: float = 300.0
    """How long a model is idle before it leaves the host's memory."""
    recent_seconds: float = 120.0
    """How long a result stays in memory; the log keeps it on."""
    result_hours: float = 6.0
    """How long the log keeps it."""


class Waiting:
    """Counts what waits, by project, and refuses more than a project may have: its clients ask again by themselves."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._count: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    def check(self, project: str, body: bytes | None) -> None:
        """Raise QuotaError where one more is too much."""
        if self._count[project] >= self._most:
            raise QuotaError(f"{self._most} requests of this project wait already", hint="wait for some of them first")
        if self._bytes[project] and self._bytes[project] + len(body or b"") > self._most_bytes:
            raise QuotaError(
                f"requests of this project that wait hold {self._most_bytes:,} bytes already",
                hint="wait for some of them first",
            )

    def add(self, project: str, size: int) -> None:
        """One more."""
        self._count[project] += 1
        self._bytes[project] += size

    def remove(self, project: str, size: int) -> None:
        """One less."""
        self._count[project] -= 1
        self._bytes[project] -= size
        if not self._count[project]:
            del self._count[project], self._bytes[project]
