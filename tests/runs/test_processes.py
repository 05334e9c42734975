"""Several processes for one run: one result, one end, and a name for the one that died."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from luthier.runs.events import read_events
from luthier.runs.run import Run
from tests.runs.children import Child, Nursery, wait_until
from tests.runs.conftest import MakeSpec
from tests.unit.training.works import ADAPTER, NEEDS_TORCH

pytestmark = NEEDS_TORCH


def ranks_of(child: Child) -> dict[int, int]:
    """The pids of the processes that a command started, by rank."""
    pids = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    found = {}
    for pid in pids:
        facts = dict(each.partition("=")[::2] for each in Path(f"/proc/{pid}/environ").read_text().split("\0"))
        if "RANK" in facts:
            found[int(facts["RANK"])] = int(pid)
    return found


FORKS = "tests.runs.hooks:fork_ranks"


def losses_of(run: Path) -> dict[int, float]:
    """The loss of each step, the last word on it."""
    return {event["step"]: event["loss"] for event in read_events(run / "events.jsonl") if event["kind"] == "step_done"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in /proc")
def test_two_processes_die_stop_and_end_as_one(nursery: Nursery, write_spec: MakeSpec, tmp_path: Path) -> None:
    changes = {"optim.steps": 60, "output.save_every_steps": 1, "optim.batch": 3, "rows.train": 10, "rows.valid": 3}
    spec = write_spec(tmp_path, {**changes, "optim.learning_rate": 1e-3})
    alone = nursery.start("train", spec, folder=tmp_path).ends(0).run

    # One of them is killed.
    child = nursery.start("train", spec, "--processes", 2, folder=tmp_path)
    run = child.run
    child.wait_for_event("checkpoint_saved", count=2)
    killed = time.monotonic()
    os.kill(ranks_of(child)[1], signal.SIGKILL)
    child.ends(1)
    assert time.monotonic() - killed < 30
    assert "error: process 1 of 2 was ended by SIGKILL; the others were ended" in child.err
    assert f"luthier resume {run}" in child.err
    done = max(losses_of(run))
    assert 2 <= done < 50

    # They are asked to stop, by the command that started them.
    child = nursery.start("resume", run, folder=tmp_path, hook=FORKS)
    child.wait_for_event("step_done", count=2)
    child.signal("SIGTERM")
    child.ends(143)
    assert newest_step(run) == max(losses_of(run)) > done - 2
    assert read_events(run / "events.jsonl")[-1]["kind"] == "stopped"

    # The command that started them is killed, and they do not train on unseen.
    child = nursery.start("resume", run, folder=tmp_path, hook=FORKS)
    child.wait_for_event("step_done", count=2)
    child.signal("SIGKILL")
    assert child.wait() == -9
    wait_until(lambda: not Run(run).is_locked)
    assert Run(run).state == "stopped"
    assert newest_step(run) == max(losses_of(run)) < 60

    nursery.start("resume", run, folder=tmp_path, hook=FORKS).ends(0)
    one, two = losses_of(alone), losses_of(run)
    assert one.keys() == two.keys() == set(range(1, 61))
    np.testing.assert_allclose([two[step] for step in one], list(one.values()), rtol=1e-4)
    ours, theirs = load_file(alone / ADAPTER), load_file(run / ADAPTER)
    for name, values in ours.items():
        np.testing.assert_allclose(theirs[name], values, atol=2e-4, err_msg=name)


@pytest.mark.slow
def test_a_step_with_fewer_examples_than_processes(nursery: Nursery, write_spec: MakeSpec, tmp_path: Path) -> None:
    changes = {"objective.kind": "dpo", "optim.steps": 0, "optim.batch": 2, "rows.train": 5, "rows.valid": 1}
    spec = write_spec(tmp_path, {**changes, "evaluate.every_steps": 1})
    alone = nursery.start("train", spec, folder=tmp_path).ends(0).run
    both = nursery.start("train", spec, "--processes", 2, folder=tmp_path, hook=FORKS).ends(0).run
    one, two = (read_events(run / "events.jsonl") for run in (alone, both))
    for kind in ("step_done", "evaluated"):
        pairs = zip(*([event for event in each if event["kind"] == kind] for each in (one, two)), strict=True)
        for ours, theirs in pairs:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
            assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-3, abs=1e-5)
    assert len([event for event in two if event["kind"] == "step_done"]) == 3


@pytest.mark.slow
def test_an_error_of_all_is_said_once(nursery: Nursery, write_spec: MakeSpec, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, {"optim.learning_rate": 1e-45, "optim.steps": 2})
    child = nursery.start("train", spec, "--processes", 2, folder=tmp_path, hook=FORKS).ends(1)
    assert child.err.count("error:") == 1
    assert "nothing was learned" in child.err


def newest_step(run: Path) -> int:
    point = Run(run).checkpoints().find_newest()[0]
    assert point is not None
    return point.step
