"""Folders that are whole or not there: every file hashed and synced, the manifest written last, then one rename.

A folder without a valid manifest is nothing. The manifest names each file with its size and SHA-256 and ends with a
hash of itself, so that any change of any single byte, in the files or in the manifest, is found.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from luthier.errors import CheckpointError, DiskFullError, LuthierError, StorageError

MANIFEST = "manifest.json"
CRASH_VARIABLE = "LUTHIER_CRASH_AT"
CRASH_POINTS = (
    "before_write",
    "after_write",
    "before_manifest",
    "in_manifest",
    "after_manifest",
    "before_rename",
    "after_aside",
    "after_rename",
    "after_seal",
)
RESERVE = 1.2
_RESERVED_KEYS = {"files", "sha256"}
_FULL = (errno.ENOSPC, errno.EDQUOT)
_passed: Counter[str] = Counter()


@dataclass(frozen=True)
class Manifest:
    """What a sealed folder holds: sizes and hashes by file, and the facts its writer gave."""

    files: dict[str, dict[str, Any]]
    facts: dict[str, Any]
    digest: str

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, the manifest itself left out."""
        return sum(int(entry["size"]) for entry in self.files.values())


def pass_crash_point(name: str) -> None:
    """Die here as by kill -9 when LUTHIER_CRASH_AT says `name:n` and this is the n-th passing.

    It proves on a user's own machine, too, that a crash between any two durable steps loses nothing.
    """
    wanted, _, count = os.environ.get(CRASH_VARIABLE, "").partition(":")
    if not name or wanted != name:
        return
    _passed[name] += 1
    if _passed[name] == int(count or 1):
        os._exit(137)


