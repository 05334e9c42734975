"""Killed by kill -9 at any moment, resumed as often as it takes: the final adapter is the same to the byte."""

from __future__ import annotations

import os
import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from luthier.runs import checkpoints, manifest
from luthier.runs.events import read_events
from luthier.runs.manifest import CRASH_VARIABLE, hash_file
from tests.runs.children import Child, Nursery
from tests.runs.conftest import MakeSpec
from tests.unit.training.works import ADAPTER, NEEDS_TORCH

pytestmark = NEEDS_TORCH

# LUTHIER_KILLS=50 is the full count; each kill is one process that dies.
KILLS = int(os.environ.get("LUTHIER_KILLS", "0"))
SFT: dict[str, Any] = {"optim.steps": 24, "output.save_every_steps": 1, "rows.train": 8, "optim.batch": 2}
BEST: dict[str, Any] = {
    **SFT,
    "evaluate.every_steps": 2,
    "evaluate.keep": "best",
    "evaluate.early_stop_patience": 3,
    "output.save_every_steps": 3,
    "output.keep_checkpoints": 1,
    "optim.schedule": "constant",
    "optim.learning_rate": 0.02,
    "optim.steps": 40,
}
DPO: dict[str, Any] = {"objective.kind": "dpo", "optim.steps": 6, "output.save_every_steps": 2}
# In this order each is passed: a state that is missing makes the next save replace the weights of its step.
POINTS = (
    "before_write:3",
    "after_write:3",
    "before_manifest:4",
    "in_manifest:3",
    "after_manifest:3",
    "before_rename:4",
    "before_state:2",
    "after_aside:1",
    "after_rename:3",
    "after_seal:4",
    "after_state:2",
    "in_prune:2",
    "after_prune:2",
)


def train_whole(nursery: Nursery, spec: Path, folder: Path) -> str:
    """The hash of the final adapter of a run that nobody disturbs."""
    folder.mkdir()
    child = nursery.start("train", spec, "--output-dir", folder / "runs", folder=folder).ends(0)
    return hash_file(child.run / ADAPTER)


def resume(nursery: Nursery, run: Path, **env: str) -> Child:
    return nursery.start("resume", run, folder=run.parent.parent, **env)


def steps_of(run: Path) -> list[int]:
    return [event["step"] for event in read_events(run / "events.jsonl") if event["kind"] == "step_done"]


def test_every_point_of_a_save_is_named() -> None:
    assert {point.partition(":")[0] for point in POINTS} == {*manifest.CRASH_POINTS, *checkpoints.CRASH_POINTS}


@pytest.mark.slow
def test_killed_at_every_point_of_a_save(nursery: Nursery, write_spec: MakeSpec, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, SFT)
    wanted = train_whole(nursery, spec, tmp_path / "whole")
    child = nursery.start("train", spec, folder=tmp_path, **{CRASH_VARIABLE: POINTS[0]}).ends(137)
    run = child.run
    for point in POINTS[1:]:
        before = steps_of(run)[-1]
        resume(nursery, run, **{CRASH_VARIABLE: point}).ends(137)
        assert before - 1 <= steps_of(run)[-1] <= before + 3, point
    done = steps_of(run)[-1]
    assert done < 24
    resume(nursery, run).ends(0)
    assert hash_file(run / ADAPTER) == wanted
    resumed = [event["step"] for event in read_events(run / "events.jsonl") if event["kind"] == "resumed"]
    assert len(resumed) >= len(POINTS)


@pytest.mark.slow
@pytest.mark.parametrize("point", ["before_manifest", "after_rename"])
def test_killed_while_the_results_are_written(
    point: str, nursery: Nursery, write_spec: MakeSpec, tmp_path: Path
) -> None:
    spec = write_spec(tmp_path, {"optim.steps": 2, "output.save_every_steps": 1, "output.merge": True})
    wanted = train_whole(nursery, spec, tmp_path / "whole")
    # Two saves of two folders each, then the final adapter, then the merged model.
    run = nursery.start("train", spec, folder=tmp_path, **{CRASH_VARIABLE: f"{point}:5"}).ends(137).run
    assert not [event for event in read_events(run / "events.jsonl") if event["kind"] == "finished"]
    resume(nursery, run, **{CRASH_VARIABLE: f"{point}:2"}).ends(137)
    assert [event["kind"] for event in read_events(run / "events.jsonl")][-1] == "finished"
    last = resume(nursery, run).ends(0)
    assert ("  merged   " in last.out) is (point == "before_manifest")
    assert "certificate valid: merged_model is what was trained" in last.out
    assert "is finished; there is nothing to resume" in resume(nursery, run).ends(1).err
    assert (run / "merged_model" / "manifest.json").is_file()
    assert hash_file(run / ADAPTER) == wanted


@pytest.mark.slow
def test_killed_in_the_reference_pass_and_after(nursery: Nursery, write_spec: MakeSpec, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, DPO)
    wanted = train_whole(nursery, spec, tmp_path / "whole")
    run = nursery.start("train", spec, folder=tmp_path, **{CRASH_VARIABLE: "before_manifest:1"}).ends(137).run
    assert not (run / "reference").exists()
    resume(nursery, run, **{CRASH_VARIABLE: "before_rename:4"}).ends(137)
    resume(nursery, run).ends(0)
    assert hash_file(run / ADAPTER) == wanted


def kill_at_random(chance: random.Random, child: Child) -> None:
    """After some event of this process, and then a moment that nobody chose."""
    kind = chance.choice(["run_started", "step_done", "step_done", "step_done", "checkpoint_saved"])
    with suppress(AssertionError):  # it may end before
        child.wait_for_event(kind, count=1 if kind == "run_started" else chance.randint(1, 5))
    until = time.perf_counter() + 0.04 * chance.random()
    while time.perf_counter() < until:
        pass
    child.signal("SIGKILL")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "best"])
def test_killed_at_random(name: str, nursery: Nursery, write_spec: MakeSpec, tmp_path: Path) -> None:
    chance = random.Random(f"{name} {KILLS}")
    spec = write_spec(tmp_path, {"sft": {**SFT, "output.save_every_steps": 3}, "best": BEST}[name])
    wanted = train_whole(nursery, spec, tmp_path / "whole")
    left, lost = KILLS or 4, 0
    while left > 0:
        child = nursery.start("train", spec, folder=tmp_path)
        run = child.run
        for _ in range(min(left, chance.randint(2, 6))):
            kill_at_random(chance, child)
            if child.wait() != -9:
                break  # it was done before
            left -= 1
            child = resume(nursery, run)
        child.ends(0)
        assert hash_file(run / ADAPTER) == wanted
        lost = max(lost, most_lost(run))
    assert lost <= 2 * 3 - 1  # at most what was done while a checkpoint was written comes on top of the three


def most_lost(run: Path) -> int:
    """The most steps that one death cost."""
    done = worst = 0
    for event in read_events(run / "events.jsonl"):
        if event["kind"] == "step_done":
            done = event["step"]
        elif event["kind"] == "resumed":
            worst = max(worst, done - event["step"])
            done = event["step"]
    return worst
