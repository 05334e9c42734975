"""Processes of one run: who ended, how, and what is said of it; the processes here are small scripts."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from luthier.errors import ProcessDiedError
from luthier.training import launch
from luthier.training.launch import PEER_DIED, run_processes

WAITS = "import signal, sys, os; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); open(f'up_{rank}', 'w')"
HEAD = f"import os; rank = int(os.environ['RANK']); {WAITS}; "


def run(script: str, folder: Path, patch: pytest.MonkeyPatch, count: int = 2) -> int:
    patch.chdir(folder)
    return run_processes(["-c", HEAD + script], count, folder, quiet=True)


def test_each_process_knows_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = "('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR')"
    assert run(f"print([os.environ[name] for name in {names}])", tmp_path, monkeypatch) == 0
    said = [(tmp_path / f"process_{rank}.log").read_text() for rank in range(2)]
    assert said == [f"['{rank}', '{rank}', '2', '127.0.0.1']\n" for rank in range(2)]


@pytest.mark.parametrize("code", [0, 1, 2, 130, 143])
def test_the_leading_process_speaks_for_the_run(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(f"sys.exit({code} if rank == 0 else 0)", tmp_path, monkeypatch) == code


def test_a_process_that_is_killed_ends_the_others_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    with pytest.raises(
        ProcessDiedError, match=r"^process 1 of 3 was ended by SIGKILL; the others were ended$"
    ) as caught:
        run("os.kill(os.getpid(), 9) if rank == 1 else signal.pause()", tmp_path, monkeypatch, count=3)
    assert caught.value.details == {"process": 1, "exit_code": -9}
    assert time.monotonic() - started < launch._GRACE_SECONDS


def test_the_last_words_of_a_process_that_failed_are_in_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        f"print('error: no memory', file=sys.stderr) if rank == 1 else None; sys.exit(1 if rank == 1 else {PEER_DIED})"
    )
    with pytest.raises(ProcessDiedError, match=r"^process 1 of 2 ended with exit code 1: no memory; the others"):
        run(script, tmp_path, monkeypatch)


def test_the_leading_process_that_failed_by_itself_is_not_talked_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("sys.exit(4 if rank == 0 else 1)", tmp_path, monkeypatch) == 4
    assert run(f"sys.exit(4 if rank == 0 else {PEER_DIED})", tmp_path, monkeypatch) == 4


def test_all_gone_because_of_each_other_is_still_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProcessDiedError, match=r"process 1 of 2 ended with exit code 3"):
        run(f"sys.exit({PEER_DIED})", tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("signal.pause()", 143),
        ("signal.signal(signal.SIGTERM, signal.SIG_DFL); signal.pause()", 143),
        ("signal.signal(signal.SIGINT, lambda *_: sys.exit(130)); signal.pause()", 130),
    ],
    ids=["listening", "not yet listening", "interrupted"],
)
def test_signals_are_passed_on(script: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = signal.SIGINT if code == 130 else signal.SIGTERM

    def send() -> None:
        while not all((tmp_path / f"ready_{rank}").exists() for rank in range(2)):
            os.sched_yield()
        os.kill(os.getpid(), name)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=send)
    thread.start()
    setup, _, wait = script.rpartition("; ")
    ready = f"{setup}; open(f'ready_{{rank}}', 'w'); {wait}" if setup else f"open(f'ready_{{rank}}', 'w'); {wait}"
    assert run(ready, tmp_path, monkeypatch) == code
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


def test_no_terminal_talks_to_them_beside_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("print(os.getpgid(0) == os.getpid())", tmp_path, monkeypatch) == 0
    assert (tmp_path / "process_1.log").read_text() == "True\n"


def test_who_does_not_go_is_made_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 0.1)
    stays = "signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"
    waits = "[None for _ in iter(lambda: os.path.exists('up_1'), True)]"
    code = f"exec({stays!r}) if rank else (exec({waits!r}), sys.exit(5))"
    assert run(code, tmp_path, monkeypatch) == 5
