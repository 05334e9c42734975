"""Several processes for one run: started here, watched here, and ended together when one of them dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from luthier.errors import ProcessDiedError

PEER_DIED = 3
"""The exit code of a process that ended only because another one was gone; it leaves it to this one to name it."""
_GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.1
_LAST_WORDS_SECONDS = 5.0
_NOT_FAILED = (0, 128 + signal.SIGINT, 128 + signal.SIGTERM, PEER_DIED)


@dataclass
class _Children:
    """The processes of a run, and which signal they were asked to stop by."""

    processes: list[subprocess.Popen[bytes]]
    logs: Path
    asked: int = 0

    def codes(self) -> list[int | None]:
        return [each.poll() for each in self.processes]


def run_processes(arguments: Sequence[str], count: int, logs: Path, *, quiet: bool = False) -> int:
    """Run `python ARGUMENTS` as `count` processes that know of each other; returns the leading one's exit code.

    A process that dies ends the others, and the error names it. What the others say lies in `logs`.
    """
    environment = {**os.environ, **_shared_environment(count)}
    with ExitStack() as stack:
        children = _Children([], logs)
        stack.enter_context(_passing_signals(children))
        stack.callback(_end, children)
        for rank in range(count):
            said = None if rank == 0 and not quiet else stack.enter_context(_log_of(logs, rank).open("wb"))
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            child = subprocess.Popen(  # noqa: S603
                [sys.executable, *arguments], env=own, stdout=said, stderr=said, process_group=0
            )
            children.processes.append(child)
        return _wait(children)


def _log_of(logs: Path, rank: int) -> Path:
    return logs / f"process_{rank}.log"


def _shared_environment(count: int) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    if sys.platform == "linux":
        shared["GLOO_SOCKET_IFNAME"] = "lo"
    return shared


def _wait(children: _Children) -> int:
    """Wait for the leading process, which speaks for itself; of the others any failure ends the run."""
    while True:
        codes = children.codes()
        killed = [rank for rank, code in enumerate(codes) if code is not None and code < 0]
        if killed and codes[killed[0]] == -children.asked:
            return 128 + children.asked  # asked to stop before it could listen
        if killed:
            raise _died(children, killed[0], codes[killed[0]])
        if codes[0] is not None and codes[0] != PEER_DIED:
            return codes[0]
        failed = [rank for rank, code in enumerate(codes) if code is not None and code not in _NOT_FAILED]
        if failed or codes[0] == PEER_DIED:
            return _hear(children, failed)
        time.sleep(_POLL_SECONDS)


def _hear(children: _Children, failed: list[int]) -> int:
    """One has failed: who failed by itself, and not because another one was gone, is named."""
    until = time.monotonic() + _LAST_WORDS_SECONDS
    for child in children.processes:
        with suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, until - time.monotonic()))
    codes = children.codes()
    if codes[0] is not None and codes[0] not in (PEER_DIED, 0):
        if codes[0] > 0:
            return codes[0]
        raise _died(children, 0, codes[0])
    gone = [rank for rank, code in enumerate(codes) if code is not None and code not in _NOT_FAILED]
    rank = (gone or failed or [len(codes) - 1])[0]
    raise _died(children, rank, codes[rank])


def _died(children: _Children, rank: int, code: int | None) -> ProcessDiedError:
    how = _how(code)
    if words := _last_words(_log_of(children.logs, rank)):
        how = f"{how}: {words}"
    return ProcessDiedError(
        f"process {rank} of {len(children.processes)} {how}; the others were ended",
        hint="`luthier resume RUN` goes on from the last checkpoint; free memory first if it was killed",
        details={"process": rank, "exit_code": code},
    )


def _last_words(log: Path) -> str:
    """The error that a process ended with, as its log has it."""
    lines = log.read_text("utf-8", "replace").splitlines() if log.is_file() else []
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), "")


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _end(children: _Children) -> None:
    """Ask those still running to go, and make them after a while."""
    for child in children.processes:
        if child.poll() is None:
            child.terminate()
    until = time.monotonic() + _GRACE_SECONDS
    for child in children.processes:
        try:
            child.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextmanager
def _passing_signals(children: _Children) -> Iterator[None]:
    """What this process is told is passed on; the children have groups of their own, so no terminal tells them too."""

    def pass_on(number: int, _: object) -> None:
        children.asked = number
        for child in children.processes:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
