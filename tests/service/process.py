"""A server in a process of its own on one port, which a test kills and starts again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from tests.serving import ROOT

PATIENCE_SECONDS = 120.0
_ENTRY = "from luthier.cli.main import entry; entry()"


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def source_environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """This process's environment, with the source of this checkout first."""
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(more or {})}


class Server:
    """`luthier serve`, which may die and come again; its key stays."""

    def __init__(self, place: Path, *flags: str, workers: int = 0) -> None:
        self.home, self.log = place / "server", place / "server.log"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.key = ""
        self._flags = ("--workers", str(workers), *flags)
        self._place = place
        self.process: subprocess.Popen[str] | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The key, in a header."""
        return {"authorization": f"Bearer {self.key}"}

    def start(self, *, environment: dict[str, str] | None = None) -> dict[str, Any]:
        """Start it, and wait until it says where it is."""
        command = [sys.executable, "-P", "-c", _ENTRY, "serve", "--json", "--port", str(self.port)]
        command += ["--home", str(self.home), *self._flags]
        env = source_environment(environment)
        with self.log.open("a") as said:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=said, text=True, env=env, cwd=self._place
            )
        assert self.process.stdout
        text = ""
        for line in self.process.stdout:
            text += line
            if line == "}\n":
                break
        assert text.endswith("}\n"), f"the server did not start:\n{text}{self.log.read_text()}"
        told: dict[str, Any] = json.loads(text)
        self.key = told["key"] or self.key
        return told

    def kill(self) -> None:
        """Kill -9, and wait until it is gone."""
        assert self.process
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(PATIENCE_SECONDS)
        self._close()

    def stop(self) -> int:
        """SIGTERM, as a service manager does; returns the exit code."""
        assert self.process
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(PATIENCE_SECONDS)
        self._close()
        return code

    def _close(self) -> None:
        assert self.process
        if self.process.stdout:
            self.process.stdout.close()
        self.process = None

    def client(self, **more: Any) -> httpx2.Client:
        """A client with the key."""
        return httpx2.Client(base_url=self.url, headers=self.headers, timeout=PATIENCE_SECONDS, **more)


@contextmanager
def running(place: Path, *flags: str, workers: int = 0) -> Iterator[Server]:
    """A server that has started, and that ends with the block."""
    server = Server(place, *flags, workers=workers)
    server.start()
    try:
        yield server
    finally:
        if server.process:
            server.stop()


def run(*arguments: str, place: Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A command of ours, to its end."""
    env = source_environment(environment)
    command: Sequence[str] = [sys.executable, "-P", "-c", _ENTRY, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=place, timeout=PATIENCE_SECONDS)
