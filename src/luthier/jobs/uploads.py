"""Files that come in parts, so that a cut connection costs one part and not the file."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy import Connection, Row, Select, delete, func, insert, select, update

from luthier.errors import ConflictError, DataError, TooLargeError
from luthier.jobs.content import BLOCK, Draft
from luthier.jobs.database import Database
from luthier.jobs.ids import is_id, new_id
from luthier.jobs.rows import no_such
from luthier.jobs.stored import Part, StoredFile, Upload
from luthier.jobs.tables import files, upload_parts, uploads

if TYPE_CHECKING:
    from luthier.jobs.files import Incoming

LIFE_SECONDS = 3600.0
PART_BYTES = 64 << 20
_COLUMNS = tuple(uploads.c[name] for name in Upload.__dataclass_fields__)
_FILE_COLUMNS = tuple(files.c[name] for name in StoredFile.__dataclass_fields__)


class BeginsFiles(Protocol):
    """`FileStore.begin`."""

    def __call__(
        self, project: str, purpose: str, filename: str, *, limit_bytes: int, expires_at: float | None = None
    ) -> Incoming: ...


class UploadStore:
    """Uploads of projects; reached as `FileStore.uploads`."""

    def __init__(
        self, database: Database, home: Path, begin: BeginsFiles, *, now: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._home = home
        self._begin = begin
        self._now = now

    def create(
        self, project: str, purpose: str, filename: str, *, bytes: int, mime_type: str = "application/octet-stream"
    ) -> Upload:
        """An upload that takes parts for an hour."""
        now = self._now()
        values = {
            "id": new_id("upload-"),
            "project": project,
            "purpose": purpose,
            "filename": filename,
            "mime_type": mime_type,
            "bytes": bytes,
            "status": "pending",
            "created_at": now,
            "expires_at": now + LIFE_SECONDS,
        }
        with self._database.write() as connection:
            return _as_upload(connection.execute(insert(uploads).values(values).returning(*_COLUMNS)).one())

    def find(self, project: str, upload: str) -> Upload:
        """The upload; NotFoundError when this project has none of that id."""
        with self._database.read() as connection:
            return _as_upload(_load(connection, project, upload))

    def begin_part(self, project: str, upload: str, *, limit_bytes: int = PART_BYTES) -> IncomingPart:
        """A part to write to. ConflictError when the upload takes none any more."""
        self._check_pending(self.find(project, upload))
        return IncomingPart(self, project, upload, Draft(self._home, limit_bytes))

    def complete(
        self,
        project: str,
        upload: str,
        parts: Sequence[str],
        *,
        md5: str | None = None,
        file_expires_at: float | None = None,
    ) -> tuple[Upload, StoredFile]:
        """The parts in this order become a file. Asked again, the same file."""
        found = self.find(project, upload)
        if found.status == "completed":
            return found, self._file_of(found)
        self._check_pending(found)
        paths = self._paths_of(found, parts)
        incoming = self._begin(
            project, found.purpose, found.filename, limit_bytes=found.bytes, expires_at=file_expires_at
        )
        try:
            _copy(paths, incoming, md5)

            def close(connection: Connection, file: str) -> None:
                row = self._close(connection, project, upload, "completed", file)
                connection.execute(delete(upload_parts).where(upload_parts.c.upload == row.number))

            stored = incoming.finish(close)
        finally:
            incoming.abort()
        self._remove_parts(upload)
        return self.find(project, upload), stored

    def cancel(self, project: str, upload: str) -> Upload:
        """Take no more parts, and drop those that came. Asked again, it changes nothing."""
        with self._database.write() as connection:
            if _load(connection, project, upload).status != "cancelled":
                self._close(connection, project, upload, "cancelled")
        self._remove_parts(upload)
        return self.find(project, upload)

    def expire(self) -> None:
        """End uploads whose hour is over, and remove the parts of all that have ended."""
        with self._database.write() as connection:
            late = (uploads.c.status == "pending", uploads.c.expires_at <= self._now())
            connection.execute(update(uploads).where(*late).values(status="expired"))
        for folder in (self._home / "uploads").glob("*"):
            with self._database.read() as connection:
                status = connection.scalar(select(uploads.c.status).where(uploads.c.id == folder.name))
            if status != "pending":
                self._remove_parts(folder.name)

    def add_part(self, project: str, upload: str, draft: Draft) -> Part:
        """Keep a draft as a part; called by `IncomingPart.finish`."""
        draft.seal()
        part = new_id("part_")
        with self._database.write() as connection:
            row = _load(connection, project, upload, for_update=True)
            self._check_pending(_as_upload(row))
            _check_room(connection, row, draft.bytes)
            draft.move_to(self._part_path(upload, part))
            values = {"id": part, "upload": row.number, "project": project, "bytes": draft.bytes}
            made_at = self._now()
            connection.execute(insert(upload_parts).values(**values, created_at=made_at))
        return Part(part, upload, draft.bytes, made_at)

    def _check_pending(self, upload: Upload) -> None:
        status = upload.status
        if status == "pending" and upload.expires_at <= self._now():
            status = "expired"
        if status != "pending":
            raise ConflictError(
                f"upload `{upload.id}` is {status} and takes nothing more",
                hint="create a new upload",
                where=upload.id,
            )

    def _close(
        self, connection: Connection, project: str, upload: str, status: str, file: str | None = None
    ) -> Row[Any]:
        row = _load(connection, project, upload, for_update=True)
        self._check_pending(_as_upload(row))
        connection.execute(update(uploads).where(uploads.c.id == upload).values(status=status, file=file))
        return row

    def _paths_of(self, upload: Upload, parts: Sequence[str]) -> list[Path]:
        mine = select(upload_parts.c.id, upload_parts.c.bytes).join(uploads, uploads.c.number == upload_parts.c.upload)
        with self._database.read() as connection:
            sizes = {row.id: row.bytes for row in connection.execute(mine.where(uploads.c.id == upload.id))}
        if missing := [part for part in parts if part not in sizes]:
            raise no_such("part", missing[0])
        if len(set(parts)) != len(parts):
            raise DataError("a part is named twice", where=upload.id)
        if (total := sum(sizes[part] for part in parts)) != upload.bytes:
            raise DataError(
                f"the parts have {total:,} bytes together, and the upload was to have {upload.bytes:,}",
                where=upload.id,
            )
        return [self._part_path(upload.id, part) for part in parts]

    def _file_of(self, upload: Upload) -> StoredFile:
        mine = (files.c.id == upload.file, files.c.project == upload.project)
        with self._database.read() as connection:
            row = connection.execute(select(*_FILE_COLUMNS).where(*mine)).one_or_none()
        if row is None:
            raise no_such("file", upload.file or "")
        return StoredFile(*row)

    def _part_path(self, upload: str, part: str) -> Path:
        assert is_id(upload)
        assert is_id(part)
        return self._home / "uploads" / upload / part

    def _remove_parts(self, upload: str) -> None:
        shutil.rmtree(self._home / "uploads" / upload, ignore_errors=True)


class IncomingPart:
    """A part on its way in: any number of `write`, then `finish`. `abort` in a `finally` is always right."""

    def __init__(self, store: UploadStore, project: str, upload: str, draft: Draft) -> None:
        self._store = store
        self._project = project
        self._upload = upload
        self._draft = draft

    def write(self, data: bytes) -> None:
        """Add bytes; TooLargeError, DiskFullError."""
        self._draft.write(data)

    def finish(self) -> Part:
        """The part, on the disk and in its upload."""
        try:
            return self._store.add_part(self._project, self._upload, self._draft)
        finally:
            self._draft.abort()

    def abort(self) -> None:
        """Leave nothing behind, unless it is finished."""
        self._draft.abort()


def _as_upload(row: Sequence[Any]) -> Upload:
    """A row of the columns, and of whatever follows them."""
    return Upload(*row[: len(_COLUMNS)])


def _load(connection: Connection, project: str, upload: str, *, for_update: bool = False) -> Row[Any]:
    mine = (uploads.c.id == upload, uploads.c.project == project)
    query: Select[Any] = select(*_COLUMNS, uploads.c.number).where(*mine)
    row = connection.execute(query.with_for_update() if for_update else query).one_or_none()
    if row is None:
        raise no_such("upload", upload)
    return row


def _check_room(connection: Connection, upload: Row[Any], more: int) -> None:
    """Parts may come twice, when an answer was lost; they do not fill the disk."""
    kept = select(func.coalesce(func.sum(upload_parts.c.bytes), 0)).where(upload_parts.c.upload == upload.number)
    if int(connection.scalar(kept) or 0) + more > 2 * upload.bytes:
        raise TooLargeError(f"the parts have more than twice the {upload.bytes:,} bytes of the upload", where=upload.id)


def _copy(paths: Sequence[Path], incoming: Incoming, md5: str | None) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    for path in paths:
        with path.open("rb") as part:
            while block := part.read(BLOCK):
                incoming.write(block)
                digest.update(block)
    if md5 is not None and digest.hexdigest() != md5.strip().lower():
        raise DataError("the parts do not have the MD5 that was said", hint="send them again", where="md5")
