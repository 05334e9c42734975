"""The client's commands against a real server: submit, follow over its death, stop looking, fetch, and speak Synth."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from luthier.client.address import Address
from luthier.client.connection import Connection
from luthier.client.follow import JobEvent, follow
from luthier.client.submit import Submission, send
from luthier.jobs.database import Database
from luthier.jobs.job import NewEvent, Outcome, WorkerRow
from luthier.jobs.queue import Queue
from luthier.runs.resolve import find_resolved
from tests.builders import chat_row, write_jsonl
from tests.service.process import ROOT, Server, run, running
from tests.serving import MODEL, serve

_ENTRY = "from luthier.cli.main import entry; entry()"
# A shell that starts tests in the background has them ignore Ctrl-C, and their children with them.
_LISTENING = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {_ENTRY}"
ROOM = {"slots": 1, "processors": 4, "memory_bytes": 1 << 40, "devices": 0}
ROWS = [chat_row(f"copy {number}", f"{number}") for number in range(24)]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """One without workers: the test does their work."""
    with running(tmp_path) as found:
        yield found


def connect(server: Server) -> Connection:
    return Connection(Address(server.url, server.key), pause=lambda _: None, tries=60)


def submit(server: Server, place: Path) -> str:
    rows = write_jsonl(place / "rows.jsonl", ROWS)
    submission = Submission({"model": {"base": "practice"}, "data": {}}, {"train": rows})
    return str(send(connect(server), submission, lambda _: None)["id"])


class Worker:
    """Does a job's work straight in the database, as the worker process would."""

    def __init__(self, server: Server) -> None:
        self._queue = Queue(Database(f"sqlite:///{server.home / 'luthier.db'}"))
        row = WorkerRow("test", "here", ROOM, ROOM)
        checked = self._queue.claim(row)
        assert checked
        self._queue.validated(checked, needs={})
        claim = self._queue.claim(row)
        assert claim
        self.claim = claim
        self._queue.started(claim, pid=1, process_started="1", token="t")

    def report(self, first: int, last: int) -> None:
        self._queue.report(self.claim, [NewEvent("warned", f"event {n}") for n in range(first, last + 1)])

    def finish(self) -> None:
        self._queue.finish(self.claim, Outcome("succeeded", model=f"ft:practice:{self.claim.job.id}"))


def test_every_event_is_heard_once_though_the_server_dies(server: Server, tmp_path: Path) -> None:
    job = submit(server, tmp_path)
    worker = Worker(server)
    heard: list[JobEvent] = []
    reached, lost, done = threading.Event(), threading.Event(), threading.Event()

    def listen() -> None:
        for event in follow(connect(server), job, lost=lambda _: lost.set(), poll_seconds=0.05):
            heard.append(event)
            if event.message == "event 20":
                reached.set()
        done.set()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    worker.report(1, 20)
    assert reached.wait(30)
    server.kill()
    worker.report(21, 40)
    assert lost.wait(30)
    server.start()
    worker.report(41, 60)
    worker.finish()
    assert done.wait(30)
    assert [event.seq for event in heard] == list(range(1, len(heard) + 1))
    assert [event.message for event in heard if event.kind == "warned"] == [f"event {n}" for n in range(1, 61)]


def test_a_file_that_is_there_is_not_sent_again(server: Server, tmp_path: Path) -> None:
    first = submit(server, tmp_path)
    told: list[str] = []
    rows = write_jsonl(tmp_path / "same.jsonl", ROWS)
    made = send(connect(server), Submission({"model": {"base": "practice"}, "data": {}}, {"train": rows}), told.append)
    assert made["id"] != first
    assert len(told) == 1
    assert "is there already" in told[0]


