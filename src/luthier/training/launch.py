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
from pathlib import Path

from luthier.errors import ProcessDiedError

_GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.1
_LAST_WORDS_SECONDS = 5.0
_ASKED_TO_STOP = (0, 128 + signal.SIGINT, 128 + signal.SIGTERM)


def run_processes(arguments: Sequence[str], count: int, logs: Path, *, quiet: bool = False) -> int:
    """Run `python ARGUMENTS` as `count` processes that know of each other; returns the leading one's exit code.

    A process that dies ends the others, and the error names it. What the others say lies in `logs`.
    """
    environment = {**os.environ, **_shared_environment(count)}
    with ExitStack() as stack:
        children = []
        for rank in range(count):
            said = None if rank == 0 and not quiet else stack.enter_context((logs / f"process_{rank}.log").open("wb"))
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            child = subprocess.Popen([sys.executable, *arguments], env=own, stdout=said, stderr=said)  # noqa: S603
            children.append(child)
        stack.enter_context(_passing_signals(children))
        try:
            return _wait(children)
        finally:
            _end(children)


def _shared_environment(count: int) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    if sys.platform == "linux":
        shared["GLOO_SOCKET_IFNAME"] = "lo"
    return shared


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for the leading process, which speaks for itself; of the others any failure ends the run."""
    while True:
        codes = [child.poll() for child in children]
        killed = [rank for rank, code in enumerate(codes) if code is not None and code < 0]
        if killed:
            raise _died(children, killed[0], codes[killed[0]])
        if codes[0] is not None:
            return codes[0]
        failed = [rank for rank, code in enumerate(codes) if code is not None and code not in _ASKED_TO_STOP]
        if failed:
            # It may have failed only because the leading one did, which then says why.
            with suppress(subprocess.TimeoutExpired):
                return children[0].wait(_LAST_WORDS_SECONDS)
            raise _died(children, failed[0], codes[failed[0]])
        time.sleep(_POLL_SECONDS)


def _died(children: Sequence[subprocess.Popen[bytes]], rank: int, code: int | None) -> ProcessDiedError:
    return ProcessDiedError(
        f"process {rank} of {len(children)} {_how(code)}; the others were ended",
        hint="`luthier resume RUN` goes on from the last checkpoint; free memory first if it was killed",
    )


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask those still running to go, and make them after a while."""
    for child in children:
        if child.poll() is None:
            child.terminate()
    until = time.monotonic() + _GRACE_SECONDS
    for child in children:
        try:
            child.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextmanager
def _passing_signals(children: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """What this process is told is passed on; a Ctrl-C reaches the children from the terminal itself."""

    def pass_on(number: int, _: object) -> None:
        if number == signal.SIGINT and sys.stdin is not None and sys.stdin.isatty():
            return
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
