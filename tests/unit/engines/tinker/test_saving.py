"""What a checkpoint on a service leaves here: its paths as a file, and weights in PEFT's format."""

from __future__ import annotations

import io
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from luthier.engines.tinker.address import Service
from luthier.engines.tinker.connection import Connection
from luthier.engines.tinker.saving import Final, Place, Saving, find_place, read_state_path
from luthier.errors import CheckpointError
from luthier.runs import events
from luthier.weights.peft import AdapterConfig, read_adapter, write_adapter

CONFIG = AdapterConfig("practice", 4, 32.0, targets=("q_proj",))
LAYER = "model.layers.0.self_attn.q_proj"
TENSORS = {f"{LAYER}.lora_A": np.ones((4, 6), np.float32), f"{LAYER}.lora_B": np.full((5, 4), 2.0, np.float32)}
PATHS = {"weights": "tinker://run/weights/final", "sampler_weights": "tinker://run/sampler_weights/final"}
KEY = "tml-key"


@dataclass
class Files:
    """A service that gives archives, and who asked for what with which key."""

    service: Service
    content: dict[str, bytes]
    asked: list[tuple[str, str | None]]


@pytest.fixture
def files() -> Iterator[Files]:
    content: dict[str, bytes] = {}
    asked: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("X-API-Key")))
            if self.path.endswith("/archive") and "/stored" in content:
                self.send_response(302)
                self.send_header("Location", "/stored")
                self.end_headers()
                return
            found = content.get(self.path)
            self.send_response(404 if found is None else 200)
            self.send_header("Content-Type", "application/octet-stream")
            self.end_headers()
            self.wfile.write(found or b"")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Files(Service(f"http://127.0.0.1:{server.server_address[1]}", KEY), content, asked)
    server.shutdown()
    server.server_close()


class Done:
    """A future of the SDK that has its result, or failed."""

    def __init__(self, result: Any = None, error: Exception | None = None) -> None:
        self.inner: Future[Any] = Future()
        self.inner.set_result(result) if error is None else self.inner.set_exception(error)

    def result(self, timeout: float | None = None) -> Any:
        return self.inner.result(timeout)

    def future(self) -> Future[Any]:
        return self.inner


def final_of(files: Files, told: list[events.Event], config: AdapterConfig = CONFIG) -> Final:
    """The last checkpoint of a service that knows no export."""
    futures = {kind: Done(SimpleNamespace(path=path)) for kind, path in PATHS.items()}
    saving = Saving(Connection(files.service, told.append), "practice", "final", futures)
    return Final(saving, lambda: Done(error=RuntimeError("no such method")), config)


def pack(folder: Path) -> bytes:
    write_adapter(folder, CONFIG, TENSORS)
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as archive:
        archive.add(folder, arcname="some/folder")
        archive.addfile(tarfile.TarInfo("../escaped.txt"))
    return held.getvalue()


def test_paths_come_back_from_their_file(tmp_path: Path) -> None:
    place = Place("http://127.0.0.1:1", "practice", "step_0025", PATHS, "why not")
    place.write(tmp_path)
    assert find_place(tmp_path) == place
    assert read_state_path(tmp_path) == PATHS["weights"]
    assert find_place(tmp_path / "nowhere") is None


def test_a_folder_without_a_state_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="names no state"):
        read_state_path(tmp_path)
    (tmp_path / "tinker.json").write_text("[]")
    with pytest.raises(CheckpointError, match="cannot be read"):
        find_place(tmp_path)


def test_an_archive_is_fetched_where_there_is_no_export(files: Files, tmp_path: Path) -> None:
    files.content["/stored"] = pack(tmp_path / "packed")
    told: list[events.Event] = []
    (tmp_path / "final").mkdir()
    final_of(files, told).write(tmp_path / "final")
    config, tensors = read_adapter(tmp_path / "final")
    assert (config.rank, config.alpha, config.targets) == (4, 32.0, ("q_proj",))
    assert all(np.array_equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert sorted(path.name for path in (tmp_path / "final").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tinker.json",
    ]
    assert not (tmp_path / "escaped.txt").exists()
    assert told == [events.SavedOnService("final", PATHS)]
    # The key goes to the service, and not to where the service sends us.
    asked = "/api/v1/training_runs/run/checkpoints/sampler_weights/final/archive"
    assert files.asked == [(asked, KEY), ("/stored", None)]


def test_weights_that_cannot_be_fetched_stay_there_and_the_reason_is_kept(files: Files, tmp_path: Path) -> None:
    told: list[events.Event] = []
    folder = tmp_path / "final"
    folder.mkdir()
    final_of(files, told).write(folder)
    place = find_place(folder)
    assert place is not None
    assert dict(place.paths) == PATHS
    assert "no such method" in place.not_fetched
    assert "(404)" in place.not_fetched
    assert [path.name for path in folder.iterdir()] == ["tinker.json"]
    assert [type(event) for event in told] == [events.SavedOnService, events.Warned]


def test_an_adapter_that_is_not_the_one_that_was_trained_is_not_taken(files: Files, tmp_path: Path) -> None:
    files.content["/stored"] = pack(tmp_path / "packed")
    (tmp_path / "final").mkdir()
    final_of(files, [], AdapterConfig("practice", 8, 32.0)).write(tmp_path / "final")
    place = find_place(tmp_path / "final")
    assert place is not None
    assert "rank 4 and scale 8, and not rank 8 and scale 4" in place.not_fetched
