"""Files of projects: each content once on the disk, under its hash, for as long as anybody's file has it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, func, insert, or_, select, update

from luthier.errors import ConflictError
from luthier.jobs.content import Draft, content_path, drop_old_drafts
from luthier.jobs.database import Database
from luthier.jobs.ids import new_id
from luthier.jobs.job import FINAL, State
from luthier.jobs.rows import Page, as_page, no_such
from luthier.jobs.stored import Part, StoredFile, Upload
from luthier.jobs.tables import files, jobs
from luthier.jobs.uploads import UploadStore
from luthier.runs.manifest import storage_errors

__all__ = ["FileStore", "Incoming", "Part", "StoredFile", "Upload"]

_COLUMNS = tuple(files.c[name] for name in StoredFile.__dataclass_fields__)
_UNFINISHED = sorted(str(state) for state in State if state not in FINAL)


class FileStore:
    """Every question names the project that asks; another project's file is not there."""

    def __init__(self, database: Database, home: Path, *, now: Callable[[], float] = time.time) -> None:
        self._database = database
        self._home = home
        self._now = now
        self.uploads = UploadStore(database, home, self.begin, now=now)

    def begin(
        self,
        project: str,
        purpose: str,
        filename: str,
        *,
        limit_bytes: int,
        expires_at: float | None = None,
    ) -> Incoming:
        """A file to write to; there is none until it is finished."""
        values = {"project": project, "purpose": purpose, "filename": filename, "expires_at": expires_at}
        return Incoming(self._database, self._home, Draft(self._home, limit_bytes), values, self._now)

    def find(self, project: str, file: str) -> StoredFile:
        """The file; NotFoundError when this project has none of that id."""
        query = select(*_COLUMNS).where(files.c.id == file, files.c.project == project)
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise no_such("file", file)
        return StoredFile(*row)

    def find_by_hash(self, project: str, sha256: str) -> StoredFile | None:
        """The newest file of the project with this content. What others have sent is not known to it."""
        query = select(*_COLUMNS).where(files.c.sha256 == sha256, files.c.project == project)
        with self._database.read() as connection:
            row = connection.execute(query.order_by(files.c.number.desc()).limit(1)).one_or_none()
        return None if row is None else StoredFile(*row)

    def list_files(
        self,
        project: str,
        *,
        after: str | None = None,
        limit: int = 100,
        newest_first: bool = True,
        purpose: str | None = None,
    ) -> Page[StoredFile]:
        """Files in the order in which they came; `after` is the id of the last one seen."""
        query = select(*_COLUMNS).where(files.c.project == project)
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        with self._database.read() as connection:
            if after is not None:
                seen = connection.scalar(select(files.c.number).where(files.c.id == after, files.c.project == project))
                if seen is None:
                    raise no_such("file", after)
                query = query.where(files.c.number < seen if newest_first else files.c.number > seen)
            query = query.order_by(files.c.number.desc() if newest_first else files.c.number).limit(limit + 1)
            return as_page([StoredFile(*row) for row in connection.execute(query)], limit)

    def path(self, file: StoredFile) -> Path:
        """Where its content lies; for reading only."""
        return content_path(self._home, file.sha256)

    def set_report(
        self,
        project: str,
        file: str,
        status: str,
        *,
        rows: int | None = None,
        report: Mapping[str, Any] | None = None,
    ) -> StoredFile:
        """Keep what the check of a file found."""
        if status not in ("uploaded", "ready", "error"):
            raise ValueError(f"a file is uploaded, ready or error, not {status!r}")
        mine = (files.c.id == file, files.c.project == project)
        with self._database.write() as connection:
            values = {"status": status, "rows": rows, "report": report}
            if connection.execute(update(files).where(*mine).values(values)).rowcount == 0:
                raise no_such("file", file)
        return self.find(project, file)

    def unchecked(self, limit: int = 100) -> list[StoredFile]:
        """Files of all projects that still wait for their check, the oldest first: a crash may have left some."""
        query = select(*_COLUMNS).where(files.c.status == "uploaded").order_by(files.c.number).limit(limit)
        with self._database.read() as connection:
            return [StoredFile(*row) for row in connection.execute(query)]

    def delete(self, project: str, file: str) -> None:
        """Delete a file; its content is gone from the disk when no other file has the same.

        ConflictError while a job that has not ended uses it.
        """
        with self._database.write() as connection:
            sha256 = self._delete_row(connection, project, file)
        self._drop_content(sha256)

    def used_bytes(self, project: str) -> int:
        """Bytes of all files of a project."""
        with self._database.read() as connection:
            total = connection.scalar(select(func.sum(files.c.bytes)).where(files.c.project == project))
            return int(total or 0)

    def sweep(self) -> None:
        """Delete what has expired and what crashes left behind. Run at start and hourly."""
        self.uploads.expire()
        with self._database.read() as connection:
            old = select(files.c.project, files.c.id).where(files.c.expires_at <= self._now())
            expired = connection.execute(old).all()
        for project, file in expired:
            try:
                self.delete(project, file)
            except (ConflictError, LookupError):
                continue  # a job uses it still, or somebody was first
        for path in (self._home / "files").glob("??/*"):
            self._drop_content(path.name)
        drop_old_drafts(self._home)

    def _delete_row(self, connection: Connection, project: str, file: str) -> str:
        mine = (files.c.id == file, files.c.project == project)
        sha256 = connection.scalar(select(files.c.sha256).where(*mine).with_for_update())
        if sha256 is None:
            raise no_such("file", file)
        uses = or_(jobs.c.training_file == file, jobs.c.validation_file == file)
        user = connection.scalar(select(jobs.c.id).where(uses, jobs.c.state.in_(_UNFINISHED)).limit(1))
        if user is not None:
            raise ConflictError(
                f"file `{file}` is used by job `{user}`, which has not ended", hint="cancel that job first", where=file
            )
        connection.execute(delete(files).where(*mine))
        return str(sha256)

    def _drop_content(self, sha256: str) -> None:
        """Unlink content that no file has. Under the lock with which `Incoming` places it."""
        path = content_path(self._home, sha256)
        has_it = select(files.c.number).where(files.c.sha256 == sha256).limit(1)
        with self._database.read() as connection:
            if connection.scalar(has_it) is not None:
                return
        with self._database.write() as connection, storage_errors(path):
            self._database.lock(connection, f"content {sha256}")
            if connection.scalar(has_it) is None:
                path.unlink(missing_ok=True)


