"""Jobs that are paused, resumed and cancelled, checkpoints that are damaged, full disks, and clocks that jump."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.jobs.job import State
from luthier.jobs.processes import when_started
from tests.service.jobs.desk import PROJECT, Desk, check_history, tables, wait_until
from tests.service.jobs.nursery import Nursery
from tests.unit.training.works import NEEDS_TORCH, chat_rows

pytestmark = [pytest.mark.slow, *NEEDS_TORCH]
LONG = {"optim__steps": 80, "output__save_every_steps": 2}


@pytest.fixture(scope="module")
def undisturbed(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hash of the final adapter of the long job."""
    desk = Desk(tmp_path_factory.mktemp("whole"), nursery)
    try:
        job = desk.enqueue(tables(**LONG))
        desk.start_worker()
        desk.wait_for_state(job, State.SUCCEEDED)
        return desk.final_hash(job)
    finally:
        desk.close()


def test_a_paused_job_waits_and_goes_on_where_it_was_past_a_damaged_checkpoint(desk: Desk, undisturbed: str) -> None:
    desk.start_worker()
    job = desk.enqueue(tables(**LONG))
    desk.wait_for_event(job, "checkpoint_saved", step=4)  # of 80
    pid = desk.trainer(job)
    desk.store.pause(PROJECT, job)
    desk.wait_for_state(job, State.PAUSED)
    assert when_started(pid) is None
    stopped = desk.run_events(job)[-1]
    assert stopped["kind"] == "stopped"
    assert stopped["step"] >= 4
    assert [each.ending for each in desk.attempts(job)] == ["paused"]
    newest = max(desk.run(job).glob("checkpoint_step_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    weights = newest / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    desk.store.resume(PROJECT, job)
    desk.wait_for_state(job, State.SUCCEEDED)
    assert [each.ending for each in desk.attempts(job)] == ["paused", "succeeded"]
    kinds = [each.kind for each in desk.events(job)]
    assert "checkpoint_broken" in kinds
    assert kinds.count("run_started") == 2
    assert desk.final_hash(job) == undisturbed
    check_history(desk, job)


def test_a_cancelled_job_ends_its_trainer_and_nothing_else(desk: Desk) -> None:
    desk.start_worker(slots=2)
    jobs = [desk.enqueue(tables(optim__steps=100_000)) for _ in range(2)]
    pids = [desk.trainer(job) for job in jobs]
    desk.wait_for_event(jobs[0], "step_done", step=2)
    desk.store.cancel(PROJECT, jobs[0])
    done = desk.wait_for_state(jobs[0], State.CANCELLED)
    assert done.error_code is None
    assert [when_started(pid) is None for pid in pids] == [True, False]
    desk.store.cancel(PROJECT, jobs[1])
    desk.wait_for_state(jobs[1], State.CANCELLED)


def test_a_trainer_that_does_not_listen_is_killed_after_its_grace(hasty_desk: Desk) -> None:
    desk = hasty_desk
    desk.start_worker()
    job = desk.enqueue(tables(optim__steps=100_000))
    desk.wait_for_event(job, "step_done", step=1)
    desk.signal_trainer(job, "SIGSTOP")
    desk.store.cancel(PROJECT, job)
    desk.wait_for_state(job, State.CANCELLED)


def test_a_clock_that_jumps_changes_nothing(desk: Desk, undisturbed: str) -> None:
    desk.start_worker(hook="tests.service.jobs.hooks:jumping_clock")
    job = desk.enqueue(tables(**LONG))
    desk.wait_for_state(job, State.SUCCEEDED)
    assert [each.ending for each in desk.attempts(job)] == ["succeeded"]
    assert desk.final_hash(job) == undisturbed
    check_history(desk, job)


@pytest.fixture
def small_disk(desk: Desk) -> Iterator[Path]:
    """The folder of the runs on a disk of its own, of hardly a megabyte."""
    place = desk.home / "runs"
    place.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", place], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("needs the right to mount a small disk")
    yield place
    desk.close()
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_pauses_the_job_and_room_lets_it_go_on(desk: Desk, undisturbed: str, small_disk: Path) -> None:
    desk.start_worker()
    job = desk.enqueue(tables(**LONG))
    paused = desk.wait_for_state(job, State.PAUSED)
    assert paused.error_code == "disk_full"
    assert str(desk.home) not in str(paused.error_message)
    assert list(small_disk.glob("*/checkpoint_step_*/manifest.json"))
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    desk.store.resume(PROJECT, job)
    done = desk.wait_for_state(job, State.SUCCEEDED)
    assert done.error_code is None
    assert desk.final_hash(job) == undisturbed


def test_a_job_with_bad_rows_fails_at_its_check_with_their_lines(desk: Desk) -> None:
    rows = [*chat_rows(4), b"not json\n", {"messages": [{"role": "user", "content": "only a question"}]}]
    good, bad = desk.submit(), desk.submit(file=desk.add_file(rows))
    worker = desk.start_worker()
    done = desk.wait_for_state(bad, State.FAILED)
    assert done.error_code == "invalid_training_file"
    assert "2 of 6 rows cannot be used; the first is line 5" in str(done.error_message)
    rejected = next(each for each in desk.events(bad) if each.kind == "data_rejected")
    assert [each["line"] for each in rejected.data["problems"]] == [5, 6]
    assert {each["file"] for each in rejected.data["problems"]} == {"train.jsonl"}
    desk.wait_for_state(good, State.SUCCEEDED)
    assert desk.find(good).needs["memory_bytes"] > 10**8
    assert next(each for each in desk.events(good) if each.kind == "data_checked").data["rows"] == 8
    attempts = desk.store.attempts(PROJECT, good)
    assert [each.ending for each in attempts] == ["validated", "succeeded"]
    assert worker.is_there


def test_a_check_whose_worker_died_is_made_again(hasty_desk: Desk) -> None:
    desk = hasty_desk
    job = desk.submit()
    worker = desk.start_worker()
    wait_until(lambda: list(desk.home.glob("attempts/*/1/order.json")) or None)
    worker.signal("SIGKILL")
    worker.wait()
    desk.start_worker()
    desk.wait_for_state(job, State.SUCCEEDED)
    assert desk.find(job).crashes == 0
