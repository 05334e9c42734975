"""Kill -9 of the server and of the model's process at random moments: a client's loop goes on, with the same results.

A few kills by default; LUTHIER_KILLS says how many instead.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.service.process import Server, source_environment

pytest.importorskip("tinker")
pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("LUTHIER_KILLS", "2"))
SEED = int(os.environ.get("LUTHIER_KILL_SEED", "5"))
_CLIENT = Path(__file__).with_name("client_loop.py")
_LATEST_SECONDS = 0.25


class Mortal(Server):
    """A server whose model process can be killed, too."""

    def kill_host(self) -> None:
        """Kill -9 whatever of its children holds a model; nothing where none does."""
        assert self.process
        for pid in children_of(self.process.pid):
            if b"luthier.host.process" in command_of(pid):
                os.kill(pid, signal.SIGKILL)


def children_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(each) for path in found for each in path.read_text().split()]


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


class Client:
    """A training loop in a process of its own."""

    def __init__(self, server: Server, steps: int | None = None) -> None:
        command = [sys.executable, str(_CLIENT), server.url, server.key, *([] if steps is None else [str(steps)])]
        environment = {"TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=source_environment(environment),
        )
        self._errors: list[str] = []
        assert self._process.stderr
        self._listening = threading.Thread(target=self._errors.extend, args=(self._process.stderr,), daemon=True)
        self._listening.start()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        self._listening.join()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert stream
            stream.close()

    def next(self) -> dict[str, Any]:
        """What it tells next."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "the client ended:\n" + "".join(self._errors[-20:])
        found: dict[str, Any] = json.loads(line)
        return found

    def finish(self) -> dict[str, Any]:
        """Have it stop after the step it is at; all that it was told."""
        assert self._process.stdin
        if not self._process.stdin.closed:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        while "told" not in (found := self.next()):
            pass
        return found


def read_weights(home: Path, path: str) -> bytes:
    run, kind, _ = path.removeprefix("tinker://").split("/")
    (folder,) = (home / "live" / run.replace(":", "_")).glob(f"{kind}_*")
    return (folder / "adapter_model.safetensors").read_bytes()


def count_steps(home: Path, path: str) -> int:
    """The optimizer steps that the log counted up to a checkpoint."""
    with closing(sqlite3.connect(home / "luthier.db")) as connection:
        return int(connection.execute("SELECT steps FROM live_checkpoints WHERE path = ?", (path,)).fetchone()[0])


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mortal]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = Mortal(tmp_path, "--limit", "live_snapshot_seconds=0.5")
    found.start()
    yield found
    if found.process:
        found.stop()


def test_kills_lose_and_double_no_step(server: Mortal) -> None:
    chance = random.Random(SEED)
    victims = [chance.random() < 0.5 for _ in range(KILLS)]
    if KILLS > 1:
        victims[:2] = [True, False]  # each of the two at least once
    with Client(server) as client:
        client.next()
        for is_server in victims:
            threading.Event().wait(chance.uniform(0, _LATEST_SECONDS))  # any moment of a step
            if is_server:
                server.kill()
                server.start()
            else:
                server.kill_host()
            client.next()
        disturbed = client.finish()
    with Client(server, disturbed["steps"]) as client:
        calm = client.finish()
    assert count_steps(server.home, disturbed["path"]) == disturbed["steps"]
    assert disturbed["told"] == calm["told"]
    assert read_weights(server.home, disturbed["path"]) == read_weights(server.home, calm["path"])
