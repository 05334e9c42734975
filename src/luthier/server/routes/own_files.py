"""Files over Luthier's own routes: sent once, found again by their hash, and results downloaded file by file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator
from pathlib import Path as Folder
from typing import Annotated, BinaryIO

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from luthier.jobs.files import Incoming
from luthier.server.artefacts import REPORT, Found, list_artefacts, open_artefact
from luthier.server.auth import Reader, Submitter
from luthier.server.bodies import StrictRoute, clean_filename, receive_raw
from luthier.server.own_shapes import Artefact, ArtefactList, Deleted, FileList, FileShown, show_file
from luthier.server.problems import answers, problem
from luthier.server.routes.own import After, JobId
from luthier.server.service import Service, service_of
from luthier.server.submit import check_disk

router = APIRouter(route_class=StrictRoute)
FileId = Annotated[str, Path(max_length=64, description="Id of a file")]
Sha256 = Annotated[str, Path(pattern="^[0-9a-f]{64}$", description="SHA-256 of the content, in hexadecimal")]
_CHUNK = 256 << 10
_RANGE = re.compile(r"bytes=(\d{1,18})-")
_REPORT_CSP = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'; sandbox"
_CONTENT = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


@router.post(
    "/files",
    status_code=201,
    tags=["files"],
    responses=answers(413, 415, 507),
    openapi_extra={"requestBody": {"required": True, "content": _CONTENT}},
)
async def send_file(
    request: Request,
    key: Submitter,
    filename: Annotated[str, Query(min_length=1, max_length=255)] = "data.jsonl",
    purpose: Annotated[str, Query(pattern="^[a-z][a-z-]{0,39}$")] = "fine-tune",
    sha256: Annotated[str | None, Query(pattern="^[0-9a-f]{64}$")] = None,
) -> FileShown:
    """Send a file as the body itself. With `sha256` it is refused when another content arrives."""
    service = service_of(request)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/octet-stream":
        raise problem(415, "a file is sent as application/octet-stream")
    await run_in_threadpool(check_disk, service)
    digest = hashlib.sha256()

    def begin() -> _Checked:
        incoming = service.files.begin(
            key.project, purpose, clean_filename(filename), limit_bytes=service.settings.limits.file_bytes
        )
        return _Checked(incoming, digest)

    with service.traffic.uploading(key):
        async with receive_raw(request, begin) as sink:
            if sha256 is not None and digest.hexdigest() != sha256:
                raise problem(400, "the content does not have the SHA-256 that was said", param="sha256")
            stored = await service.keep(sink.incoming)
    return show_file(stored)


@router.get("/files", tags=["files"], responses=answers(404))
def list_files(
    request: Request, key: Reader, after: After = None, limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> FileList:
    """The files of the project, the newest first."""
    page = service_of(request).files.list_files(key.project, after=after, limit=limit)
    return FileList.model_construct(files=[show_file(file) for file in page.items], has_more=page.has_more)


@router.get("/files/by-hash/{sha256}", tags=["files"], responses=answers(404))
@router.head("/files/by-hash/{sha256}", tags=["files"], responses=answers(404))
def find_file(request: Request, key: Reader, sha256: Sha256) -> FileShown:
    """A file of the project with this content, so that it need not be sent again."""
    found = service_of(request).files.find_by_hash(key.project, sha256)
    if found is None:
        raise problem(404, "no file of this project has that content", hint="send it")
    return show_file(found)


@router.get("/files/{file}", tags=["files"], responses=answers(404))
def show_one(request: Request, key: Reader, file: FileId) -> FileShown:
    """What is known of a file."""
    return show_file(service_of(request).files.find(key.project, file))


@router.get(
    "/files/{file}/content",
    tags=["files"],
    responses=answers(404, 416) | {200: {"content": _CONTENT}, 206: {"description": "The rest", "content": _CONTENT}},
    response_class=StreamingResponse,
)
def download_file(request: Request, key: Reader, file: FileId) -> Response:
    """The content of a file, from a byte on where `Range: bytes=N-` asks so."""
    service = service_of(request)
    found = service.files.find(key.project, file)
    path = service.files.path(found)
    try:
        content = path.open("rb")
    except FileNotFoundError:
        raise problem(404, f"the content of `{file}` is gone") from None
    return send_content(request, content, Found(found.filename, found.bytes, found.sha256))


@router.delete("/files/{file}", tags=["files"], responses=answers(404, 409))
def delete_file(request: Request, key: Submitter, file: FileId) -> Deleted:
    """Delete a file that no unfinished job uses; its content is gone from the disk."""
    service_of(request).files.delete(key.project, file)
    return Deleted(id=file)


@router.get("/jobs/{job}/artefacts", tags=["results"], responses=answers(404))
def list_job_artefacts(request: Request, key: Reader, job: JobId) -> ArtefactList:
    """Every file of a job that can be downloaded: weights, checkpoints, events, ledger, report, certificate."""
    service = service_of(request)
    found = service.jobs.find(key.project, job)
    shown = [
        Artefact.model_construct(path=each.path, bytes=each.bytes, sha256=each.sha256)
        for each in list_artefacts(_run(service, found.id))
    ]
    return ArtefactList.model_construct(artefacts=shown)


@router.get(
    "/jobs/{job}/artefacts/{path:path}",
    tags=["results"],
    responses=answers(404, 416) | {200: {"content": _CONTENT}, 206: {"description": "The rest", "content": _CONTENT}},
    response_class=StreamingResponse,
)
def download_artefact(
    request: Request, key: Reader, job: JobId, path: Annotated[str, Path(max_length=1024)]
) -> Response:
    """One of them, from a byte on where `Range: bytes=N-` asks so."""
    service = service_of(request)
    content, found = open_artefact(_run(service, service.jobs.find(key.project, job).id), path)
    return send_content(request, content, found)


@router.get(
    "/jobs/{job}/report",
    tags=["results"],
    responses=answers(404) | {200: {"content": {"text/html": {"schema": {"type": "string"}}}}},
    response_class=StreamingResponse,
)
def show_report(request: Request, key: Reader, job: JobId) -> Response:
    """The report of a job as a page: no script, nothing loaded."""
    service = service_of(request)
    content, _ = open_artefact(_run(service, service.jobs.find(key.project, job).id), REPORT)
    with content:
        page = content.read()
    return Response(page, media_type="text/html; charset=utf-8", headers={"content-security-policy": _REPORT_CSP})


class _Checked:
    """A file on its way to the store, hashed here too, so that it can be held against what its sender said."""

    def __init__(self, incoming: Incoming, digest: hashlib._Hash) -> None:
        self.incoming, self._digest = incoming, digest

    def write(self, data: bytes) -> None:
        self._digest.update(data)
        self.incoming.write(data)

    def abort(self) -> None:
        self.incoming.abort()


def _run(service: Service, job: str) -> Folder:
    return service.home / "runs" / job


def send_content(request: Request, content: BinaryIO, found: Found) -> Response:
    """An open file as a download, whatever it holds: never shown by a browser, never taken for another type."""
    start = 0
    if (asked := request.headers.get("range")) is not None and (match := _RANGE.fullmatch(asked)):
        start = int(match[1])
    size = found.bytes
    if start > size or (start and start == size):
        content.close()
        raise problem(416, f"the file has {size} bytes, and byte {start} was asked for")
    content.seek(start)
    name = found.path.rpartition("/")[2]
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", name) or "file"
    headers = {
        "content-disposition": f'attachment; filename="{plain}"',
        "content-length": str(size - start),
        "accept-ranges": "bytes",
    }
    if found.sha256:
        headers["etag"] = f'"{found.sha256}"'
    if start:
        headers["content-range"] = f"bytes {start}-{size - 1}/{size}"
    return StreamingResponse(
        _chunks(content, size - start), 206 if start else 200, headers, media_type="application/octet-stream"
    )


async def _chunks(content: BinaryIO, left: int) -> AsyncIterator[bytes]:
    """Exactly the bytes that were announced, though the file may grow meanwhile."""
    with content:
        while left > 0 and (data := await run_in_threadpool(content.read, min(_CHUNK, left))):
            left -= len(data)
            yield data
