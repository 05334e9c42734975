"""`luthier train` and `luthier resume` as processes: what they say and when, how they stop, and a disk that is full."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.runs.events import read_events
from luthier.runs.manifest import hash_file
from luthier.runs.run import Run
from tests.runs.children import Nursery, start_plainly, wait_until
from tests.runs.conftest import MakeSpec
from tests.unit.training.works import ADAPTER, NEEDS_TORCH

pytestmark = NEEDS_TORCH

LONG = {"optim.steps": 100_000, "output.save_every_steps": 0}


def kinds(run: Path) -> list[str]:
    return [event["kind"] for event in read_events(run / "events.jsonl")]


def time_of_start() -> float:
    """What an interpreter with the libraries of every command takes to start, at this moment."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import click, numpy, pydantic, yaml"], check=True)
    return time.monotonic() - started


@pytest.mark.slow
def test_something_is_said_at_once_and_sigterm_saves_and_ends_with_143(write_spec: MakeSpec, tmp_path: Path) -> None:
    # Full, because it saves through transformers, whose import goes on beside the reading of the rows.
    spec = write_spec(tmp_path, {**LONG, "method.kind": "full", "optim.learning_rate": 1e-4})
    baseline = time_of_start()
    started = time.monotonic()
    child = start_plainly("train", spec, folder=tmp_path)
    wait_until(lambda: child.err or child.out)
    # Two seconds, or on a machine that is busy as many as such a start takes there by itself.
    assert time.monotonic() - started < max(2.0, 4 * baseline)
    wait_until(lambda: "run " in child.out)
    assert "tokens      " in child.out  # the plan is there before the model is loaded
    child.wait_for_event("step_done", step=3)
    child.signal("SIGTERM")
    child.ends(143)
    done = [event["step"] for event in read_events(child.run / "events.jsonl") if event["kind"] == "step_done"]
    assert Run(child.run).checkpoints().find_newest()[0].step == done[-1]  # type: ignore[union-attr]
    assert kinds(child.run)[-2:] == ["checkpoint_saved", "stopped"]
    assert f"stopped by SIGTERM after step {done[-1]}; the state is saved" in child.out
    assert f"go on:  luthier resume {child.run}" in child.out
    lines = [
        line for line in child.err.splitlines() if not line.startswith(("reading", "planning", "loading", "taking"))
    ]
    assert re.fullmatch(r"model loaded in \d+\.\d s: 2,164,928 parameters to train, fp32", lines[0])
    assert re.fullmatch(
        r"step 1/100000  loss \d+\.\d{4}  lr 1\.00e-04  [\d,]+ tok/s  [\d.]+ (min|h) left  0\.\d\d GiB", lines[1]
    )


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on_and_that_works(
    nursery: Nursery, write_spec: MakeSpec, tmp_path: Path
) -> None:
    spec = write_spec(tmp_path, {"optim.steps": 400, "output.save_every_steps": 0, "rows.train": 4, "optim.batch": 1})
    child = nursery.start("train", spec, folder=tmp_path)
    child.wait_for_event("step_done", step=2)
    child.signal("SIGINT")
    child.ends(130)
    assert "SIGINT: stopping after this micro-batch, with the state saved; Ctrl-C again stops at once" in child.err
    command = re.search(r"go on:  luthier (.*)\n", child.out)
    assert command
    step = Run(child.run).checkpoints().find_newest()[0].step  # type: ignore[union-attr]
    later = nursery.start(*command[1].split(), folder=tmp_path)
    assert later.wait_for_event("step_done")["step"] == step + 1
    assert f"resumed after step {step}" in later.err
    later.signal("SIGTERM")
    later.ends(143)


@pytest.mark.slow
def test_a_second_ctrl_c_waits_for_nothing(nursery: Nursery, write_spec: MakeSpec, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, {})
    child = nursery.start("train", spec, folder=tmp_path, hook="tests.runs.hooks:wait_in_step")
    child.wait_for_event("step_done", step=1)
    child.signal("SIGINT")
    wait_until(lambda: "SIGINT: stopping" in child.err)
    child.signal("SIGINT")
    child.ends(130)
    assert "error: stopped at once: what was done since the last checkpoint is lost" in child.err
    assert f"hint: go on: luthier resume {child.run}" in child.err
    assert Run(child.run).state == "stopped"
    nursery.start("resume", child.run, folder=tmp_path).ends(0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own that holds little."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["", "tests.runs.hooks:believe_in_room"], ids=["foreseen", "met"])
def test_a_full_disk_pauses_the_run_and_loses_nothing(
    hook: str, nursery: Nursery, write_spec: MakeSpec, tmp_path: Path, small_disk: Path
) -> None:
    spec = write_spec(tmp_path, {"optim.steps": 8, "output.save_every_steps": 1})
    whole = nursery.start("train", spec, folder=tmp_path).ends(0)
    child = nursery.start("train", spec, "--output-dir", small_disk / "runs", folder=tmp_path, hook=hook).ends(1)
    run = next((small_disk / "runs").iterdir())
    assert ("are needed there" if not hook else "the disk is full; what was there before is untouched") in child.err
    assert f"hint: free some space, then: luthier resume {run}" in child.err
    assert "paused" in kinds(run) or hook
    assert Run(run).state == ("paused" if "paused" in kinds(run) else "stopped")
    point, broken = Run(run).checkpoints().find_newest()
    assert point is not None
    assert [each.reason for each in broken] in ([], [f"training_state/step_{point.step + 1} is missing"])
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    nursery.start("resume", run, folder=tmp_path).ends(0)
    assert hash_file(run / ADAPTER) == hash_file(whole.run / ADAPTER)


@pytest.mark.slow
def test_a_broken_checkpoint_is_named_on_stderr(nursery: Nursery, write_spec: MakeSpec, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, LONG | {"output.save_every_steps": 2})
    child = nursery.start("train", spec, folder=tmp_path)
    child.wait_for_event("checkpoint_saved", count=2)
    child.signal("SIGTERM")
    child.ends(143)
    newest = Run(child.run).checkpoints().find_newest()[0]
    assert newest is not None
    (newest.state / "optimizer.safetensors").write_bytes(b"")
    later = nursery.start("resume", child.run, "--json", folder=tmp_path)
    later.wait_for_event("step_done")
    later.signal("SIGTERM")
    later.ends(143)
    assert f"warning: checkpoint passed over: step_{newest.step}: `optimizer.safetensors` has 0 bytes" in later.err


@pytest.mark.slow
def test_what_changed_is_named_on_stderr(nursery: Nursery, write_spec: MakeSpec, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, LONG)
    child = nursery.start("train", spec, folder=tmp_path)
    child.wait_for_event("step_done", step=2)
    child.signal("SIGTERM")
    child.ends(143)
    config = child.run / "finetune_config.yaml"
    config.write_text(config.read_text().replace("learning_rate: 0.005", "learning_rate: 0.002"))
    refused = nursery.start("resume", child.run, folder=tmp_path).ends(1)
    assert "this is not as it was: the plan (optim.learning_rate was 0.005 and is 0.002)" in refused.err
    assert "hint: start a new run, or insist with --allow-changed" in refused.err
    insisted = nursery.start("resume", child.run, "--allow-changed", folder=tmp_path)
    insisted.wait_for_event("step_done")
    insisted.signal("SIGTERM")
    insisted.ends(143)
    assert "warning: resumed although changed: the plan (optim.learning_rate was 0.005 and is 0.002)" in insisted.err