def test_commands_list_show_and_stop(server: Server, tmp_path: Path) -> None:
    job = submit(server, tmp_path)
    asked = {"LUTHIER_SERVER": server.url, "LUTHIER_API_KEY": server.key}

    def call(*arguments: str) -> Any:
        done = run("jobs", *arguments, "--json", place=tmp_path, environment=asked)
        return done.returncode, json.loads(done.stdout)

    assert call("list")[1]["jobs"][0]["id"] == job
    assert call("show", job)[1]["state"] == "validating"
    assert call("cancel", job) == (0, call("show", job)[1])
    assert call("show", job)[1]["state"] == "cancelled"
    code, told = call("resume", job)
    assert (code, told["error"]["code"]) == (1, "conflict")
    code, told = call("show", "ftjob-nothere")
    assert (code, told["error"]["code"]) == (1, "not_found")
    plain = run("jobs", "list", place=tmp_path, environment=asked).stdout
    assert job in plain
    assert "cancelled" in plain


def test_who_stops_looking_leaves_the_job_alone(server: Server, tmp_path: Path) -> None:
    job = submit(server, tmp_path)
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "LUTHIER_SERVER": server.url, "LUTHIER_API_KEY": server.key}
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", _LISTENING, "jobs", "follow", job],
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        cwd=tmp_path,
    )
    assert child.stderr
    assert "created" in child.stderr.readline()
    child.send_signal(signal.SIGINT)
    rest = child.stderr.read()
    assert child.wait(30) == 130
    child.stderr.close()
    assert f"luthier jobs follow {job}" in rest
    assert connect(server).get(f"/luthier/v1/jobs/{job}")["state"] == "validating"


def test_a_dry_run_sends_nothing(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    done = run(
        *("train", "--model", "practice", "--data", "rows.jsonl", "--dry-run", "--json"),
        *("--server", "http://127.0.0.1:9"),
        place=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    payload = json.loads(done.stdout)["payload"]
    assert payload["spec"]["data"]["train"] == "rows.jsonl"
    assert payload["spec"]["model"] == {"base": "practice"}


@pytest.mark.slow
@pytest.mark.torch
def test_a_run_there_is_a_run_here(own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a spec to a certified result that local commands take, over both dialects."""
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    spec = ("--model", MODEL, "--data", "rows.jsonl", "--method", "lora", "--steps", "2", "--batch", "4")
    with serve(tmp_path / "there") as serving:
        asked = {"LUTHIER_API_KEY": serving.key, "LUTHIER_HOME": str(own_home)}
        asked["LUTHIER_MODELS"] = str(tmp_path / "there" / "models")
        more = ("--server", serving.url, "--json")
        done = run("train", *spec, "--set", "output.model_id_file=id.txt", *more, place=tmp_path, environment=asked)
        assert done.returncode == 0, done.stdout + done.stderr
        told = json.loads(done.stdout)
        job = told["job"]
        assert (tmp_path / "id.txt").read_text() == f"{job['model']}\n" == f"ft:{MODEL}:{job['id']}\n"
        verified = run("verify", told["folder"], "--json", place=tmp_path, environment=asked)
        assert verified.returncode == 0, verified.stdout + verified.stderr
        assert (tmp_path / told["folder"] / "finetune_report.html").is_file()
        write_jsonl(tmp_path / "valid.jsonl", ROWS[:4])
        job_toml = (
            f'[job]\nmodel = "{MODEL}"\ndata = "rows.jsonl"\n[compute]\ngpu_type = "H100"\ngpu_count = 1\n'
            "[hyperparameters]\nn_epochs = 1\nper_device_batch = 4\n"
        )
        (tmp_path / "job.toml").write_text(job_toml)
        done = run(
            *("train", "job.toml", "--dialect", "synth", "--poll-seconds", "0.2", *more),
            place=tmp_path,
            environment=asked,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(done.stdout)["job"]["fine_tuned_model"].startswith(f"ft:{MODEL}:")
    monkeypatch.setenv("LUTHIER_MODELS", str(tmp_path / "there" / "models"))
    assert find_resolved(job["model"]).adapters
