"""A worker and its trainer as they are started for real: new interpreters, the server's pipe, and what they know."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.jobs.job import State, Timings
from luthier.jobs.launchers.local import ALLOWED, ALLOWED_ONLINE, trainer_environment
from luthier.jobs.processes import session_of, when_started
from luthier.jobs.worker import DATABASE_VARIABLE, WorkerSettings, read_settings, worker_command
from tests.service.jobs.desk import Desk, check_history, tables, wait_until
from tests.unit.training.works import NEEDS_TORCH

pytestmark = [pytest.mark.slow, *NEEDS_TORCH]
ROOT = Path(__file__).parents[3]
GIVEN = {"LUTHIER_HOME", "LUTHIER_TOKENS", "LUTHIER_MEMORY_BYTES", "OMP_NUM_THREADS"}
QUIET = {"HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "USE_HUB_KERNELS"}


@pytest.fixture
def plain_desk(tmp_path: Path) -> Iterator[Desk]:
    """A desk whose workers are started by the test, with the timings of every day."""
    opened = Desk(tmp_path / "service", timings=Timings())
    yield opened
    opened.close()


def start(desk: Desk, log: Path) -> subprocess.Popen[bytes]:
    secret = f"sqlite:///{desk.home / 'luthier.db'}"
    command, more = worker_command(WorkerSettings(desk.home, secret), follows_stdin=True)
    assert secret not in command
    environment = {
        **os.environ,
        **more,
        "PYTHONPATH": str(ROOT / "src"),
        "HF_TOKEN": "hf_secret",
        "MY_PASSWORD": "secret",
    }
    with log.open("ab") as said:
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stderr=said)


def test_a_worker_ends_with_its_server_and_the_trainer_goes_on(plain_desk: Desk, tmp_path: Path) -> None:
    desk, log = plain_desk, tmp_path / "worker.log"
    job = desk.enqueue(tables(optim__steps=10))
    worker = start(desk, log)
    pid = desk.trainer(job)
    names = wait_until(lambda: {each.partition("=")[0] for each in environment_of(pid)} - {""} or None)
    assert names <= ALLOWED | ALLOWED_ONLINE | GIVEN | QUIET, names
    assert not any("secret" in each for each in environment_of(pid))
    assert pid in session_of(pid)
    assert os.getsid(pid) == pid
    desk.wait_for_event(job, "run_started")
    assert worker.stdin
    worker.stdin.close()
    assert worker.wait(20) == 0
    assert when_started(pid) is not None
    with start(desk, log) as second:
        desk.wait_for_state(job, State.SUCCEEDED)
        second.terminate()
        assert second.wait(20) == 0
    assert [(each.pid, each.ending) for each in desk.attempts(job)] == [(pid, "succeeded")]
    check_history(desk, job)
    assert (desk.run(job) / "certificate.json").is_file()
    assert (desk.run(job) / "finetune_report.md").is_file()


def environment_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


def test_with_a_models_folder_nothing_is_fetched() -> None:
    given = {"PATH": "p", "HF_TOKEN": "t", "HTTPS_PROXY": "user:word@proxy", "SYNTH_API_KEY": "k"}
    offline = trainer_environment(Path("home"), Path("models"), inherited=given)
    assert offline["HF_HUB_OFFLINE"] == "1"
    assert offline["LUTHIER_MODELS"] == "models"
    assert not {"HF_TOKEN", "SYNTH_API_KEY", "HTTPS_PROXY"} & set(offline)
    online = trainer_environment(Path("home"), None, inherited=given)
    assert "HF_HUB_OFFLINE" not in online
    assert online["HTTPS_PROXY"] == "user:word@proxy"


def test_settings_survive_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = WorkerSettings(
        tmp_path, "postgresql://u:p@h/d", tmp_path / "models", slots=3, offers={"H100": "cpu"}, most_running=2
    )
    command, environment = worker_command(wanted)
    assert command[:4] == [sys.executable, "-P", "-m", "luthier.jobs.worker"]
    monkeypatch.setenv(DATABASE_VARIABLE, environment[DATABASE_VARIABLE])
    assert read_settings(command[4:]) == (wanted, False)
