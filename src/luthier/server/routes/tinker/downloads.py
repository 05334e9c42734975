"""Weights as files: addresses that are signed and end, which need no key, since the SDK fetches them without one."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
import tarfile
import time
from collections.abc import Iterator
from contextlib import suppress
from email.utils import formatdate
from pathlib import Path as Folder
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import StreamingResponse

from luthier.errors import LuthierError
from luthier.live.rows import Checkpoint
from luthier.runs.manifest import MANIFEST, find_files, storage_errors
from luthier.server.artefacts import Found, open_inside
from luthier.server.auth import Reader
from luthier.server.problems import answers, problem
from luthier.server.routes.openai.answers import answer
from luthier.server.routes.own_files import send_content
from luthier.server.routes.tinker.shapes import CheckpointName, Kind, RunId, path_of, render_moment, store_of
from luthier.server.service import service_of

router = APIRouter(tags=["Tinker: downloads"])

_HOLDS_SECONDS = 3600
_SIGNED_WITH = "downloads.key"
_SECRET_BYTES = 32
_CHUNK = 1 << 20
_CONTENT = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_ONE = "/training_runs/{run}/checkpoints/{kind}/{name}"


@router.get(f"{_ONE}/external_weights_urls", responses=answers(404))
def list_addresses(request: Request, key: Reader, run: RunId, kind: Kind, name: CheckpointName) -> Response:
    """An address for each file of a checkpoint; they hold for an hour."""
    found = store_of(request).find_checkpoint(key.project, path_of(run, kind, name))
    expires = time.time() + _HOLDS_SECONDS
    files = [*find_files(_folder_of(request, found)), MANIFEST]
    urls = {file: _address(request, found, file, expires) for file in files}
    return answer({"urls": urls, "expires": render_moment(expires)})


@router.get(f"{_ONE}/archive", responses=answers(404) | {302: {"description": "Where the archive is"}})
def find_archive(request: Request, key: Reader, run: RunId, kind: Kind, name: CheckpointName) -> Response:
    """The address of all files in one tar archive, for clients before 0.36; the oldest want to be sent on to it."""
    found = store_of(request).find_checkpoint(key.project, path_of(run, kind, name))
    expires = time.time() + _HOLDS_SECONDS
    address = _address(request, found, "", expires)
    if "application/gzip" in ",".join(request.headers.getlist("accept")):
        headers = {"location": address, "expires": formatdate(expires, usegmt=True)}
        return Response(status_code=302, headers=headers)
    return answer({"url": address, "expires": render_moment(expires)})


@router.get(
    "/downloads/{token}",
    responses=answers(404, 416) | {200: {"content": _CONTENT}, 206: {"description": "The rest", "content": _CONTENT}},
    response_class=StreamingResponse,
)
def download(
    request: Request, token: Annotated[str, Path(max_length=4000, description="As an address of weights has it")]
) -> Response:
    """What a signed address names: one file of a checkpoint, or all of them as a tar archive."""
    named = _read_token(service_of(request).home, token)
    if named is None or not _holds(named):
        raise _gone()
    found = store_of(request).find_checkpoint(named["project"], named["path"])
    folder, file = _folder_of(request, found), named["file"]
    files = find_files(folder)
    if not files or file not in ("", MANIFEST, *files):
        raise _gone()
    if not file:
        return _archive(folder, [*files, MANIFEST], found)
    size = (folder / MANIFEST).stat().st_size if file == MANIFEST else int(files[file]["size"])
    sha256 = None if file == MANIFEST else str(files[file]["sha256"])
    return send_content(request, open_inside(folder, file), Found(file, size, sha256))


def _holds(named: dict[str, Any]) -> bool:
    """Whether it says all that is needed, as a version that signed something else did not, and is not over."""
    expires = named.get("expires")
    is_whole = all(isinstance(named.get(key), str) for key in ("project", "path", "file"))
    return is_whole and isinstance(expires, int | float) and expires >= time.time()


def _folder_of(request: Request, found: Checkpoint) -> Folder:
    return service_of(request).home / found.folder


def _address(request: Request, found: Checkpoint, file: str, expires: float) -> str:
    """Where the client called is where it can come back to; a proxy in front that speaks TLS is believed."""
    scheme = "https" if request.headers.get("x-forwarded-proto") == "https" else request.url.scheme
    named = {"project": found.project, "path": found.path, "file": file, "expires": expires}
    token = _write_token(service_of(request).home, named)
    return f"{scheme}://{request.headers['host']}{request.scope.get('root_path', '')}/api/v1/downloads/{token}"


def _archive(folder: Folder, files: list[str], found: Checkpoint) -> Response:
    headers = {"content-disposition": f'attachment; filename="{found.id}.tar"'}
    return StreamingResponse(_tar(folder, files), headers=headers, media_type="application/x-tar")


def _tar(folder: Folder, files: list[str]) -> Iterator[bytes]:
    """A tar archive, made as it is sent: weights are never held in memory or written a second time."""
    for name in files:
        with open_inside(folder, name) as content:
            facts = tarfile.TarInfo(name)
            facts.size = left = (folder / name).stat().st_size
            yield facts.tobuf(tarfile.PAX_FORMAT)
            while left > 0 and (data := content.read(min(_CHUNK, left))):
                left -= len(data)
                yield data
            yield bytes(-facts.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _write_token(home: Folder, named: dict[str, Any]) -> str:
    said = orjson.dumps(named, option=orjson.OPT_SORT_KEYS)
    return _plain(said) + "." + _plain(_sign(home, said))


def _read_token(home: Folder, token: str) -> dict[str, Any] | None:
    """What a token says, if it was signed here."""
    said, _, signature = token.partition(".")
    try:
        body, signed = _raw(said), _raw(signature)
    except ValueError:
        return None
    if not hmac.compare_digest(_sign(home, body), signed):
        return None
    found = orjson.loads(body)
    return found if isinstance(found, dict) else None


def _sign(home: Folder, said: bytes) -> bytes:
    return hmac.digest(_secret(home), said, hashlib.sha256)


def _secret(home: Folder) -> bytes:
    """One secret for all processes of the server, made by the first that needs it, and never readable to others."""
    path = home / _SIGNED_WITH
    if not path.exists():
        draft = path.with_name(f"{_SIGNED_WITH}.tmp-{secrets.token_hex(4)}")
        with storage_errors(path):
            try:
                with os.fdopen(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                    file.write(secrets.token_bytes(_SECRET_BYTES))
                    file.flush()
                    os.fsync(file.fileno())
                with suppress(FileExistsError):  # another process was first, and its secret holds
                    os.link(draft, path)
            finally:
                draft.unlink(missing_ok=True)
    return path.read_bytes()


def _plain(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _raw(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


def _gone() -> LuthierError:
    return problem(404, "nothing is at this address, or no longer", hint="ask for the addresses again")
