"""Commands of ours as processes of their own: started, watched by their events, and ended by their own pid."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.runs.events import read_events

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 120.0


def find_runs(folder: Path) -> list[Path]:
    """Run folders, the oldest first."""
    made = sorted(folder.glob("*/finetune_config.yaml"), key=lambda path: path.stat().st_ctime)
    return [path.parent for path in made]


def wait_until(found: Callable[[], Any], is_over: Callable[[], bool] = lambda: False) -> Any:
    """Look again and again until there is something; an end without it fails the test."""
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        over = is_over()
        if there := found():
            return there
        assert not over, "the process ended before what was waited for"
        select.select([], [], [], 0.002)
    raise AssertionError(f"nothing for {PATIENCE_SECONDS:.0f} s")


def _count_told(folder: Path) -> dict[Path, int]:
    return {path: len(read_events(path)) for path in folder.glob("runs/*/events.jsonl")}


@dataclass
class Child:
    """One running command."""

    pid: int
    folder: Path
    out_path: Path
    err_path: Path
    wait_for_code: Callable[[], int]
    told_before: dict[Path, int]
    """How many events each run had before this process began."""
    resumed: Path | None = None
    code: int | None = None

    def signal(self, name: str) -> None:
        """Send a signal to this process alone."""
        os.kill(self.pid, signal.Signals[name])

    def wait(self) -> int:
        """Its exit code; the number of a signal that ended it is negative."""
        if self.code is None:
            self.code = self.wait_for_code()
        return self.code

    def ends(self, code: int) -> Child:
        """It ends with this code, and what it said is shown when it does not."""
        assert self.wait() == code, f"exit code {self.code}\n{self.out}\n{self.err}"
        return self

    @property
    def out(self) -> str:
        """What it wrote on stdout so far."""
        return self.out_path.read_text("utf-8") if self.out_path.exists() else ""

    @property
    def err(self) -> str:
        """What it wrote on stderr so far."""
        return self.err_path.read_text("utf-8") if self.err_path.exists() else ""

    @property
    def run(self) -> Path:
        """The run that it resumed, or the folder that it made."""
        if self.resumed:
            return self.resumed

        def find() -> list[Path]:
            return [run for run in find_runs(self.folder / "runs") if run / "events.jsonl" not in self.told_before]

        folder: Path = wait_until(find, self._is_over)[-1]
        return folder

    def wait_for_event(self, kind: str, count: int = 1, **facts: Any) -> dict[str, Any]:
        """The n-th event of this kind in the run folder since this process began."""
        seen = self.run / "events.jsonl"

        def find() -> dict[str, Any] | None:
            told = read_events(seen)[self.told_before.get(seen, 0) :]
            wanted = {"kind": kind, **facts}.items()
            fitting = [each for each in told if wanted <= {key: each.get(key) for key in dict(wanted)}.items()]
            return fitting[count - 1] if len(fitting) >= count else None

        found: dict[str, Any] = wait_until(find, self._is_over)
        return found

    def _is_over(self) -> bool:
        if self.code is not None:
            return True
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True


class Nursery:
    """Starts children by forking them from a process that is ready."""

    def __init__(self, *preloaded: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.runs.nursery", *preloaded],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == {"ready": True}
        self._number = 0

    def start(self, *argv: object, folder: Path, hook: str = "", **env: str) -> Child:
        """Run `luthier ARGV` in a folder."""
        self._number += 1
        said = [folder / f"{name}_{self._number}.txt" for name in ("out", "err")]
        order = {
            "argv": [str(each) for each in argv],
            "cwd": str(folder),
            "env": {**os.environ, "OMP_NUM_THREADS": "1", **env},
            "hook": hook,
            "out": str(said[0]),
            "err": str(said[1]),
        }
        told = _count_told(folder)
        pid = int(self._ask(order)["pid"])
        resumed = folder / str(argv[1]) if argv[0] == "resume" else None
        return Child(pid, folder, *said, lambda: int(self._ask({"wait": pid})["code"]), told, resumed)

    def close(self) -> None:
        """End the process; its children end with it."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(10)

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        there, _, _ = select.select([self._process.stdout], [], [], PATIENCE_SECONDS)
        assert there, "a process did not end in time"
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found


def start_plainly(*argv: object, folder: Path, **env: str) -> Child:
    """Run `luthier ARGV` as a person does, every import included."""
    said = [folder / f"plain_{time.monotonic_ns()}_{name}.txt" for name in ("out", "err")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    told = _count_told(folder)
    with said[0].open("wb") as out, said[1].open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-c", "from luthier.cli.main import entry; entry()", *(str(each) for each in argv)],
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=err,
        )
    return Child(process.pid, folder, *said, lambda: process.wait(PATIENCE_SECONDS), told)
