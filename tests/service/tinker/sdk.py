"""The practice model served under its own path, for the Tinker SDK of this environment, and what clients of it do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.runs.resolve import practice_folder
from tests.service.process import running

SECONDS = 300
# One thread for each product: two cores are shared with the client, and the results are the same.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Served:
    """Where the server is, a key, and the name of its model, which is a folder."""

    url: str
    key: str
    model: str


@contextmanager
def serve_practice(place: Path, *flags: str) -> Iterator[Served]:
    """A server that ends with the block."""
    folder = place / "models" / "own" / "practice"
    shutil.copytree(practice_folder(), folder)
    kept = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        with running(place, "--model", str(folder), *flags) as server:
            yield Served(server.url, server.key, str(folder))
    finally:
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def run_client(script: str, served: Served, place: Path) -> Any:
    """What a script of this folder says at its end; the SDK runs in a process of its own, as it does for its users."""
    command = [sys.executable, Path(__file__).parent / script, served.url, served.key, served.model]
    done = subprocess.run(
        [str(each) for each in command], capture_output=True, text=True, cwd=place, env={**os.environ, **_ENVIRONMENT},
        timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])
