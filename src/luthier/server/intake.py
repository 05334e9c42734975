"""What the routes of all dialects do to take a request in: find what it names, and make the job it asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import Request

from luthier.errors import LuthierError, NotFoundError
from luthier.jobs.job import Job, NewJob
from luthier.server.service import Service, service_of
from luthier.server.submit import submit
from luthier.spec.dialects.job_request import JobRequest

if TYPE_CHECKING:
    from luthier.jobs.keys import Key

_AT_ONCE = 1 << 20


def find_job(request: Request, key: Key, job: str) -> Job:
    """A job of the key's project."""
    return service_of(request).jobs.find(key.project, job)


def submit_request(
    request: Request, key: Key, dialect: str, asked: Mapping[str, Any], build: Callable[[], JobRequest]
) -> Job:
    """Make the job that `build` reads out of the request; an error tells which key of it is at fault."""
    try:
        wanted = build()
    except LuthierError as error:
        if error.where:
            vars(error)["param"] = error.where
        raise
    files = {"train": wanted.training_file} | ({"valid": wanted.validation_file} if wanted.validation_file else {})
    new = NewJob(
        project=key.project,
        dialect=dialect,
        spec={**wanted.tables, "data": {**wanted.tables.get("data", {}), **files}},
        request=asked,
        suffix=wanted.suffix,
        metadata=wanted.metadata,
        notes=tuple(wanted.notes),
    )
    return submit(service_of(request), key, new, headers=request.headers)[0]


def count_rows(service: Service, key: Key, file: str) -> int:
    """The rows of a stored file, by its lines where it is not checked yet; 0 for a file that is not there."""
    try:
        found = service.files.find(key.project, file)
    except NotFoundError:
        return 0
    return found.rows if found.rows is not None else _count_lines(service.files.path(found))


def _count_lines(path: Path) -> int:
    lines, last = 0, b"\n"
    with path.open("rb") as file:
        while piece := file.read(_AT_ONCE):
            lines += piece.count(b"\n")
            last = piece[-1:]
    return lines + (last != b"\n")
