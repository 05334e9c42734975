"""Sinks are off unless named, hear every event, and cannot stop a run; the real packages where they are installed."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from luthier.errors import CallError, MissingExtraError, SinkError
from luthier.extras import import_extra
from luthier.reports import wandb
from luthier.reports.sinks import SINKS, Sinks, check_sinks, list_commands, list_scalars, open_sinks
from luthier.runs.events import Evaluated, Event, Finished, Resumed, StepDone
from luthier.spec.output import Output
from tests.unit.reports.made import write_run

STEP = StepDone(3, 0.5, 1e-3, math.inf, 64, 16, 640.0, 0.1, 1 << 20, {"reward_margin": 0.25})
EVALUATED = Evaluated(3, 0.75, 2.0, 0.5, 100, True)


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def fail(name: str, why: str) -> None:
    raise AssertionError(f"{name}: {why}")


class Heard:
    """A sink that keeps what it hears, and fails at a given event."""

    def __init__(self, fails_at: int = -1) -> None:
        self.events: list[Event] = []
        self.fails_at = fails_at
        self.is_closed = False

    def log(self, event: Event) -> None:
        if len(self.events) == self.fails_at:
            raise OSError("no network")
        self.events.append(event)

    def close(self) -> None:
        self.is_closed = True


def test_only_finite_numbers_are_told() -> None:
    assert list_scalars(STEP) == (
        3,
        {
            "train/loss": 0.5,
            "train/learning_rate": 1e-3,
            "train/tokens_per_second": 640.0,
            "train/memory_bytes": float(1 << 20),
            "train/reward_margin": 0.25,
        },
    )
    assert list_scalars(EVALUATED)[1] == {"valid/loss": 0.75, "valid/perplexity": 2.0, "valid/token_accuracy": 0.5}
    assert list_scalars(Finished(3, "finished", 1.0)) == (0, {})


def test_a_sink_that_fails_is_dropped_and_the_others_go_on() -> None:
    good, bad = Heard(), Heard(fails_at=1)
    dropped: list[tuple[str, str]] = []
    sinks = Sinks({"good": good, "bad": bad}, lambda name, why: dropped.append((name, why)))
    for event in (STEP, EVALUATED, STEP):
        sinks.log(event)
    sinks.close()
    assert good.events == [STEP, EVALUATED, STEP]
    assert bad.events == [STEP]
    assert dropped == [("bad", "OSError: no network")]
    assert good.is_closed
    assert bad.is_closed


def test_an_unknown_sink_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(CallError, match="no sink `mlflow`"):
        open_sinks(["mlflow"], run)
    open_sinks([], run).close()
    assert not (run.folder / "tensorboard").exists()


@pytest.mark.parametrize("name", SINKS)
def test_a_sink_that_is_not_installed_says_how_to_get_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None if package == name else find(package))
    with pytest.raises(MissingExtraError) as raised:
        check_sinks([name])
    assert raised.value.hint == f"run: pip install 'luthier[{name}]'"


def test_the_spec_names_the_sinks_that_there_are() -> None:
    (choice,) = get_args(Output.model_fields["sinks"].annotation)
    assert set(get_args(choice)) == set(SINKS)


def test_a_sink_that_refuses_says_so_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")

    def refuse(run: Any) -> Any:
        raise ConnectionError(f"nobody knows the key {os.environ['WANDB_API_KEY']}")

    monkeypatch.setattr("luthier.reports.wandb.open_sink", refuse)
    monkeypatch.setattr("luthier.reports.sinks.check_extra", lambda package, extra: None)
    with pytest.raises(SinkError, match=r"wandb could not be opened for run: ConnectionError: .* \[hidden\]") as raised:
        open_sinks(["wandb"], write_run(tmp_path / "run"))
    assert "luthier resume" in raised.value.hint


def read_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar as TensorBoard itself shows it."""
    module = import_extra("tensorboard.backend.event_processing.event_accumulator", "tensorboard")
    found = module.EventAccumulator(str(folder)).Reload()
    return {tag: [(each.step, round(each.value, 6)) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@needs("tensorboard")
def test_tensorboard_shows_what_was_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", output={"sinks": ["tensorboard"]})
    sinks = open_sinks(["tensorboard"], run, fail)
    sinks.log(STEP)
    sinks.log(EVALUATED)
    sinks.close()
    curves = read_curves(run.folder / "tensorboard")
    assert curves["train/loss"] == [(3, 0.5)]
    assert curves["train/reward_margin"] == [(3, 0.25)]
    assert curves["valid/perplexity"] == [(3, 2.0)]
    assert list_commands(run) == [f"tensorboard --logdir {run.folder}/tensorboard"]


@needs("tensorboard")
def test_tensorboard_forgets_the_steps_that_a_resume_takes_back(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for told in ([replace(STEP, step=step) for step in (1, 2, 3)], [Resumed(1), replace(STEP, step=2, loss=0.25)]):
        sinks = open_sinks(["tensorboard"], run, fail)
        for event in told:
            sinks.log(event)
        sinks.close()
    assert read_curves(run.folder / "tensorboard")["train/loss"] == [(1, 0.5), (2, 0.25)]


@needs("wandb")
def test_wandb_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As an address it would be refused: nothing but an online run may look at it.
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    run = write_run(tmp_path / "run", output={"sinks": ["wandb"], "wandb_project": "own-project"})
    assert list_commands(run) == []
    for told in ([STEP, EVALUATED], [Resumed(3), Finished(3, "finished", 1.0)]):
        sinks = open_sinks(["wandb"], run, fail)
        for event in told:
            sinks.log(event)
        sinks.close()
    first, second = sorted((run.folder / "wandb").glob("offline-run-*/*.wandb"))
    assert first.name == second.name == "run-run.wandb"
    written = first.read_bytes()
    assert b"train/loss" in written
    assert b"valid/perplexity" in written
    assert b"own-project" in written
    assert list_commands(run) == [f"wandb sync {run.folder}/wandb/offline-run-*"]


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "k" * 40}, "online"),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "online"}, "online"),
    ],
)
def test_wandb_is_online_only_where_somebody_says_so(
    variables: dict[str, str], mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    logged = SimpleNamespace(define_metric=lambda *_, **__: None)
    module = SimpleNamespace(init=lambda **given: asked.update(given) or logged, Settings=dict)
    monkeypatch.setattr("luthier.reports.wandb.import_extra", lambda *_: module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    wandb.open_sink(write_run(tmp_path / "run"))
    assert (asked["mode"], asked["resume"]) == (mode, "allow" if mode == "online" else None)
    assert (os.environ.get("WANDB_ERROR_REPORTING") == "false") is (mode != "online")