def seal(folder: Path, write: Callable[[Path], None], facts: Mapping[str, Any]) -> Manifest:
    """Let `write` fill a draft beside `folder`, then put it there whole; what stood there stays until that moment."""
    if clash := _RESERVED_KEYS & set(facts):
        raise ValueError(f"a manifest keeps {', '.join(sorted(clash))} for itself")
    with storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        drop_drafts(folder.parent, glob.escape(folder.name))
        draft = folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(6)}")
        draft.mkdir()
        try:
            pass_crash_point("before_write")
            write(draft)
            pass_crash_point("after_write")
            manifest = _write_manifest(draft, facts)
            _move_into_place(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    pass_crash_point("after_seal")
    return manifest


def check_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that is exactly what it says; raises CheckpointError that names the file."""
    return _as_tables(read_manifest(folder))


def read_manifest(folder: Path) -> Manifest:
    """The same with its parts apart."""
    manifest = _parse_manifest(folder)
    found = {path.relative_to(folder).as_posix(): path for path in _files_of(folder)}
    if missing := sorted(set(manifest.files) - set(found)):
        raise _broken(folder, f"`{missing[0]}` is missing")
    if extra := sorted(set(found) - set(manifest.files)):
        raise _broken(folder, f"`{extra[0]}` is not in its manifest")
    for name, entry in manifest.files.items():
        try:
            size = found[name].stat().st_size
            if size != entry["size"]:
                raise _broken(folder, f"`{name}` has {size:,} bytes, and its manifest says {entry['size']:,}")
            if hash_file(found[name]) != entry["sha256"]:
                raise _broken(folder, f"`{name}` does not have the SHA-256 of its manifest")
        except OSError as error:
            raise _broken(folder, f"`{name}` cannot be read: {error.strerror or error}") from None
    return manifest


def find_manifest(folder: Path) -> Manifest | None:
    """The manifest, if the folder is valid."""
    try:
        return read_manifest(folder)
    except CheckpointError:
        return None


def find_facts(folder: Path) -> dict[str, Any]:
    """What a manifest says besides its files, whatever became of those; empty where it cannot be read."""
    try:
        return _parse_manifest(folder).facts
    except CheckpointError:
        return {}


def find_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The files that a manifest names, with sizes and hashes; none where it cannot be read. Opens none of them."""
    try:
        return _parse_manifest(folder).files
    except CheckpointError:
        return {}


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reserve_check(folder: Path, size_bytes: float) -> None:
    """Raise DiskFullError unless the disk under `folder` has room for `size_bytes` and a fifth more."""
    place = folder
    while not place.exists():
        place = place.parent
    needed, free = int(size_bytes * RESERVE), shutil.disk_usage(place).free
    if free < needed:
        raise DiskFullError(
            f"{folder}: {needed / 1e9:.2f} GB are needed there, and {free / 1e9:.2f} GB are free",
            hint="free some space, or set output.dir to a folder on another disk",
            where=str(folder),
        )


def drop_drafts(parent: Path, pattern: str) -> None:
    """Remove what a dead process left half-written of the folders of this pattern; only for who may write there."""
    for path in parent.glob(f"{pattern}.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def write_durably(path: Path, content: bytes) -> None:
    """A file, whole or as it was before, also after a power cut."""
    with storage_errors(path):
        draft = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_synced(draft, content)
            draft.replace(path)
            _sync(path.parent)
        finally:
            draft.unlink(missing_ok=True)


@contextmanager
def storage_errors(place: Path) -> Iterator[None]:
    """Turn what the disk says into our errors; a library's own words for a full disk included."""
    try:
        yield
    except LuthierError:
        raise
    except Exception as error:  # safetensors writes in Rust and tells of a full disk in an error of its own
        number = error.errno if isinstance(error, OSError) else None
        if number in _FULL or "os error 28)" in str(error) or "os error 122)" in str(error):
            raise DiskFullError(
                f"{place}: the disk is full; what was there before is untouched",
                hint="free some space, then run `luthier resume`",
                where=str(place),
            ) from error
        if isinstance(error, OSError):
            raise StorageError(
                f"{error.filename or place}: cannot be written: {error.strerror or error}", where=str(place)
            ) from error
        raise


def _broken(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{folder.name}: {what}",
        hint="`luthier resume` goes on from the newest checkpoint that is whole",
        where=str(folder),
    )


def _files_of(folder: Path) -> list[Path]:
    """Everything in the folder that is not a folder itself; the manifest left out."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path for path in found if path != folder / MANIFEST)


def _as_tables(manifest: Manifest) -> dict[str, Any]:
    return {**manifest.facts, "files": manifest.files, "sha256": manifest.digest}


def _render(files: dict[str, Any], facts: Mapping[str, Any]) -> tuple[bytes, str]:
    """One way to write a manifest, so that reading one can ask for exactly these bytes; and its hash of itself."""
    option = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS
    tables = {**facts, "files": files}
    digest = hashlib.sha256(orjson.dumps(tables, option=option)).hexdigest()
    return orjson.dumps({**tables, "sha256": digest}, option=option), digest


def _parse_manifest(folder: Path) -> Manifest:
    try:
        raw = (folder / MANIFEST).read_bytes()
    except OSError as error:
        what = "is missing" if isinstance(error, FileNotFoundError | NotADirectoryError) else "cannot be read"
        raise _broken(folder, f"`{MANIFEST}` {what}") from None
    try:
        tables = orjson.loads(raw)
        files = tables["files"]
        facts = {key: value for key, value in tables.items() if key not in _RESERVED_KEYS}
        wanted, digest = _render(files, facts)
        # Rendered again and compared whole: a byte changed in white space or in a key is a change as well.
        is_whole = raw == wanted and all({"size", "sha256"} <= set(entry) for entry in files.values())
    except (ValueError, TypeError, KeyError, AttributeError):
        is_whole = False
    if not is_whole:
        raise _broken(folder, f"`{MANIFEST}` is damaged")
    return Manifest(files, facts, digest)


def _write_manifest(draft: Path, facts: Mapping[str, Any]) -> Manifest:
    files = {}
    for path in _files_of(draft):
        _sync(path)
        files[path.relative_to(draft).as_posix()] = {"size": path.stat().st_size, "sha256": hash_file(path)}
    for inner in (path for path in draft.rglob("*") if path.is_dir()):
        _sync(inner)
    raw, digest = _render(files, facts)
    _check_kept(raw, facts)
    pass_crash_point("before_manifest")
    _write_synced(draft / MANIFEST, raw, crash_point="in_manifest")
    _sync(draft)
    pass_crash_point("after_manifest")
    return Manifest(files, dict(facts), digest)


def _check_kept(raw: bytes, facts: Mapping[str, Any]) -> None:
    """A fact that JSON would change on the way (NaN becomes null) must not come back as another at a resume."""
    kept = orjson.loads(raw)
    for key, value in facts.items():
        if kept[key] != (list(value) if isinstance(value, tuple) else value):
            raise ValueError(f"the fact `{key}` cannot be kept as JSON: {value!r}")


def _write_synced(path: Path, content: bytes, crash_point: str = "") -> None:
    half = len(content) // 2
    with path.open("wb") as file:
        file.write(content[:half])
        file.flush()
        pass_crash_point(crash_point)
        file.write(content[half:])
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _move_into_place(draft: Path, folder: Path) -> None:
    pass_crash_point("before_rename")
    aside = folder.with_name(f"{folder.name}.tmp-old-{secrets.token_hex(4)}")
    if is_replacing := folder.exists():
        folder.rename(aside)
        pass_crash_point("after_aside")
    try:
        draft.rename(folder)
    except OSError:
        if is_replacing:
            aside.rename(folder)
        raise
    pass_crash_point("after_rename")
    _sync(folder.parent)
    if is_replacing:
        shutil.rmtree(aside, ignore_errors=True)
