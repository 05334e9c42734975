"""The folder of an attempt, through which worker and trainer speak: order, lease, stop, token, and how it ended.

Every file is small and replaced whole, so that either side may die at any moment.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from luthier.jobs.job import Outcome, Timings
from luthier.runs.manifest import write_durably

ORDER, LEASE, STOP, EXIT, LOG, TOKEN = "spec.json", "lease", "stop", "exit.json", "log.txt", "token"
STOP_WORDS = ("pause", "cancel", "lost")
_EXIT_BYTES = 4096
_MOST_MESSAGE = 1500


def attempts_folder(home: Path, job: str) -> Path:
    """All attempts of a job, with its rows by name and its token cache."""
    return home / "attempts" / job


def attempt_folder(home: Path, job: str, number: int) -> Path:
    """One of them."""
    return attempts_folder(home, job) / str(number)


def run_folder(home: Path, job: str) -> Path:
    """The run folder of a job, whose name is the job's id."""
    return home / "runs" / job


@dataclass(frozen=True)
class Order:
    """What a trainer is told: `spec.json`."""

    job: str
    attempt: int
    token: str
    run: str
    """The run folder; made by the first attempt, gone on with by the others."""
    spec: Mapping[str, Any]
    """A RunSpec as plain tables, with paths where the job has ids of files."""
    timings: Timings = field(default_factory=Timings)
    suffix: str | None = None
    devices: tuple[int, ...] = ()
    """Numbers of the accelerators that are its own."""
    needs: Mapping[str, Any] = field(default_factory=dict)
    """What it takes, for other workers of the machine to see."""


def write_order(folder: Path, order: Order) -> None:
    """Make the attempt's folder with its order."""
    write_durably(folder / ORDER, orjson.dumps(asdict(order)))


def read_order(folder: Path) -> Order:
    """What the folder's trainer was told."""
    found = orjson.loads((folder / ORDER).read_bytes())
    timings, devices = Timings(**found.pop("timings")), tuple(found.pop("devices"))
    return Order(**found, timings=timings, devices=devices)


# -- the lease -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lease:
    """That the database still names this attempt: how often that was asked, and when the asking began."""

    renewals: int
    boot: str
    at: float


def running_seconds() -> float:
    """A clock that nobody can set, and that goes on while the machine sleeps where the system has one."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)


def boot_id() -> str:
    """Names this start of this machine: only then do its clocks compare."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return ""


def write_lease(folder: Path, renewals: int, asked_at: float) -> None:
    """Only after the database said yes. `asked_at` is from before it was asked: a slow answer is an old one."""
    draft = folder / f"{LEASE}.draft"
    draft.write_bytes(orjson.dumps(asdict(Lease(renewals, boot_id(), asked_at))))
    draft.replace(folder / LEASE)


def read_lease(folder: Path) -> Lease | None:
    """None where there is none that can be read."""
    try:
        return Lease(**orjson.loads((folder / LEASE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


# -- stop ----------------------------------------------------------------------------------------------------------


def write_stop(folder: Path, word: str) -> None:
    """Ask the trainer to stop; a later word replaces an earlier one."""
    assert word in STOP_WORDS
    draft = folder / f"{STOP}.draft"
    draft.write_text(word)
    draft.replace(folder / STOP)


def read_stop(folder: Path) -> str | None:
    """What the trainer is asked, if anything."""
    try:
        word = (folder / STOP).read_text("ascii", errors="replace").strip()
    except OSError:
        return None
    return word if word in STOP_WORDS else None


# -- who the trainer is --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """A process that cannot be mistaken for a later one of the same number."""

    pid: int
    started: str
    """When the system says that it began."""
    token: str


def write_identity(folder: Path, identity: Identity) -> None:
    """Said by the trainer itself, as the first thing it does."""
    write_durably(folder / TOKEN, orjson.dumps(asdict(identity)))


def read_identity(folder: Path) -> Identity | None:
    """Which process the trainer of this folder is, or was; None before it has said so."""
    try:
        return Identity(**orjson.loads((folder / TOKEN).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


# -- how it ended --------------------------------------------------------------------------------------------------


class Ending:
    """`exit.json`: its bytes are taken from the disk at the start, so that a full disk can still be told of."""

    def __init__(self, folder: Path, token: str) -> None:
        self._folder, self._token = folder, token
        self._draft = folder / f"{EXIT}.draft"
        with suppress(OSError):  # too full even for this; then the worker sees a process that is gone
            self._write(self._draft, b" " * _EXIT_BYTES)

    def write(self, outcome: Outcome) -> None:
        """The last word of the attempt; durable before this returns."""
        said = asdict(outcome) | {"message": outcome.message[:_MOST_MESSAGE], "token": self._token}
        content = orjson.dumps(said)
        self._write(self._draft, content.ljust(_EXIT_BYTES))
        self._draft.replace(self._folder / EXIT)
        handle = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    @staticmethod
    def _write(path: Path, content: bytes) -> None:
        """In place: what the file has of the disk already is enough."""
        handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.pwrite(handle, content, 0)
            os.fsync(handle)
        finally:
            os.close(handle)


def read_outcome(folder: Path, token: str) -> Outcome | None:
    """How the attempt said it ended; None where it said nothing, or where another process said it."""
    try:
        found = orjson.loads((folder / EXIT).read_bytes())
        if found.pop("token") != token:
            return None
        return Outcome(**found)
    except (OSError, ValueError, TypeError, KeyError):
        return None
