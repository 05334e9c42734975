"""A job's result, brought home: the run folder as if it had been trained here, every sealed byte checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath

from luthier.client.connection import Connection, quoted
from luthier.client.submit import ROOT
from luthier.errors import ServerError
from luthier.runs.layout import CONFIG
from luthier.runs.manifest import hash_file
from luthier.runs.models import register
from luthier.runs.run import Run

_LEFT_THERE = ("training_state/", "checkpoint_step_", "reference/")
"""What only going on with the training would need."""


def download(
    connection: Connection, job: str, parent: Path, *, everything: bool = False, told: Callable[[str], None]
) -> Path:
    """The files of a job, in a folder named after it; what is there already and whole is not fetched again."""
    folder = parent / job
    listed = connection.get(f"{ROOT}/jobs/{quoted(job)}/artefacts")["artefacts"]
    wanted = [each for each in listed if everything or not each["path"].startswith(_LEFT_THERE)]
    for each in wanted:
        name, size, digest = str(each["path"]), int(each["bytes"]), each["sha256"]
        target = folder / _safe(name)
        if digest and target.is_file() and hash_file(target) == digest:
            continue
        told(f"fetching {name}, {size:,} bytes")
        target.unlink(missing_ok=True)
        draft = target.with_name(f".{target.name}.part")
        connection.download(f"{ROOT}/jobs/{quoted(job)}/artefacts/{quoted_path(name)}", draft, size=size)
        if digest and hash_file(draft) != digest:
            draft.unlink()
            raise ServerError(f"{name} came with other bytes than the server has", hint="fetch it again")
        draft.replace(target)
    if (folder / CONFIG).is_file():
        register(Run(folder))
    return folder


def _safe(name: str) -> PurePosixPath:
    """A name inside the folder; whoever the server is, it writes nowhere else."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
        raise ServerError(f"the server names a file {name!r}, which lies outside of the job's folder")
    return path


def quoted_path(name: str) -> str:
    """A name of several parts as a path."""
    return "/".join(quoted(part) for part in name.split("/"))