class Incoming:
    """A file on its way in: any number of `write`, then `finish`. `abort` in a `finally` is always right."""

    def __init__(
        self, database: Database, home: Path, draft: Draft, values: Mapping[str, Any], now: Callable[[], float]
    ) -> None:
        self._database = database
        self._home = home
        self._draft = draft
        self._values = values
        self._now = now

    def write(self, data: bytes) -> None:
        """Add bytes; TooLargeError, DiskFullError."""
        self._draft.write(data)

    def finish(self, also: Callable[[Connection, str], None] = lambda _connection, _file: None) -> StoredFile:
        """The file, with its content on the disk and its row committed. `also` writes in the same transaction."""
        sha256 = self._draft.seal()
        file = new_id("file-")
        values = {"id": file, "bytes": self._draft.bytes, "sha256": sha256, "status": "uploaded"}
        try:
            with self._database.write() as connection:
                self._database.lock(connection, f"content {sha256}")
                also(connection, file)
                row = insert(files).values(**self._values, **values, created_at=self._now()).returning(*_COLUMNS)
                stored = StoredFile(*connection.execute(row).one())
                self._draft.move_to(content_path(self._home, sha256))
        finally:
            self._draft.abort()
        return stored

    def abort(self) -> None:
        """Leave nothing behind, unless it is finished."""
        self._draft.abort()
