"""Bytes on their way to the disk: counted, hashed, synced, and only then given the name that their content has."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import BinaryIO

from luthier.errors import TooLargeError
from luthier.runs.manifest import storage_errors

_HASH = re.compile(r"[0-9a-f]{64}")
_DRAFT_LIVES_SECONDS = 24 * 3600.0
BLOCK = 1 << 20


class Draft:
    """A file in `tmp` that is being written. Exactly one of `seal` and `abort` ends it; `abort` may follow either."""

    def __init__(self, home: Path, limit_bytes: int) -> None:
        folder = home / "tmp"
        self.path = folder / f"draft-{secrets.token_hex(12)}"
        self.bytes = 0
        self._limit = limit_bytes
        self._digest = hashlib.sha256()
        with storage_errors(self.path):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            self._file: BinaryIO = os.fdopen(handle, "wb", buffering=0)

    def write(self, data: bytes) -> None:
        """Add bytes; TooLargeError when they are more than was allowed."""
        if self.bytes + len(data) > self._limit:
            raise TooLargeError(
                f"more than {self._limit:,} bytes came", hint="send less at once, or use an upload in parts"
            )
        with storage_errors(self.path):
            rest = memoryview(data)
            while rest:  # an unbuffered file may take less than it was given
                rest = rest[self._file.write(rest) :]
        self._digest.update(data)
        self.bytes += len(data)

    def seal(self) -> str:
        """The bytes are on the disk; their SHA-256."""
        with storage_errors(self.path):
            os.fsync(self._file.fileno())
            self._file.close()
        return self._digest.hexdigest()

    def move_to(self, path: Path) -> None:
        """Give the sealed draft its name; what has that name already is replaced."""
        with storage_errors(path):
            made = not path.parent.exists()
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.path.replace(path)
            sync_folder(path.parent)
            if made:
                sync_folder(path.parent.parent)

    def abort(self) -> None:
        """Leave nothing behind of a draft that was not moved."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def content_path(home: Path, sha256: str) -> Path:
    """Where content of this hash lies. Nothing that anybody sent is part of the path."""
    if not _HASH.fullmatch(sha256):
        raise ValueError("not a SHA-256 in hex")
    return home / "files" / sha256[:2] / sha256


def sync_folder(folder: Path) -> None:
    """Have the names in a folder reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def drop_old_drafts(home: Path) -> None:
    """Remove what processes that died left in `tmp`."""
    oldest = time.time() - _DRAFT_LIVES_SECONDS
    for path in (home / "tmp").glob("*"):
        try:
            if path.lstat().st_mtime < oldest:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        except OSError:
            continue  # another process was first
