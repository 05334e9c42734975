"""A server that lies gets nothing written where it should not, and a download that broke off goes on."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import orjson
import pytest

from luthier.client.address import Address
from luthier.client.connection import Connection
from luthier.client.results import download
from luthier.errors import ServerError, ServerGoneError

CONTENT = bytes(range(256)) * 4000


class _Odd(BaseHTTPRequestHandler):
    """Lists what it was told to, and breaks each download off in the middle the first time."""

    server: Any

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Range"), self.headers.get("Authorization")))
        if self.path.endswith("/artefacts"):
            self._send(200, orjson.dumps({"artefacts": self.server.listed}))
            return
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if start or not self.server.breaks else body[: len(body) // 2])
        if not start and self.server.breaks:
            self.connection.close()

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def odd_server(listed: list[dict[str, Any]], *, breaks: bool = False) -> Iterator[tuple[Connection, Any]]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Odd)
    server.listed, server.breaks, server.asked = listed, breaks, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Connection(Address(f"http://127.0.0.1:{server.server_port}", "k"), pause=lambda _: None), server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def entry(path: str, *, digest: str | None = None) -> dict[str, Any]:
    right = hashlib.sha256(CONTENT).hexdigest()
    return {"path": path, "bytes": len(CONTENT), "sha256": right if digest is None else digest}


def test_what_broke_off_goes_on_from_there_and_is_not_fetched_twice(tmp_path: Path) -> None:
    with odd_server([entry("a/weights.bin")], breaks=True) as (connection, server):
        folder = download(connection, "job", tmp_path, told=lambda _: None)
        assert (folder / "a/weights.bin").read_bytes() == CONTENT
        ranges = [asked for path, asked, _ in server.asked if path.endswith("weights.bin")]
        assert ranges[0] is None
        assert ranges[1:]
        assert all(asked and asked.startswith("bytes=") for asked in ranges[1:])
        assert {key for _, _, key in server.asked} == {"Bearer k"}
        count = len(server.asked)
        download(connection, "job", tmp_path, told=lambda _: None)
        assert len(server.asked) == count + 1
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["weights.bin"]


@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/../../out", "a\\..\\out", "a\0b", ""])
def test_nothing_is_written_outside_of_the_folder(name: str, tmp_path: Path) -> None:
    with (
        odd_server([entry(name)]) as (connection, _),
        pytest.raises(ServerError, match="outside of the job's folder"),
    ):
        download(connection, "job", tmp_path / "runs", told=lambda _: None)
    assert not list(tmp_path.rglob("*out*"))


def test_other_bytes_than_were_announced_are_thrown_away(tmp_path: Path) -> None:
    with odd_server([entry("a", digest="0" * 64)]) as (connection, _), pytest.raises(ServerError, match="other bytes"):
        download(connection, "job", tmp_path, told=lambda _: None)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_checkpoints_stay_there_unless_they_are_wanted(tmp_path: Path) -> None:
    listed = [entry("final_lora_weights/a"), entry("checkpoint_step_5/a"), entry("training_state/step_5/a")]
    with odd_server(listed) as (connection, _):
        folder = download(connection, "job", tmp_path, told=lambda _: None)
        assert {path.parent.name for path in folder.rglob("a")} == {"final_lora_weights"}
        download(connection, "job", tmp_path, everything=True, told=lambda _: None)
        assert len(list(folder.rglob("a"))) == 3


def test_a_server_that_is_not_there_is_told_after_some_tries() -> None:
    waits: list[float] = []
    connection = Connection(Address("http://127.0.0.1:9", "k"), pause=waits.append)
    with pytest.raises(ServerGoneError, match="cannot be reached"):
        connection.get("/x")
    assert len(waits) == 5
    assert max(waits) <= 10
    with pytest.raises(ServerGoneError):
        connection.call("POST", "/x", json={})
    assert len(waits) == 5  # what might be done twice is not tried again
