"""`/v1/files`: data to train on, and the results files of jobs."""

from __future__ import annotations

import io
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from pydantic import Field

from luthier.errors import ConflictError, NotFoundError
from luthier.jobs.files import Incoming, StoredFile
from luthier.jobs.job import State
from luthier.jobs.keys import Key
from luthier.server.artefacts import Found
from luthier.server.auth import Reader, Submitter
from luthier.server.bodies import receive_form
from luthier.server.problems import answers, problem
from luthier.server.results import PURPOSE, find_results, render_results, results_name
from luthier.server.routes.openai import shapes
from luthier.server.routes.openai.answers import PageAsked, answer, render_page
from luthier.server.routes.own_files import send_content
from luthier.server.service import Service, service_of
from luthier.server.submit import check_disk

router = APIRouter(tags=["OpenAI: files"])

FileId = Annotated[str, Path(max_length=64, description="Id of a file")]
PURPOSES = ("fine-tune", "user_data", "evals")
_LEAST_LIFE, _MOST_LIFE = 3600, 2_592_000
FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["purpose", "file"],
                    "properties": {
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                        "file": {"type": "string", "format": "binary"},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": _LEAST_LIFE, "maximum": _MOST_LIFE},
                    },
                }
            }
        },
    }
}
_BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


@router.post("/files", responses=answers(507), openapi_extra=FORM)
async def create_file(request: Request, key: Submitter) -> Response:
    """Send a file as a form, its fields before it. It is checked at once; its status tells when that is done."""
    return answer(shapes.render_file(await receive_file(request, key)))


async def receive_file(request: Request, key: Key, *, usual_purpose: str | None = None) -> StoredFile:
    """The file of a form, kept and on its way to its check."""
    service = service_of(request)
    await run_in_threadpool(check_disk, service)

    purposes: list[str] = []

    def begin(fields: dict[str, str], filename: str) -> Incoming:
        purposes.append(check_purpose(fields.get("purpose", usual_purpose)))
        limit = service.settings.limits.file_bytes
        return service.files.begin(key.project, purposes[0], filename, limit_bytes=limit, expires_at=_expiry(fields))

    with service.traffic.uploading(key):
        async with receive_form(request, begin) as form:
            if form.fields.get("purpose", purposes[0]) != purposes[0]:
                raise problem(400, "`purpose` comes after the file", hint="send it before the file", param="purpose")
            return await service.keep(form.file)


def check_purpose(purpose: str | None) -> str:
    """A purpose that files can have here."""
    if purpose not in PURPOSES:
        said = f"is {purpose[:64]!r}" if purpose else "is missing before the file"
        raise problem(400, f"`purpose` {said}; expected one of {', '.join(PURPOSES)}", param="purpose")
    return purpose


def _expiry(fields: dict[str, str]) -> float | None:
    text = fields.get("expires_after[seconds]")
    if text is None:
        return None
    seconds = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    anchor = fields.get("expires_after[anchor]", "created_at")
    if anchor != "created_at" or not _LEAST_LIFE <= seconds <= _MOST_LIFE:
        raise problem(
            400,
            f"`expires_after`: expected {_LEAST_LIFE:,} to {_MOST_LIFE:,} seconds from created_at",
            param="expires_after",
        )
    return time.time() + seconds


class FilesAsked(PageAsked):
    """Which files, and how many."""

    limit: Annotated[int, Field(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"
    purpose: Annotated[str, Field(max_length=64)] | None = None


@router.get("/files", responses=answers(404))
def list_files(request: Request, key: Reader, asked: Annotated[FilesAsked, Query()]) -> Response:
    """Files of the project, the newest first. Results files are listed by their own purpose, fine-tune-results."""
    service = service_of(request)
    if asked.purpose == PURPOSE:
        return answer(_list_results(service, key, asked))
    found = service.files.list_files(
        key.project,
        after=asked.after,
        limit=asked.limit,
        newest_first=asked.order == "desc",
        purpose=asked.purpose,
    )
    return answer(render_page(found.items, found.has_more, shapes.render_file))


def _list_results(service: Service, key: Key, asked: FilesAsked) -> dict[str, Any]:
    after = find_results(service, key.project, asked.after) if asked.after else None
    jobs = service.jobs.list_jobs(
        key.project,
        after=after.id if after else None,
        limit=asked.limit,
        states=[State.SUCCEEDED],
        newest_first=asked.order == "desc",
    )
    return render_page(jobs.items, jobs.has_more, lambda job: shapes.render_results_file(job, service.home))


@router.get("/files/{file_id}", responses=answers(404))
def retrieve_file(request: Request, key: Reader, file_id: FileId) -> Response:
    """One file."""
    service = service_of(request)
    if (job := find_results(service, key.project, file_id)) is not None:
        return answer(shapes.render_results_file(job, service.home))
    return answer(shapes.render_file(service.files.find(key.project, file_id)))


@router.delete("/files/{file_id}", responses=answers(404, 409))
def delete_file(request: Request, key: Submitter, file_id: FileId) -> Response:
    """Delete a file that no unfinished job uses; its content is gone from the disk."""
    service = service_of(request)
    if (job := find_results(service, key.project, file_id)) is not None:
        raise ConflictError(
            f"`{file_id}` is made from the run of {job.id}", hint=f"DELETE /luthier/v1/jobs/{job.id} deletes both"
        )
    service.files.delete(key.project, file_id)
    return answer({"id": file_id, "object": "file", "deleted": True})


@router.get(
    "/files/{file_id}/content",
    responses=answers(404, 416) | {200: {"content": _BYTES}, 206: {"description": "The rest", "content": _BYTES}},
    response_class=StreamingResponse,
)
def retrieve_content(request: Request, key: Reader, file_id: FileId) -> Response:
    """The content of a file; of a results file CSV, one line for each step."""
    service = service_of(request)
    if (job := find_results(service, key.project, file_id)) is not None:
        made = render_results(service.home, job)
        return send_content(request, io.BytesIO(made), Found(results_name(job), len(made), None))
    found = service.files.find(key.project, file_id)
    try:
        content = service.files.path(found).open("rb")
    except FileNotFoundError:
        raise NotFoundError(f"the content of `{file_id}` is gone") from None
    return send_content(request, content, Found(found.filename, found.bytes, found.sha256))
