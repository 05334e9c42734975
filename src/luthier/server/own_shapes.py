"""What Luthier's own routes take and answer; the OpenAPI document is made from these classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from luthier.jobs.job import State

if TYPE_CHECKING:
    from luthier.jobs.files import StoredFile
    from luthier.jobs.job import Job, JobEvent

LARGEST = 2**53 - 1
"""Whole numbers beyond it are not the same number in every client."""
_Label = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Metadata = Annotated[dict[_Label, Annotated[str, StringConstraints(max_length=512)]], Field(max_length=16)]


class Shape(BaseModel):
    """A body of ours: nothing unknown is taken, and no value is bent to fit."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class ErrorShown(Shape):
    """What failed, where, and what to do next."""

    code: str
    message: str
    hint: str
    where: str
    details: Any = None


class Problem(Shape):
    """The body of every answer that is not a success."""

    error: ErrorShown


class NewRun(Shape):
    """A job to be made."""

    spec: dict[str, Any]
    """A RunSpec; `data.train`, and `data.valid` where it is not a share or a count, are ids of files."""
    suffix: str | None = Field(None, min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Becomes part of the id of the result."""
    metadata: Metadata = Field(default_factory=dict)
    """Up to 16 labels."""
    priority: int = Field(0, ge=-100, le=100)
    """A larger one starts earlier."""


class JobError(Shape):
    """Why a job failed."""

    code: str
    message: str


class JobShown(Shape):
    """A job as it stands."""

    id: str
    state: State
    base: str
    model: str | None
    """The `ft:` id of the result, once there is one."""
    error: JobError | None
    dialect: str
    suffix: str | None
    metadata: dict[str, str]
    priority: int
    training_file: str | None
    validation_file: str | None
    attempt: int
    crashes: int
    step: int | None
    steps: int | None
    trained_tokens: int | None
    created_at: float
    updated_at: float
    started_at: float | None
    finished_at: float | None
    needs: dict[str, Any]
    spec: dict[str, Any]


class JobList(Shape):
    """A page of jobs."""

    jobs: list[JobShown]
    has_more: bool


class EventShown(Shape):
    """Something that happened to a job."""

    seq: int
    created_at: float
    level: str
    kind: str
    message: str
    step: int | None
    data: dict[str, Any]


class EventList(Shape):
    """A page of events."""

    events: list[EventShown]
    has_more: bool


class FileShown(Shape):
    """A file that was sent."""

    id: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    status: str
    """`uploaded` while it is checked, then `ready` or `error`."""
    rows: int | None
    report: Any
    created_at: float
    expires_at: float | None


class FileList(Shape):
    """A page of files."""

    files: list[FileShown]
    has_more: bool


class Artefact(Shape):
    """A file of a job's run folder."""

    path: str
    bytes: int
    sha256: str | None
    """Of what is sealed; other files have none while the job runs."""


class ArtefactList(Shape):
    """Everything that can be downloaded of a job."""

    artefacts: list[Artefact]


class ModelShown(Shape):
    """The result of a job."""

    id: str
    base: str
    job: str
    created_at: float


class ModelList(Shape):
    """The results of a project."""

    models: list[ModelShown]
    has_more: bool


class Deleted(Shape):
    """Something is gone, from the disk too."""

    id: str
    deleted: Literal[True] = True


class Capacity(Shape):
    """What this server trains with."""

    workers: list[dict[str, Any]]
    offers: dict[str, str]
    allowed_models: list[str]
    unfinished_jobs: int
    most_unfinished_jobs: int


class NewKey(Shape):
    """A key to be made, for the project of the one who asks."""

    scopes: list[Literal["read", "submit", "admin"]] = Field(min_length=1, max_length=3)
    name: str = Field("", max_length=100)
    expires_at: float | None = Field(None, ge=0, le=LARGEST)


class KeyShown(Shape):
    """A key, without its secret."""

    id: str
    name: str
    scopes: list[str]
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    last_used_at: float | None


class KeyList(Shape):
    """The keys of a project."""

    keys: list[KeyShown]


class KeyMade(Shape):
    """A new key. It is shown this once."""

    id: str
    key: str


class Caller(Shape):
    """Who asks."""

    project: str
    scopes: list[str]


class Health(Shape):
    """The process answers."""

    status: Literal["ok"] = "ok"
    version: str


class Ready(Shape):
    """Whether the server can take and run jobs, and what is missing where not."""

    is_ready: bool
    database: bool
    disk: bool
    worker: bool


def show_job(job: Job) -> JobShown:
    """A job for a client."""
    error = JobError(code=job.error_code, message=job.error_message or "") if job.error_code else None
    fields = {name: getattr(job, name) for name in JobShown.model_fields if name != "error"}
    return JobShown.model_construct(**{**fields, "error": error, "metadata": dict(job.metadata)})


def show_event(event: JobEvent) -> dict[str, Any]:
    """An event for a client; a plain table, as there are many."""
    return {
        "seq": event.seq,
        "created_at": event.created_at,
        "level": event.level,
        "kind": event.kind,
        "message": event.message,
        "step": event.step,
        "data": _plain(event.data),
    }


def _plain(table: Mapping[str, Any]) -> dict[str, Any]:
    return table if isinstance(table, dict) else dict(table)


def show_file(file: StoredFile) -> FileShown:
    """A file for a client."""
    return FileShown.model_construct(**{name: getattr(file, name) for name in FileShown.model_fields})
