"""The run folder's contract: whatever engine trains, a run leaves the same files, events, checkpoints and proofs.

An engine joins by its name in ENGINES, and by its own way to go wrong on demand in FAULTS where it has no verbs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.adapters.certificate import is_certified_whole
from luthier.engines.registry import find_missing
from luthier.engines.verbs import OutOfMemory
from luthier.errors import NonFiniteError
from luthier.runs import events
from luthier.runs.manifest import hash_file, read_manifest
from luthier.runs.run import Run
from luthier.training.session import train
from luthier.training.signals import StopFlag
from luthier.workflow import make_ready, prepare_data, start_run, train_run, write_report
from tests.runs.children import Nursery
from tests.unit.training.works import (
    Watched,
    make_spec,
    make_work,
    resume,
    run_whole,
    stop_after,
    tables_of,
    with_faults,
)

ENGINES = ("torch", "trl", "mlx")


def params_of(engines: Iterable[str]) -> list[Any]:
    """Engines as parameters, those left out whose packages are not installed."""
    missing = {name: find_missing(name) for name in engines}
    return [
        pytest.param(name, marks=pytest.mark.skipif(bool(command), reason=f"needs {command}"), id=name)
        for name, command in missing.items()
    ]


# tests/runs kills runs of `torch` at every point, and their processes one by one.
OTHERS = params_of(name for name in ENGINES if name != "torch")
pytestmark = [pytest.mark.torch, pytest.mark.slow]
Patch = pytest.MonkeyPatch

LORA: dict[str, Any] = {"evaluate.every_steps": 3, "optim.batch": 2, "rows.train": 8, "rows.valid": 2}
CASES: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "full": {"method.kind": "full", "optim.learning_rate": 2e-4, **LORA},
    "dpo": {"objective.kind": "dpo", "optim.learning_rate": 2e-3, **LORA},
}
OF_EVERY_RUN = {
    "certificate.json",
    "events.jsonl",
    "finetune_config.yaml",
    "finetune_report.html",
    "finetune_report.md",
    "ledger.jsonl",
    "lineage.json",
    "probe.safetensors",
    "rejected.jsonl",
    "training_log.json",
}
PICKLED = {".pt", ".pth", ".bin", ".pkl", ".ckpt"}

Fault = Callable[[int, int], str | None]
"""By the number of a micro-batch (from 1) and its tokens: `memory`, `nan`, or nothing."""


def break_verbs(patch: Patch, fault: Fault) -> None:
    """Faults of an engine that has verbs."""

    def check(number: int, batch: Any) -> None:
        if fault(number, len(batch.tokens)) == "memory":
            raise OutOfMemory("no room")

    with_faults(patch, before_backward=check, poison=lambda number, batch: fault(number, len(batch.tokens)) == "nan")


def break_trl(patch: Patch, fault: Fault) -> None:
    """Faults of TRL's trainers, as torch itself would have them."""
    import torch

    from luthier.training.trl.start import import_libraries

    import_libraries()
    from luthier.training.trl.trainers import Durable

    compute, calls = Durable.add_gradients, []

    def add_gradients(self: Any, model: Any, inputs: Any, units: int) -> float:
        calls.append(inputs)
        wrong = fault(len(calls), inputs["input_ids"].numel())
        if wrong == "memory":
            raise torch.OutOfMemoryError("no room")
        return math.nan if wrong == "nan" else compute(self, model, inputs, units)

    patch.setattr(Durable, "add_gradients", add_gradients)


FAULTS = {"trl": break_trl}


def break_engine(patch: Patch, engine: str, fault: Fault) -> None:
    FAULTS.get(engine, break_verbs)(patch, fault)


@pytest.fixture(params=params_of(ENGINES))
def engine(request: pytest.FixtureRequest) -> str:
    """Each engine in turn."""
    name: str = request.param
    return name


def on(engine: str, changes: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"engine.kind": engine, **changes, **more}


