"""Sinks are off unless named, hear every event, and cannot stop a run; the real packages where they are installed."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest

from luthier.errors import CallError, MissingExtraError
from luthier.extras import import_extra
from luthier.reports.sinks import SINKS, Sinks, list_scalars, open_sinks
from luthier.runs.events import Evaluated, Event, Finished, StepDone
from tests.unit.reports.made import write_run

STEP = StepDone(3, 0.5, 1e-3, math.inf, 64, 16, 640.0, 0.1, 1 << 20, {"reward_margin": 0.25})
EVALUATED = Evaluated(3, 0.75, 2.0, 0.5, 100, True)


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
    sinks = Sinks({"good": good, "bad": bad})
    for event in (STEP, EVALUATED, STEP):
        sinks.log(event)
    sinks.close()
    assert good.events == [STEP, EVALUATED, STEP]
    assert bad.events == [STEP]
    assert sinks.failures == {"bad": "OSError: no network"}
    assert good.is_closed
    assert bad.is_closed


def test_an_unknown_sink_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(CallError, match="no sink `mlflow`"):
        open_sinks(["mlflow"], run)
    open_sinks([], run).close()
    assert not (run.folder / "tensorboard").exists()


@pytest.mark.parametrize("name", SINKS)
def test_a_sink_that_is_not_installed_says_how_to_get_it(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(MissingExtraError) as raised:
        open_sinks([name], write_run(tmp_path / "run"))
    assert raised.value.hint == f"run: pip install 'luthier[{name}]'"


def test_tensorboard_reads_what_was_told(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed")
    run = write_run(tmp_path / "run")
    sinks = open_sinks(["tensorboard"], run)
    sinks.log(STEP)
    sinks.log(EVALUATED)
    sinks.close()
    assert sinks.failures == {}
    loader = import_extra("tensorboard.backend.event_processing.event_file_loader", "tensorboard")
    (path,) = (run.folder / "tensorboard").iterdir()
    found = {
        value.tag: (event.step, round(value.tensor.float_val[0], 6))
        for event in loader.EventFileLoader(str(path)).Load()
        for value in event.summary.value
    }
    assert found["train/loss"] == (3, 0.5)
    assert found["valid/perplexity"] == (3, 2.0)


def test_wandb_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = write_run(tmp_path / "run")
    sinks = open_sinks(["wandb"], run)
    sinks.log(STEP)
    sinks.log(EVALUATED)
    sinks.close()
    assert sinks.failures == {}
    (path,) = (run.folder / "wandb").glob("offline-run-*/*.wandb")
    written = path.read_bytes()
    assert b"train/loss" in written
    assert b"valid/perplexity" in written
