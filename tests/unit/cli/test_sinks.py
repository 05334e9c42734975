"""A run tells its sinks what it tells its own log, over a resume too; no sink that fails can take a step from it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.cli.main import main
from luthier.reports import tensorboard
from luthier.runs.events import Event
from luthier.runs.run import Run
from tests.unit.cli.test_train import run_of, write_spec
from tests.unit.training.works import NEEDS_TORCH, signal_at, with_faults

pytestmark = [*NEEDS_TORCH, pytest.mark.slow]
Captured = pytest.CaptureFixture[str]
Plant = Callable[..., list[Any]]
NAMED = {"output.sinks": ["tensorboard"]}


class Heard:
    """A sink that keeps what it hears, and fails at the first event of some kind."""

    def __init__(self, fails_at: str = "") -> None:
        self.kinds: list[str] = []
        self.fails_at = fails_at
        self.is_closed = False

    def log(self, event: Event) -> None:
        if event.kind == self.fails_at:
            raise OSError("no network")
        self.kinds.append(event.kind)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Puts sinks in TensorBoard's place, one for each time that the run opens it; an error among them is raised."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find("json" if name == "tensorboard" else name))

    def put(*sinks: Any) -> list[Any]:
        left = list(sinks)

        def open_sink(run: Run) -> Any:
            sink = left.pop(0)
            if isinstance(sink, Exception):
                raise sink
            return sink

        monkeypatch.setattr(tensorboard, "open_sink", open_sink)
        return left

    return put


def told(run: Run) -> list[str]:
    return [event["kind"] for event in run.read_events()]


def test_a_sink_hears_all_of_a_run_that_was_stopped_and_went_on(
    tmp_path: Path, plant: Plant, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Heard(), Heard()
    left = plant(first, second)
    with monkeypatch.context() as once:
        with_faults(once, before_backward=signal_at([2]))
        assert main(["train", str(write_spec(tmp_path, **NAMED))]) == 143
    run = run_of(tmp_path)
    assert main(["resume", str(run.folder)]) == 0
    assert left == []
    assert "stopped" in first.kinds
    assert {"resumed", "step_done", "evaluated", "finished"} <= set(second.kinds)
    assert [*first.kinds, *second.kinds] == told(run)
    assert first.is_closed
    assert second.is_closed
    assert f"  curves   tensorboard --logdir {run.folder}/tensorboard\n" in capsys.readouterr().out


def test_a_sink_that_fails_on_the_way_is_a_warning(tmp_path: Path, plant: Plant, capsys: Captured) -> None:
    sink = Heard(fails_at="step_done")
    plant(sink)
    assert main(["train", str(write_spec(tmp_path, **NAMED))]) == 0
    run = run_of(tmp_path)
    assert (
        "warning: tensorboard hears no more of this run, which goes on: OSError: no network" in capsys.readouterr().err
    )
    assert told(run).count("step_done") == 2
    assert told(run).count("warned") == 1
    assert sink.is_closed
    assert "tensorboard hears no more of this run" in (run.folder / "finetune_report.md").read_text()


def test_a_sink_that_refuses_is_told_before_the_model_is_loaded(tmp_path: Path, plant: Plant, capsys: Captured) -> None:
    plant(TimeoutError("nobody there"), Heard())
    assert main(["train", str(write_spec(tmp_path, **NAMED))]) == 1
    run = run_of(tmp_path)
    err = capsys.readouterr().err
    assert f"error: tensorboard could not be opened for {run.id}: TimeoutError: nobody there" in err
    assert f"luthier resume {run.folder}" in err
    assert told(run) == ["run_started", "failed"]
    assert main(["resume", str(run.folder)]) == 0


def test_a_missing_package_is_told_before_anything_is_read(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    spec = write_spec(tmp_path, **{"output.sinks": ["tensorboard", "wandb"]})
    for call in (["train", str(spec)], ["plan", str(spec)]):
        assert main(call) == 1
        out, err = capsys.readouterr()
        assert err.splitlines()[-2:] == [
            "error: this needs the package `wandb`, which is not installed",
            "hint: run: pip install 'luthier[wandb]'",
        ]
        assert out == ""
    assert not (tmp_path / "runs").exists()