Whole = Callable[[str, str], Run]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Runs as a person has them, trained, certified and reported; each is made once and only looked at."""
    made: dict[tuple[str, str], Run] = {}

    def make(engine: str, case: str) -> Run:
        if (engine, case) not in made:
            spec = make_spec(tmp_path_factory.mktemp(f"{engine}_{case}"), on(engine, CASES[case]))
            ready = make_ready(spec, prepare_data(spec))
            made[engine, case] = run = start_run(ready)
            assert train_run(run, ready, watch=Watched(), stop=StopFlag()).outcome.reason == "finished"
            write_report(run)
        return made[engine, case]

    return make


def kinds_of(run: Run) -> list[str]:
    return [event["kind"] for event in run.read_events()]


@pytest.mark.parametrize("case", CASES)
def test_a_run_leaves_what_every_run_leaves(engine: str, case: str, whole: Whole) -> None:
    run = whole(engine, case)
    assert is_certified_whole(run)
    assert run.id in (run.folder / "finetune_report.html").read_text("utf-8")
    assert "Trained to the end" in (run.folder / "finetune_report.md").read_text("utf-8")

    there = {path.name for path in run.folder.iterdir() if path.is_file()}
    assert there - {"run.lock"} == OF_EVERY_RUN
    assert not [path for path in run.folder.rglob("*") if path.suffix in PICKLED]
    final = "final_model" if case == "full" else "final_lora_weights"
    assert run.final_weights == run.folder / final
    states = [run.folder / "training_state" / f"step_{step}" for step in (4, 6)]
    kept = (4, 6) if case == "full" else (2, 4, 6)
    for folder in (run.folder / final, *states, *(run.folder / f"checkpoint_step_{step}" for step in kept)):
        read_manifest(folder)  # every byte of it
    lineage = run.lineage
    assert lineage["finished"]
    assert {"train_loss", "valid_loss", "valid_perplexity"} <= lineage["metrics"].keys()


@pytest.mark.parametrize("case", CASES)
def test_the_events_tell_the_run(engine: str, case: str, whole: Whole) -> None:
    run = whole(engine, case)
    told, kinds = run.read_events(), kinds_of(run)
    assert kinds[:4] == ["run_started", "planned", "data_ready", "engine_loaded"]
    assert [kind for kind in kinds if kind in ("memory_measured", "finished", "warned", "failed")] == [
        "memory_measured",
        "finished",
    ]
    steps = [event for event in told if event["kind"] == "step_done"]
    assert [event["step"] for event in steps] == [1, 2, 3, 4, 5, 6]
    measured = [event for event in told if event["kind"] == "evaluated"]
    assert [event["step"] for event in measured] == [3, 6]
    assert {event["step"] for event in told if event["kind"] == "checkpoint_saved"} >= {2, 4, 6}
    for event in steps:
        assert min(event[key] for key in ("grad_norm", "loss", "learning_rate", "seconds", "memory_bytes")) > 0
        assert event["tokens"] > event["trained_tokens"] > 0
        assert bool(event["metrics"]) is (case == "dpo")
    log = json.loads((run.folder / "training_log.json").read_bytes())
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    assert log[2]["eval"]["loss"] == measured[0]["loss"]


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed_is_never_stopped(engine: str, case: str, whole: Whole, tmp_path: Path) -> None:
    """With dropout, so that the order of what is drawn counts too; stopped between two saves, after an evaluation."""
    watched = Watched()
    work = make_work(tmp_path, on(engine, CASES[case]), watch=watched)
    watched.after = stop_after(3, work.stop)
    assert train(work).outcome.reason == "SIGTERM"
    assert work.run.state == "stopped"
    ended, later = resume(work)
    assert ended.outcome.reason == "finished"
    assert [event.step for event in later.of(events.StepDone)] == [4, 5, 6]
    assert final_hashes(work.run) == final_hashes(whole(engine, case))


def final_hashes(run: Run) -> dict[str, str]:
    assert run.final_weights
    return {path.name: hash_file(path) for path in run.final_weights.glob("*.safetensors")}


def test_measuring_changes_nothing(engine: str, tmp_path: Path) -> None:
    """bitsandbytes' layers would compute otherwise on a CPU once they have been asked for an evaluation."""
    asked = {"method.kind": "qlora", "compute.precision": "bf16", "optim.steps": 3, "output.save_every_steps": 0}
    changes = on(engine, LORA, **asked)
    often, _ = run_whole(tmp_path / "often", {**changes, "evaluate.every_steps": 1})
    never, _ = run_whole(tmp_path / "never", {**changes, "evaluate.every_steps": 0})
    assert final_hashes(often) == final_hashes(never)


def test_an_early_stop_keeps_the_best(engine: str, tmp_path: Path) -> None:
    asked = {
        "optim.steps": 40,
        "optim.learning_rate": 0.05,
        "optim.schedule": "constant",
        "evaluate.keep": "best",
        "evaluate.every_steps": 1,
        "evaluate.early_stop_patience": 3,
        "output.save_every_steps": 0,
    }
    work = make_work(tmp_path, on(engine, LORA | asked))
    trained = train(work)
    assert trained.outcome.reason == "early_stop"
    best = trained.progress.best_step
    assert best
    assert best <= trained.outcome.step - 3
    name = "adapter_model.safetensors"
    assert final_hashes(work.run)[name] == hash_file(work.run.folder / f"checkpoint_step_{best}" / name)


