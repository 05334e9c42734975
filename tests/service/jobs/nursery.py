"""A process that has imported everything once, and forks workers and trainers that ask for it through a socket.

What it forks is like any other process: a session of its own, a pid of its own, and killed by the same signals. None of
them is a child of who asked, as after a restart of the worker.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from luthier.jobs.attempt import LOG, Identity
from luthier.jobs.capacity import Capacity
from luthier.jobs.job import Timings
from luthier.jobs.launchers import Launch
from luthier.jobs.launchers.local import LocalLauncher, trainer_environment
from luthier.jobs.processes import when_started
from luthier.jobs.worker import Worker, WorkerSettings
from tests.service.jobs.hooks import fork_shares

ROOT = Path(__file__).parents[3]
PRELOADED = (
    "torch",
    "transformers.models.qwen3.modeling_qwen3",
    "luthier.engines.torch.engine",
    "luthier.workflow",
    "luthier.training.session",
    "luthier.training.planner",
    "luthier.adapters.verify",
    "luthier.reports.write",
    "luthier.jobs.child",
    "luthier.jobs.queue",
    "luthier.jobs.files",
    "luthier.jobs.reaper",
    "sqlalchemy.dialects.sqlite.pysqlite",
)


def end_with_parent() -> None:
    """No process is left behind when the tests are killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


def ask(path: str, order: Mapping[str, Any]) -> dict[str, Any]:
    """One question to the nursery, and its answer."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(path)
        line.sendall(json.dumps(order).encode() + b"\n")
        with line.makefile() as answers:
            answer: dict[str, Any] = json.loads(answers.readline())
    return answer


class ForkLauncher(LocalLauncher):
    """The local launcher, with forks of the nursery in place of new interpreters."""

    def __init__(self, home: Path, nursery: str, more: Mapping[str, str]) -> None:
        super().__init__(home, None)
        self._nursery, self._given = nursery, dict(more)

    def submit(self, launch: Launch) -> Identity:
        environment = trainer_environment(self._home, None, tokens=launch.folder.parent)
        environment |= {"OMP_NUM_THREADS": "1", **self._given}
        order = {"what": "trainer", "folder": str(launch.folder), "env": environment, "log": str(launch.folder / LOG)}
        pid = int(ask(self._nursery, order)["pid"])
        return Identity(pid, when_started(pid) or "", launch.token)

    def capacity(self) -> Capacity:
        """Always the same, whatever else the machine does."""
        return Capacity(processors=2, memory_bytes=8 << 30)


def work(order: Mapping[str, Any], path: str) -> int:
    """What a forked worker does."""
    import logging

    logging.basicConfig(level=logging.INFO, force=True, format="%(relativeCreated)d %(message)s")
    if order["hook"]:
        module, _, name = order["hook"].partition(":")
        getattr(importlib.import_module(module), name)()
    home = Path(order["home"])
    settings = WorkerSettings(home, timings=Timings(**order["timings"]), slots=order["slots"])
    Worker(settings, launcher=ForkLauncher(home, path, order["trainer_env"])).run()
    return 0


def train(order: Mapping[str, Any], _: str) -> int:
    """What a forked trainer does."""
    from luthier.jobs.child import main

    fork_shares()
    os.chdir(order["folder"])
    return main(order["folder"])


ROLES: dict[str, Callable[[Mapping[str, Any], str], int]] = {"worker": work, "trainer": train}


def bear(order: Mapping[str, Any], path: str, door: socket.socket) -> int:
    """Fork; the pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        end_with_parent()
        os.setsid()
        door.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in (1, 2):
            os.dup2(os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
        os.environ.clear()
        os.environ.update(order["env"])
        code = ROLES[order["what"]](order, path)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve(path: str) -> None:
    """Answer until killed."""
    end_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who ends is forgotten at once
    for name in PRELOADED:
        importlib.import_module(name)
    from tests.certifying import never_start_a_process

    never_start_a_process()
    assert threading.active_count() == 1
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(path)
        door.listen()
        while True:
            line, _ = door.accept()
            with line, line.makefile("rw") as file:
                order = json.loads(file.readline())
                file.write(json.dumps({"pid": bear(order, path, door)}) + "\n")


@dataclass
class Forked:
    """A worker of the nursery."""

    pid: int
    log: Path
    started: str

    def signal(self, name: str) -> None:
        os.kill(self.pid, signal.Signals[name])

    @property
    def is_there(self) -> bool:
        return when_started(self.pid) == self.started

    def wait(self) -> None:
        """Until it is gone."""
        until = time.monotonic() + 60
        while self.is_there:
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.005)


class Nursery:
    """The process, seen from the tests."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "nursery")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.service.jobs.nursery", self.path], cwd=ROOT, env=environment
        )
        until = time.monotonic() + 120
        while not Path(self.path).exists():
            assert self._process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)

    def start_worker(
        self,
        home: Path,
        timings: Timings,
        *,
        hook: str = "",
        slots: int | None = None,
        trainer_env: Mapping[str, str] | None = None,
    ) -> Forked:
        """A worker for this home."""
        log = home / f"worker_{time.monotonic_ns()}.log"
        order = {
            "what": "worker",
            "home": str(home),
            "timings": asdict(timings),
            "hook": hook,
            "slots": slots,
            "trainer_env": dict(trainer_env or {}),
            "env": {**os.environ, "OMP_NUM_THREADS": "1"},
            "log": str(log),
        }
        pid = int(ask(self.path, order)["pid"])
        return Forked(pid, log, when_started(pid) or "")

    def close(self) -> None:
        """End it, and all that it bore with it."""
        self._process.kill()
        self._process.wait()


if __name__ == "__main__":
    serve(sys.argv[1])
