"""`/v1/uploads`: a large file in parts, each sent again by itself when its connection is cut."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field

from luthier.jobs.uploads import IncomingPart
from luthier.server.auth import Submitter
from luthier.server.bodies import StrictRoute, clean_filename, receive_form, too_large
from luthier.server.problems import answers
from luthier.server.routes.openai import shapes
from luthier.server.routes.openai.answers import answer
from luthier.server.routes.openai.files import check_purpose
from luthier.server.service import service_of
from luthier.server.submit import check_disk

router = APIRouter(tags=["OpenAI: uploads"], route_class=StrictRoute)

UploadId = Annotated[str, Path(max_length=64, description="Id of an upload")]
_MOST_PARTS = 100_000
_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {"data": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


class CreateUpload(BaseModel):
    """A file that will come in parts."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    bytes: Annotated[int, Field(ge=1, le=2**53 - 1)]
    """How many the parts will have together."""
    filename: Annotated[str, Field(min_length=1, max_length=255)]
    mime_type: Annotated[str, Field(max_length=255)]
    purpose: str


class CompleteUpload(BaseModel):
    """The parts in the order of the file."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    part_ids: Annotated[list[Annotated[str, Field(max_length=64)]], Field(min_length=1, max_length=_MOST_PARTS)]
    md5: Annotated[str, Field(max_length=64)] | None = None
    """Of the whole file; another content is refused."""


@router.post("/uploads", responses=answers(507))
def create_upload(request: Request, key: Submitter, body: CreateUpload) -> Response:
    """Begin a file in parts. Within an hour it is completed, or gone."""
    service = service_of(request)
    check_disk(service)
    if body.bytes > (limit := service.settings.limits.upload_bytes):
        raise too_large(limit, "the upload")
    upload = service.files.uploads.create(
        key.project,
        check_purpose(body.purpose),
        clean_filename(body.filename),
        bytes=body.bytes,
        mime_type=body.mime_type,
    )
    return answer(shapes.render_upload(upload))


@router.post("/uploads/{upload_id}/parts", responses=answers(404, 409, 507), openapi_extra=_FORM)
async def add_part(request: Request, key: Submitter, upload_id: UploadId) -> Response:
    """Send a part as a form with the file field `data`."""
    service = service_of(request)
    await run_in_threadpool(check_disk, service)

    def begin(fields: dict[str, str], filename: str) -> IncomingPart:
        limit = service.settings.limits.part_bytes
        return service.files.uploads.begin_part(key.project, upload_id, limit_bytes=limit)

    with service.traffic.uploading(key):
        async with receive_form(request, begin, file_field="data") as form:
            part = await run_in_threadpool(form.file.finish)
    service.metrics.bytes_received.inc(part.bytes)
    shown = {"id": part.id, "object": "upload.part", "created_at": int(part.created_at), "upload_id": upload_id}
    return answer(shown)


@router.post("/uploads/{upload_id}/complete", responses=answers(404, 409, 507))
def complete_upload(request: Request, key: Submitter, upload_id: UploadId, body: CompleteUpload) -> Response:
    """Make the file of its parts. Asked again, it answers with the same file."""
    service = service_of(request)
    upload, file = service.files.uploads.complete(key.project, upload_id, body.part_ids, md5=body.md5)
    service.checks.schedule(file)
    return answer(shapes.render_upload(upload, file))


@router.post("/uploads/{upload_id}/cancel", responses=answers(404, 409))
def cancel_upload(request: Request, key: Submitter, upload_id: UploadId) -> Response:
    """Forget an upload and its parts."""
    return answer(shapes.render_upload(service_of(request).files.uploads.cancel(key.project, upload_id)))
