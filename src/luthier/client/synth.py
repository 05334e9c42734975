"""The client's side of the Synth protocol: a run spec as their payload, a job made, started and asked after."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from luthier.client.connection import Connection, quoted
from luthier.client.submit import Submission
from luthier.errors import ServerError, SpecError
from luthier.spec.run import RunSpec

_FINAL = ("succeeded", "completed", "failed", "cancelled", "canceled")
SUCCEEDED = ("succeeded", "completed")
_READY = ("ready", "uploaded", "stored", "complete", "processed")
_MOST_LOOKS = 60
_LOOK_SECONDS = 2.0
_KINDS = {"full": "fft", "lora": "peft", "qlora": "peft", "auto": "peft"}
# What their payload can say of a spec.
_SAYABLE = {
    "model": {"base"},
    "data": {"train", "valid", "max_length", "format"},
    "method": {"kind"},
    "objective": {"kind"},
    "optim": {"epochs", "batch", "micro_batch", "learning_rate", "warmup_ratio"},
    "evaluate": {"every_steps", "keep", "best_metric"},
    "output": {"dir", "model_id_file"},
    "compute": {"gpu_type", "gpu_count", "nodes", "precision"},
    "engine": {"kind"},
}


def build_payload(spec: RunSpec, submission: Submission, ids: dict[str, str]) -> dict[str, Any]:
    """The body of their `POST /learning/jobs`; raises SpecError that names every key it cannot say."""
    _refuse_unsayable(spec)
    optim, compute = spec.optim, spec.compute
    micro = optim.micro_batch or 1
    hyperparameters: dict[str, Any] = {
        "n_epochs": int(optim.epochs) if float(optim.epochs).is_integer() else optim.epochs,
        "per_device_batch": micro,
        "gradient_accumulation_steps": max(1, optim.batch // micro),
        "sequence_length": spec.data.max_length,
        "learning_rate": optim.learning_rate,
        "warmup_ratio": optim.warmup_ratio,
        "train_kind": _KINDS[spec.method.kind],
    }
    validation = spec.evaluate.every_steps if "valid" in submission.files else None
    if validation:
        hyperparameters |= {
            "evaluation_strategy": "steps",
            "eval_steps": validation,
            "save_best_model_at_end": spec.evaluate.keep == "best",
            "metric_for_best_model": "val.loss",
            "greater_is_better": False,
        }
    asked = {"gpu_type": compute.gpu_type, "gpu_count": compute.gpu_count, "nodes": compute.nodes}
    training: dict[str, Any] = {"mode": "sft_offline", "use_qlora": spec.method.kind == "qlora"}
    data: dict[str, Any] = {"topology": {}}
    if "valid" in submission.files:
        training["validation"] = {"enabled": True}
        data["validation_files"] = [ids.get("valid", submission.files["valid"].name)]
    return {
        "model": spec.model.base,
        "hyperparameters": {key: value for key, value in hyperparameters.items() if value is not None},
        "training_type": "sft_offline",
        "metadata": {
            "effective_config": {
                "compute": {key: value for key, value in asked.items() if value is not None},
                "data": data,
                "training": training,
            }
        },
        "training_file_id": ids.get("train", submission.files["train"].name),
    }


def _refuse_unsayable(spec: RunSpec) -> None:
    tables = spec.model_dump(mode="json", exclude_defaults=True)
    left = []
    for table, keys in tables.items():
        known = _SAYABLE.get(table)
        given = keys if isinstance(keys, dict) else {"": keys}
        left += [f"{table}.{key}".rstrip(".") for key in given if known is None or key not in known]
    if spec.objective.kind != "sft":
        left.append("objective.kind")
    if left:
        raise SpecError(
            f"the Synth protocol cannot say: {', '.join(f'`{key}`' for key in sorted(set(left)))}",
            hint="take them out, or use a Luthier server without --dialect",
        )


def send(connection: Connection, spec: RunSpec, submission: Submission, told: Callable[[str], None]) -> str:
    """Send the files, make the job and start it; returns its id."""
    ids = {key: _send_file(connection, path, told) for key, path in submission.files.items()}
    _await_file(connection, ids["train"])
    made = connection.call("POST", "/learning/jobs", json=build_payload(spec, submission, ids))
    job = str(made.get("job_id") or made.get("id") or "")
    if not job:
        raise ServerError("the server made a job and did not say its id")
    connection.call("POST", f"/learning/jobs/{quoted(job)}/start", json={}, is_safe=True)
    return job


def _send_file(connection: Connection, path: Path, told: Callable[[str], None]) -> str:
    """One part for the purpose and one for the file, as their server reads them in this order."""
    told(f"sending {path.name}, {path.stat().st_size:,} bytes")
    mark = secrets.token_hex(16)
    name = path.name.replace('"', "_")
    head = (
        f'--{mark}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
        f"Content-Type: application/jsonl\r\n\r\n"
    ).encode()
    tail = f"\r\n--{mark}--\r\n".encode()
    body = _Parts(head, path, tail)
    kind = f"multipart/form-data; boundary={mark}"
    found = connection.send("/learning/files", body, size=body.size, content_type=kind)
    if not isinstance(found, dict) or not found.get("id"):
        raise ServerError("the server took the file and did not say its id")
    return str(found["id"])


class _Parts:
    """A form as a stream: its head, a file, its tail; read again from the start after `seek(0)`."""

    def __init__(self, head: bytes, path: Path, tail: bytes) -> None:
        self._head, self._path, self._tail = head, path, tail
        self.size = len(head) + path.stat().st_size + len(tail)
        self._chunks = self._read()
        self._left = b""

    def _read(self) -> Iterator[bytes]:
        yield self._head
        with self._path.open("rb") as file:
            while data := file.read(256 << 10):
                yield data
        yield self._tail

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        while size < 0 or len(self._left) < size:
            data = next(self._chunks, b"")
            if not data:
                break
            self._left += data
        taken = self._left if size < 0 else self._left[:size]
        self._left = self._left[len(taken) :]
        return taken

    def seek(self, place: int) -> None:
        """From the start again."""
        assert place == 0
        self._chunks, self._left = self._read(), b""


def _await_file(connection: Connection, file: str) -> None:
    for _ in range(_MOST_LOOKS):
        found = connection.get(f"/learning/files/{quoted(file)}")
        state = str(found.get("status") or found.get("state") or found.get("storage_state") or "ready").lower()
        if state in _READY:
            return
        if state in ("error", "failed"):
            raise ServerError(f"the server cannot use the file: {found.get('message') or state}")
        connection.pause(_LOOK_SECONDS)
    raise ServerError("the server is still looking at the file", hint="try again later")


def follow(connection: Connection, job: str, *, told: Callable[[str], None], poll_seconds: float) -> dict[str, Any]:
    """Ask after the job until it ends; its events are told as they come. Returns the job."""
    seen = 0
    while True:
        page = connection.get(f"/learning/jobs/{quoted(job)}/events", since_seq=seen, limit=200)
        for event in page.get("events") or page.get("data") or []:
            if int(event.get("seq") or 0) > seen:
                seen = int(event["seq"])
                told(str(event.get("message") or event.get("type")))
        found: dict[str, Any] = connection.get(f"/learning/jobs/{quoted(job)}")
        if str(found.get("status") or found.get("state") or "").lower() in _FINAL:
            return found
        connection.pause(poll_seconds)


def find_model(job: dict[str, Any]) -> str | None:
    """The id of the result, wherever the server put it."""
    result = job.get("result")
    inner = result.get("model_id") if isinstance(result, dict) else None
    return job.get("fine_tuned_model") or inner
