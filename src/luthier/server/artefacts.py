"""What may be downloaded of a run folder: what its manifests name and a few files more, never through a link."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from luthier.errors import NotFoundError
from luthier.runs import layout
from luthier.runs.manifest import MANIFEST, find_files

REPORT = "finetune_report.html"
LOOSE = (
    layout.CONFIG,
    layout.LEDGER,
    layout.REJECTED,
    layout.EVENTS,
    layout.TRAINING_LOG,
    layout.LINEAGE,
    layout.PROBE,
    "finetune_report.md",
    REPORT,
    "certificate.json",
    "comparison.json",
)
_SEALED = (layout.FINAL_LORA_WEIGHTS, layout.FINAL_MODEL, layout.MERGED_MODEL)
_CHECKPOINT = re.compile(re.escape(layout.checkpoint_name("")) + r"\d{1,12}")
_SAFE_STEP = re.compile(r"[\w-][\w.-]*", re.ASCII)
_MOST_STEPS = 8


@dataclass(frozen=True)
class Found:
    """A file that may be downloaded."""

    path: str
    bytes: int
    sha256: str | None


def list_artefacts(run: Path) -> list[Found]:
    """Every file of a run folder that a client may have, by its path within it."""
    return [*_loose(run), *_sealed(run)]


def _loose(run: Path) -> Iterator[Found]:
    for name in LOOSE:
        try:
            facts = (run / name).lstat()
        except OSError:
            continue
        if stat.S_ISREG(facts.st_mode):
            yield Found(name, facts.st_size, None)


def _sealed(run: Path) -> Iterator[Found]:
    try:
        names = sorted(each.name for each in os.scandir(run) if each.is_dir(follow_symlinks=False))
    except OSError:
        return
    for folder in names:
        if folder not in _SEALED and not _CHECKPOINT.fullmatch(folder):
            continue
        files = find_files(run / folder)
        for name, entry in files.items():
            if _is_plain(name):
                yield Found(f"{folder}/{name}", int(entry["size"]), str(entry["sha256"]))
        if files:
            yield Found(f"{folder}/{MANIFEST}", (run / folder / MANIFEST).lstat().st_size, None)


def _is_plain(name: str) -> bool:
    steps = name.split("/")
    return len(steps) <= _MOST_STEPS and all(_SAFE_STEP.fullmatch(step) for step in steps)


def open_artefact(run: Path, path: str) -> tuple[BinaryIO, Found]:
    """One of them, opened; NotFoundError for whatever is not in the list."""
    found = next((each for each in list_artefacts(run) if each.path == path), None) if _is_plain(path) else None
    if found is None:
        raise NotFoundError(f"this job has no artefact {path[:200]!r}", hint="`.../artefacts` lists those there are")
    return open_inside(run, path), found


def open_inside(run: Path, path: str) -> BinaryIO:
    """Open step by step from the folder down; a link on the way, put there by whoever, is not followed."""
    *folders, name = path.split("/")
    place = os.open(run, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        for folder in folders:
            inner = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=place)
            os.close(place)
            place = inner
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=place)
    except OSError as error:
        raise NotFoundError(f"{path}: cannot be read: {error.strerror}") from None
    finally:
        os.close(place)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise NotFoundError(f"{path}: is not a file")
    return os.fdopen(handle, "rb")
