"""Synth's files, under `/learning/files` and `/files`: a bad file is refused while it is sent, with its rows named."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from luthier.jobs.files import StoredFile
from luthier.server.auth import Reader, Submitter
from luthier.server.problems import answers, problem
from luthier.server.routes.learning import jobs as learning_jobs
from luthier.server.routes.learning import shapes
from luthier.server.routes.openai import files as openai_files
from luthier.server.routes.openai.answers import answer, render_page
from luthier.server.routes.openai.shapes import describe_report
from luthier.server.service import Service, service_of

router = APIRouter(tags=["Synth: files"])

FileId = Annotated[str, Path(max_length=64, description="Id of a file")]
USUAL_PURPOSE = "fine-tune"
CHECK_SECONDS = 60.0
"""How long an upload waits for its check; its client would wait for five minutes."""
_LOOK_SECONDS = 0.05


@router.post("/learning/files", responses=answers(507), openapi_extra=openai_files.FORM)
@router.post("/files", responses=answers(507), openapi_extra=openai_files.FORM)
async def upload_file(request: Request, key: Submitter) -> Response:
    """Send a file as a form. It is checked before the answer, and one that cannot be trained on is refused with 400."""
    file = await openai_files.receive_file(request, key, usual_purpose=USUAL_PURPOSE)
    return answer(shapes.render_file(await _checked(service_of(request), file)))


async def _checked(service: Service, file: StoredFile) -> StoredFile:
    """The file once it is found good; a check that takes long is not waited for."""
    deadline = time.monotonic() + CHECK_SECONDS
    while file.status == "uploaded" and time.monotonic() < deadline:
        await asyncio.sleep(_LOOK_SECONDS)
        file = await run_in_threadpool(service.files.find, file.project, file.id)
    if file.status == "error":
        await run_in_threadpool(service.files.delete, file.project, file.id)
        raise problem(400, f"{file.filename}: {describe_report(file)}", code="invalid_training_file", param="file")
    return file


@router.get("/learning/files/{file_id}", responses=answers(404))
@router.get("/files/{file_id}", responses=answers(404))
def retrieve_file(request: Request, key: Reader, file_id: FileId) -> Response:
    """One file. `dry-run-train` and `dry-run-validation` stand for files that a client's dry run did not send."""
    if file_id.startswith("dry-run-"):
        return answer({"id": file_id, "object": "file", "status": "ready"})
    return answer(shapes.render_file(service_of(request).files.find(key.project, file_id)))


@router.get("/learning/files", responses=answers(404))
@router.get("/files", responses=answers(404))
def list_files(request: Request, key: Reader, asked: Annotated[openai_files.FilesAsked, Query()]) -> Response:
    """Files of the project, the newest first."""
    found = service_of(request).files.list_files(
        key.project,
        after=asked.after,
        limit=asked.limit,
        newest_first=asked.order == "desc",
        purpose=asked.purpose,
    )
    page = render_page(found.items, found.has_more, shapes.render_file)
    return answer({**page, "files": page["data"]})


@router.delete("/learning/files/{file_id}", responses=answers(404, 409))
@router.delete("/files/{file_id}", responses=answers(404, 409))
def delete_file(request: Request, key: Submitter, file_id: FileId) -> Response:
    """Delete a file that no unfinished job uses; its content is gone from the disk."""
    service_of(request).files.delete(key.project, file_id)
    return answer({"id": file_id, "object": "file", "deleted": True})


router.add_api_route(
    "/files/{file_id}/content",
    openai_files.retrieve_content,
    methods=["GET"],
    responses=answers(404, 416),
    name="download_file",
)


@router.get("/learning/files/{file_id}/jobs", responses=answers(404))
@router.get("/files/{file_id}/jobs", responses=answers(404))
def list_jobs_of_file(
    request: Request, key: Reader, file_id: FileId, asked: Annotated[learning_jobs.JobsAsked, Query()]
) -> Response:
    """Jobs that train or measure a file."""
    service_of(request).files.find(key.project, file_id)
    return learning_jobs.list_learning_jobs(request, key, asked.model_copy(update={"file_id": file_id}))
