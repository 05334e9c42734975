"""Processes as the system knows them: when one began, who is in a session, and how a whole session is ended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_STATE, _SESSION, _STARTED = 0, 3, 19
"""Places in /proc/PID/stat, counted from behind the name."""


def when_started(pid: int) -> str | None:
    """When this process began, in the system's own words; None when it is gone or only waits to be forgotten."""
    if not Path("/proc/self/stat").exists():
        return _asked_of_ps(pid)
    facts = _facts(pid)
    return None if facts is None or facts[_STATE] in "ZX" else facts[_STARTED]


def session_of(leader: int) -> list[int]:
    """The processes of a session, also when its leader is gone already."""
    return [pid for pid in _all_pids() if (facts := _facts(pid)) and int(facts[_SESSION]) == leader]


def end_session(leader: int) -> None:
    """Kill every process of a session, its leader last. What leaves the session on the way is caught by its group."""
    for pid in [each for each in session_of(leader) if each not in (leader, os.getpid())]:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def end_own_session() -> None:
    """Kill this process, and all that it started where it leads a session of its own."""
    if os.getsid(0) == os.getpid():
        end_session(os.getpid())
    os.kill(os.getpid(), signal.SIGKILL)


def _all_pids() -> Iterator[int]:
    with suppress(OSError):
        yield from (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())


def _facts(pid: int) -> list[str] | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii", errors="replace").rpartition(") ")[2].split()
    except OSError:
        return None


def _asked_of_ps(pid: int) -> str | None:
    """Where the system has no /proc."""
    command = shutil.which("ps")
    if command is None:
        return None
    asked = [command, "-o", "state=,lstart=", "-p", str(pid)]
    said = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False).stdout.strip()  # noqa: S603
    return None if not said or said.startswith("Z") else said.partition(" ")[2].strip()
