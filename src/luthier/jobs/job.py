"""What a job is: its states, which may follow which, and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class State(StrEnum):
    """Where a job stands. The last three are final: nothing follows them."""

    VALIDATING = "validating"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})
ACTIVE = frozenset({State.VALIDATING, State.RUNNING, State.PAUSING, State.CANCELLING})
"""States in which an attempt may hold the job."""

FOLLOWS: Mapping[State, frozenset[State]] = {
    State.VALIDATING: frozenset({State.QUEUED, State.FAILED, State.CANCELLED}),
    State.QUEUED: frozenset({State.RUNNING, State.PAUSED, State.FAILED, State.CANCELLED}),
    State.RUNNING: frozenset(
        {State.QUEUED, State.PAUSING, State.CANCELLING, State.PAUSED, State.SUCCEEDED, State.FAILED}
    ),
    State.PAUSING: frozenset({State.PAUSED, State.QUEUED, State.CANCELLING, State.SUCCEEDED, State.FAILED}),
    State.PAUSED: frozenset({State.QUEUED, State.CANCELLED}),
    State.CANCELLING: frozenset({State.CANCELLED}),
    State.SUCCEEDED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}


@dataclass(frozen=True)
class NewJob:
    """What a dialect makes of a request: the spec as plain tables, and what the request said besides."""

    project: str
    dialect: str
    spec: Mapping[str, Any]
    """A RunSpec as plain tables; `data.train` and `data.valid` name stored files by their ids."""
    request: Mapping[str, Any] = field(default_factory=dict)
    """The request as it came, so that its dialect can show it again."""
    training_file: str | None = None
    validation_file: str | None = None
    suffix: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    needs: Mapping[str, Any] = field(default_factory=dict)
    """Processors, memory_bytes, devices, gpu_type, gpu_count and nodes that the job asks for."""
    key: str | None = None
    """The id of the API key that asked."""
    notes: tuple[str, ...] = ()
    """What was decided for the person, or understood and without effect; each becomes an event."""


@dataclass(frozen=True)
class Job:
    """A row of the queue. `attempt` is the fencing number of its newest attempt."""

    id: str
    project: str
    dialect: str
    state: State
    spec: Mapping[str, Any]
    request: Mapping[str, Any]
    base: str
    training_file: str | None
    validation_file: str | None
    suffix: str | None
    metadata: Mapping[str, str]
    priority: int
    needs: Mapping[str, Any]
    attempt: int
    crashes: int
    model: str | None
    """The `ft:` id of the result."""
    trained_tokens: int | None
    step: int | None
    steps: int | None
    error_code: str | None
    error_message: str | None
    created_at: float
    updated_at: float
    started_at: float | None
    finished_at: float | None
    last_seq: int = 0
    """The number of its newest event."""
    key: str | None = None
    """The id of the API key that asked."""
    model_deleted_at: float | None = None
    """When the result was deleted; `model` keeps its name."""

    @property
    def is_final(self) -> bool:
        """Whether nothing follows."""
        return self.state in FINAL


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job; `seq` counts from 1 within it, without gaps."""

    seq: int
    created_at: float
    level: str
    """info, warn or error."""
    kind: str
    """`job_created`, `state_changed`, or a kind of the run's own events."""
    message: str
    step: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NewEvent:
    """An event that has no number yet."""

    kind: str
    message: str
    level: str = "info"
    step: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    created_at: float | None = None
    """When it happened; None is when it is written."""


@dataclass(frozen=True)
class Claim:
    """A worker's hold of a job. Every write of the worker names the fencing number `attempt`."""

    job: Job
    attempt: int
    worker: str
    kind: str = "train"
    """`check` (the job is VALIDATING) or `train`."""
    relayed: int = 0
    """How many lines of the run's events.jsonl are in the database."""


@dataclass(frozen=True)
class Attempt:
    """A row of what was tried for a job. It holds the job until it has ended."""

    job: str
    project: str
    number: int
    kind: str
    worker: str
    machine: str
    renewals: int
    """Counts the renewals of the lease. No clock says whether an attempt lives: only that this goes on."""
    pid: int | None
    process_started: str | None
    """When the system says that the process began, so that a reused pid is told from ours."""
    token: str | None
    started_at: float
    ended_at: float | None
    ending: str | None
    """validated, succeeded, failed, cancelled, paused, crashed or lost."""
    error_code: str | None
    message: str


@dataclass(frozen=True)
class WorkerRow:
    """A worker as the others see it. `machine` names where it runs; `capacity` is what it has in all."""

    id: str
    machine: str
    capacity: Mapping[str, Any] = field(default_factory=dict)
    free: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    beats: int = 0
    started_at: float = 0.0
    seen_at: float = 0.0


@dataclass(frozen=True)
class Model:
    """A result that can be asked: the job's `ft:` id, its base, and when it was ready."""

    id: str
    base: str
    job: str
    project: str
    created_at: float


@dataclass(frozen=True)
class Idempotency:
    """What tells that a request is one that came before: its header, or that a client says it tries again."""

    key: str
    """The id of the API key."""
    body_hash: str
    header: str | None = None
    is_retry: bool = False
    """The client counts this as a retry (`x-stainless-retry-count` of 1 or more)."""


@dataclass(frozen=True)
class Quota:
    """The most that a project may have; None is no limit."""

    unfinished: int | None = None


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    `ending` is succeeded, failed, cancelled, paused, crashed (counted, tried again), or lost (the machine's fault, not
    counted).
    """

    ending: str
    error_code: str | None = None
    message: str = ""
    model: str | None = None
    trained_tokens: int | None = None


@dataclass(frozen=True)
class Timings:
    """How long what may take, in seconds. A test shortens all of them together."""

    heartbeat: float = 5.0
    fence: float = 20.0
    """A trainer stops itself when its lease was not renewed for so long."""
    kill: float = 25.0
    """It kills its own process group then."""
    takeover: float = 40.0
    """An attempt whose lease stood still for so long is given up by the others."""
    relay: float = 0.25
    """How often events of a run are carried into the database."""
    grace: float = 60.0
    """How long a trainer may take to save and stop when asked."""
    backoff: float = 10.0
    """Before a crashed job is tried again: this times two to the power of its crashes so far."""

    def scaled(self, factor: float) -> Timings:
        """All of them by one factor."""
        return Timings(*(each * factor for each in vars(self).values()))


MOST_CRASHES = 3
