"""From a spec on this machine to a job on a server: rows checked here, files sent once, one job however often tried."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.client.connection import Connection
from luthier.errors import CallError, ServerError
from luthier.runs.manifest import hash_file
from luthier.spec.run import RunSpec

ROOT = "/luthier/v1"
_HERE = ("dir", "model_id_file")
"""Keys of `output` that name places of this machine, and are honoured here."""


@dataclass(frozen=True)
class Submission:
    """What is sent: the spec as the server takes it, and the files that it names."""

    tables: dict[str, Any]
    files: dict[str, Path]
    """By the key of the spec that names them."""
    metadata: dict[str, str] = field(default_factory=dict)
    suffix: str | None = None

    def payload(self, ids: dict[str, str]) -> dict[str, Any]:
        """The request, with files by their ids; by their names where they were not sent yet."""
        data = dict(self.tables["data"])
        for key, file in self.files.items():
            data[key] = ids.get(key, file.name)
        made: dict[str, Any] = {"spec": {**self.tables, "data": data}}
        if self.metadata:
            made["metadata"] = self.metadata
        if self.suffix:
            made["suffix"] = self.suffix
        return made


def build_submission(spec: RunSpec, *, suffix: str | None = None) -> Submission:
    """What of a spec goes to a server; CallError for data that is no single file of this machine."""
    tables = spec.model_dump(mode="json", exclude_unset=True)
    tables["output"] = {key: value for key, value in tables.get("output", {}).items() if key not in _HERE}
    files = {"train": _file(spec.data.train or "", "data.train")}
    if isinstance(spec.data.valid, str):
        files["valid"] = _file(spec.data.valid, "data.valid")
    tables.setdefault("data", {})
    return Submission(tables, files, suffix=suffix)


def _file(source: str, key: str) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    what = "a folder" if path.is_dir() else "no file of this machine"
    raise CallError(
        f"`{key}` is {source!r}, {what}; a server is sent single files",
        hint=f"write it as one: luthier data convert {source} --to chat -o rows.jsonl",
    )


def send(connection: Connection, submission: Submission, told: Callable[[str], None]) -> dict[str, Any]:
    """Send what the server lacks, then make the job."""
    ids = {key: _send_file(connection, path, told) for key, path in submission.files.items()}
    # One key for all tries of this call: a lost answer does not make a second job.
    headers = {"Idempotency-Key": str(uuid.uuid4())}
    made: dict[str, Any] = connection.call("POST", f"{ROOT}/jobs", json=submission.payload(ids), headers=headers)
    return made


def _send_file(connection: Connection, path: Path, told: Callable[[str], None]) -> str:
    digest = hash_file(path)
    try:
        known = connection.get(f"{ROOT}/files/by-hash/{digest}")
        if known["status"] != "error":
            told(f"{path.name} is there already ({known['id']})")
            return str(known["id"])
    except ServerError as error:
        if error.status != 404:
            raise
    told(f"sending {path.name}, {path.stat().st_size:,} bytes")
    sent = connection.send_file(
        f"{ROOT}/files",
        path,
        query={"filename": path.name, "sha256": digest},
        content_type="application/octet-stream",
    )
    return str(sent["id"])
