"""What a test changes in a child before its command runs, so that a moment can be met for certain."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

from luthier.cli import rank
from luthier.engines import registry
from luthier.runs import checkpoints
from luthier.training import launch, session


def wait_in_step() -> None:
    """The second micro-batch never ends by itself: it waits for signals."""

    def find(kind: str) -> Any:
        build = registry.find_engine(kind)

        def build_waiting(*args: Any, **options: Any) -> Any:
            engine = build(*args, **options)
            compute, calls = engine.forward_backward, []

            def wait(batch: Any, loss: Any) -> Any:
                calls.append(batch)
                while len(calls) == 2:
                    signal.pause()
                return compute(batch, loss)

            engine.forward_backward = wait
            return engine

        return build_waiting

    session.find_engine = find


def believe_in_room() -> None:
    """Nobody looks whether the disk has room, so that the disk itself has to say no."""
    checkpoints.reserve_check = lambda *_: None


class Forked:
    """What the launcher needs of subprocess.Popen, made by a fork: a process like the other, without its start."""

    module = "luthier.cli.rank"
    work = staticmethod(rank.main)

    def __init__(self, argv: list[str], env: dict[str, str], stdout: Any, stderr: Any, process_group: int) -> None:
        assert argv[1:3] == ["-m", self.module]
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 70
        try:
            os.setpgid(0, process_group)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            for number, file in ((1, stdout), (2, stderr)):
                if file:
                    os.dup2(file.fileno(), number)
            os.environ.update(env)
            code = self.work(argv[3:])
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("fork", timeout)
            select.select([], [], [], 0.005)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork_ranks() -> None:
    """The processes of a run are forks of the command's own."""
    launch.subprocess = SimpleNamespace(Popen=Forked, TimeoutExpired=subprocess.TimeoutExpired)
