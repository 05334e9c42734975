"""The events of a run: typed, append-only, one JSON line each; reports, dashboards and the run's state come from them.

A line counts once its newline is written: what a crash leaves after the last newline is cut off by the next writer
and skipped by readers.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import orjson

from luthier.runs.manifest import storage_errors

UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Event:
    """Something that happened in a run; each kind is a class below."""

    kind: ClassVar[str] = ""


@dataclass(frozen=True)
class RunStarted(Event):
    """A process began to work on the run."""

    kind: ClassVar[str] = "run_started"
    run: str
    attempt: int = 1
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Planned(Event):
    """The plan is settled."""

    kind: ClassVar[str] = "planned"
    plan: Mapping[str, Any]


@dataclass(frozen=True)
class DataReady(Event):
    """The rows are checked, split and tokenised."""

    kind: ClassVar[str] = "data_ready"
    summary: Mapping[str, Any]
    was_cached: bool = False


@dataclass(frozen=True)
class EngineLoaded(Event):
    """The model is in memory; `packed` is false where packing would have changed its result."""

    kind: ClassVar[str] = "engine_loaded"
    seconds: float
    packed: bool
    trainable: int
    dtype: str


@dataclass(frozen=True)
class Working(Event):
    """Something that takes a while goes on: what, how much of it is done, and of how much."""

    kind: ClassVar[str] = "working"
    what: str
    done: int
    count: int


@dataclass(frozen=True)
class Waiting(Event):
    """Something is waited for that a service elsewhere does; what it says of its queue, and why."""

    kind: ClassVar[str] = "waiting"
    what: str
    seconds: float
    state: str = ""
    reason: str = ""


@dataclass(frozen=True)
class SavedOnService(Event):
    """A checkpoint lies on the service that trains, under these paths."""

    kind: ClassVar[str] = "saved_on_service"
    name: str
    paths: Mapping[str, str]


@dataclass(frozen=True)
class StepDone(Event):
    """An optimizer step was taken; steps count from 1."""

    kind: ClassVar[str] = "step_done"
    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    tokens_per_second: float
    seconds: float
    memory_bytes: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluated(Event):
    """The held-out rows were measured."""

    kind: ClassVar[str] = "evaluated"
    step: int
    loss: float
    perplexity: float
    token_accuracy: float
    tokens: int
    is_best: bool
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A checkpoint was written, read back and found whole."""

    kind: ClassVar[str] = "checkpoint_saved"
    step: int
    blocked_seconds: float
    seconds: float
    size_bytes: int


@dataclass(frozen=True)
class StepSkipped(Event):
    """A step was not taken, because its loss or gradient was not finite."""

    kind: ClassVar[str] = "step_skipped"
    step: int
    reason: str
    rows: list[str]


@dataclass(frozen=True)
class StepReplayed(Event):
    """A step was computed again in smaller parts, because memory ran out."""

    kind: ClassVar[str] = "step_replayed"
    step: int
    reason: str
    micro_batch_tokens: int


@dataclass(frozen=True)
class CheckpointBroken(Event):
    """A checkpoint was found damaged and passed over."""

    kind: ClassVar[str] = "checkpoint_broken"
    path: str
    reason: str


@dataclass(frozen=True)
class MemoryMeasured(Event):
    """What the run takes, beside what the plan said."""

    kind: ClassVar[str] = "memory_measured"
    predicted_bytes: int
    measured_bytes: int


@dataclass(frozen=True)
class Resumed(Event):
    """Training goes on after this step."""

    kind: ClassVar[str] = "resumed"
    step: int


@dataclass(frozen=True)
class Warned(Event):
    """Something a person should know and that stops nothing."""

    kind: ClassVar[str] = "warned"
    code: str
    message: str


@dataclass(frozen=True)
class Stopped(Event):
    """The run was asked to stop and can be resumed."""

    kind: ClassVar[str] = "stopped"
    step: int
    reason: str


@dataclass(frozen=True)
class Paused(Event):
    """The run cannot go on for now, and can be resumed once the reason is gone."""

    kind: ClassVar[str] = "paused"
    step: int
    reason: str


@dataclass(frozen=True)
class Failed(Event):
    """The run failed."""

    kind: ClassVar[str] = "failed"
    code: str
    message: str


@dataclass(frozen=True)
class Finished(Event):
    """The final weights are in place."""

    kind: ClassVar[str] = "finished"
    step: int
    reason: str
    seconds: float


EVENT_KINDS: dict[str, type[Event]] = {each.kind: each for each in Event.__subclasses__()}

_SECRETS = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_(?:[A-Za-z0-9]{20,}|(?=[A-Za-z]*\d)[A-Za-z0-9]{8,})"
    r"|sk-[A-Za-z0-9_-]{12,}"
    r"|ftk_[A-Za-z0-9_]{12,}"
    r"|tml-[A-Za-z0-9_-]{12,}"
    r"|[Bb]earer\s+[A-Za-z0-9._~+/=-]{6,}"
    r")"
)
_SECRET_NAMES = ("API_KEY", "_TOKEN", "_SECRET", "_PASSWORD")
_LEAST_SECRET = 8
HIDDEN = "[hidden]"


def redact(value: Any, secrets: tuple[str, ...] = ()) -> Any:
    """The value with whatever looks like a key, or is one of `secrets`, hidden in every text of it."""
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, HIDDEN)
        return _SECRETS.sub(HIDDEN, value)
    if isinstance(value, Mapping):
        return {redact(str(key), secrets): redact(each, secrets) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [redact(each, secrets) for each in value]
    return value


def list_secrets(environment: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Values of this process's environment that are keys, the longest first."""
    items = (os.environ if environment is None else environment).items()
    found = {value for name, value in items if name.upper().endswith(_SECRET_NAMES) and len(value) >= _LEAST_SECRET}
    return tuple(sorted(found, key=len, reverse=True))


def utc_now() -> datetime:
    """Now, in UTC."""
    return datetime.now(UTC)


class EventLog:
    """Appends events to a run's `events.jsonl`; safe from several threads of the one process that writes."""

    def __init__(self, path: Path, *, clock: Callable[[], datetime] = utc_now) -> None:
        self.path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._secrets = list_secrets()
        self._next_seq: int | None = None

    def append(self, event: Event) -> dict[str, Any]:
        """Write one event; returns the line as it was written."""
        said = {each.name: getattr(event, each.name) for each in fields(event)}
        with self._lock, storage_errors(self.path):
            if self._next_seq is None:
                self._next_seq = self._mend() + 1
            time = self._clock().isoformat(timespec="milliseconds").replace("+00:00", "Z")
            line = {"seq": self._next_seq, "time": time, "kind": event.kind, **redact(said, self._secrets)}
            written = orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)
            seq, self._next_seq = self._next_seq, None  # known again only once this line is whole
            with self.path.open("ab") as file:
                file.write(written)
            self._next_seq = seq + 1
        return line

    def _mend(self) -> int:
        """Cut off what a crash left of a last line; tells the last sequence number."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return 0
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)
        return max((entry["seq"] for entry in _parse(content)), default=0)


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events so far, in order, as they were written; a line that is damaged shows as kind `unreadable`."""
    return list(_parse(path.read_bytes())) if path.exists() else []


def _parse(content: bytes) -> Iterator[dict[str, Any]]:
    seq = 0
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            entry = orjson.loads(line)
            seq, _ = int(entry["seq"]), str(entry["kind"])
        except (ValueError, TypeError, KeyError):
            entry = {"seq": seq, "time": "", "kind": UNREADABLE, "line": number}
        yield entry
