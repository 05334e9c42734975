"""The token cache: flat memory-mapped tokens, offsets and trained ranges in a folder named by all that decides them.

A folder is built beside its place and renamed into it when complete, its manifest written last; whatever has no valid
manifest is no cache. Two runs that build the same at once both succeed, and the second finds the first's.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache as remember
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from luthier.errors import LuthierError, StorageError

MANIFEST = "manifest.json"
_DTYPES = {".u8": np.uint8, ".u16": np.uint16, ".u32": np.uint32, ".u64": np.uint64}
_ABANDONED_SECONDS = 24 * 3600


@remember
def code_version() -> str:
    """A hash of the code that turns rows into tokens: another version never reads this one's cache."""
    whole = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted(here.rglob("*.py")):
        whole.update(path.relative_to(here).as_posix().encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()


def cache_key(facts: dict[str, Any]) -> str:
    """The folder's name: a hash of everything that decides its content."""
    return hashlib.sha256(orjson.dumps(facts, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


def find_valid(folder: Path) -> Path | None:
    """The folder, if it is a whole cache: each file there, with the size its manifest says."""
    try:
        manifest = orjson.loads((folder / MANIFEST).read_bytes())
        sizes = manifest["files"]
        whole = bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return folder if whole else None


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """The valid cache at `folder`, built by `build` if there is none."""
    if find_valid(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _drop_abandoned(folder.parent)
        with _building(folder) as draft:
            build(draft)
            _seal(draft)
            _move_into_place(draft, folder)
    except OSError as error:
        if isinstance(error, LuthierError):
            raise
        where = error.filename or folder
        raise StorageError(
            f"{where}: cannot be written: {error.strerror or error}",
            hint="free some space, or set LUTHIER_HOME to a folder on another disk",
        ) from None
    return folder


@contextmanager
def _building(folder: Path) -> Iterator[Path]:
    draft = folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(6)}")
    draft.mkdir()
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _seal(draft: Path) -> None:
    sizes = {}
    for path in sorted(draft.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sizes[path.name] = path.stat().st_size
    with (draft / MANIFEST).open("wb") as file:
        file.write(orjson.dumps({"files": sizes}, option=orjson.OPT_INDENT_2))
        file.flush()
        os.fsync(file.fileno())


def _move_into_place(draft: Path, folder: Path) -> None:
    try:
        draft.rename(folder)
    except OSError:
        if find_valid(folder):
            return
        # What stands there is no cache (half-written by hand, damaged): out of the way, then ours.
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)


def _drop_abandoned(parent: Path) -> None:
    """Remove drafts of builds that died long ago."""
    for path in parent.glob("*.tmp-*"):
        if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def write_array(folder: Path, name: str, values: npt.NDArray[Any]) -> None:
    """An array as raw numbers of the type that the name's ending says."""
    (folder / name).write_bytes(values.astype(_DTYPES[Path(name).suffix], copy=False).tobytes())


def map_array(folder: Path, name: str) -> npt.NDArray[Any]:
    """The array, memory-mapped and read-only."""
    path = folder / name
    dtype = _DTYPES[path.suffix]
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, "r")