def test_a_step_that_is_not_finite_is_not_taken(engine: str, whole: Whole, tmp_path: Path, monkeypatch: Patch) -> None:
    work = make_work(tmp_path, on(engine, LORA))
    with monkeypatch.context() as once:
        break_engine(once, engine, lambda number, _: "nan" if number == 4 else None)
        with pytest.raises(NonFiniteError, match=r"step 4: the loss is not finite; its rows: train\.jsonl:"):
            train(work)
    assert work.run.state == "failed"
    assert [event["step"] for event in work.run.read_events() if event["kind"] == "step_skipped"] == [4]
    ended, later = resume(work)
    assert ended.outcome.reason == "finished"
    assert [event.step for event in later.of(events.StepDone)] == [4, 5, 6]
    assert final_hashes(work.run) == final_hashes(whole(engine, "lora"))


def test_what_may_be_skipped_is_skipped(engine: str, tmp_path: Path, monkeypatch: Patch) -> None:
    break_engine(monkeypatch, engine, lambda number, _: "nan" if number == 3 else None)
    work = make_work(tmp_path, on(engine, LORA, **{"optim.max_skipped_steps": 1}))
    assert train(work).outcome.reason == "finished"
    told = {event["kind"]: event["step"] for event in work.run.read_events() if event["kind"] == "step_skipped"}
    assert told == {"step_skipped": 3}
    assert [event["step"] for event in work.run.read_events() if event["kind"] == "step_done"] == [1, 2, 4, 5, 6]


def test_out_of_memory_halves_and_replays_the_same_step(engine: str, tmp_path: Path, monkeypatch: Patch) -> None:
    changes = on(engine, {"method.dropout": 0.0, "optim.steps": 3})
    _, unsplit = run_whole(tmp_path / "whole", changes)
    break_engine(monkeypatch, engine, lambda _, tokens: "memory" if tokens > 60 else None)
    _, split = run_whole(tmp_path / "split", changes)
    np.testing.assert_allclose(split.losses, unsplit.losses, rtol=1e-5)
    replayed = split.of(events.StepReplayed)
    assert replayed
    assert {(event.step, event.reason) for event in replayed} == {(1, "out of memory")}


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Starts commands in milliseconds."""
    pytest.importorskip("trl")
    born = Nursery("tests.contract.preloaded_trl")
    yield born
    born.close()


@pytest.mark.parametrize("engine", OTHERS)
def test_killed_and_resumed_is_never_killed(engine: str, nursery: Nursery, tmp_path: Path) -> None:
    """By kill -9, after a checkpoint and in the middle of what came after it."""
    changes = on(engine, LORA | {"optim.steps": 12, "evaluate.every_steps": 0})
    undisturbed = nursery.start("train", write_spec(tmp_path / "whole", changes), folder=tmp_path / "whole").ends(0)
    spec = write_spec(tmp_path / "killed", changes)
    child = nursery.start("train", spec, folder=tmp_path / "killed")
    run = Run(child.run)
    child.wait_for_event("checkpoint_saved", count=2)
    child.signal("SIGKILL")
    assert child.wait() == -9
    assert run.state == "stopped"
    nursery.start("resume", run.folder, folder=tmp_path / "killed").ends(0)
    assert final_hashes(run) == final_hashes(Run(undisturbed.run))
    assert "resumed" in kinds_of(run)


def write_spec(folder: Path, changes: dict[str, Any]) -> Path:
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(tables_of(folder, changes)))
    return path


@pytest.mark.parametrize("engine", params_of(["trl"]))  # `mlx` has one process
def test_two_processes_are_one(engine: str, nursery: Nursery, tmp_path: Path) -> None:
    """Also where the last step has fewer rows than there are processes."""
    changes = on(engine, LORA | {"optim.steps": 0, "rows.train": 5, "method.dropout": 0.0})
    spec = write_spec(tmp_path, changes)
    alone = nursery.start("train", spec, folder=tmp_path).ends(0).run
    hook = "tests.runs.hooks:fork_ranks"
    both = nursery.start("train", spec, "--processes", 2, folder=tmp_path, hook=hook).ends(0).run
    one, two = ([event for event in Run(run).read_events() if event["kind"] == "step_done"] for run in (alone, both))
    assert len(one) == len(two) == 3
    np.testing.assert_allclose([each["loss"] for each in two], [each["loss"] for each in one], rtol=1e-4)
