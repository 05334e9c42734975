"""Faults of the engine in the middle of a run: memory, numbers that are not finite, and what is left afterwards."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from luthier.engines.verbs import OutOfMemory
from luthier.errors import NonFiniteError, OutOfMemoryError
from luthier.runs import events
from luthier.runs.journal import read_records
from luthier.training.session import train
from tests.unit.training.works import (
    NEEDS_TORCH,
    Faulty,
    Watched,
    final_hash,
    make_work,
    memory_for,
    resume,
    run_whole,
    with_faults,
)

pytestmark = NEEDS_TORCH
Patch = pytest.MonkeyPatch


@pytest.mark.parametrize("changes", [{}, {"optim.micro_batch": 4}], ids=["tokens", "rows"])
def test_out_of_memory_halves_and_replays_the_same_step(changes: dict[str, int], tmp_path: Path, patch: Patch) -> None:
    _, unsplit = run_whole(tmp_path / "whole", changes)
    engines = with_faults(patch, before_backward=memory_for(60))
    run, split = run_whole(tmp_path / "split", changes)
    assert len(split.losses) == len(unsplit.losses) == 6
    np.testing.assert_allclose(split.losses, unsplit.losses, rtol=1e-5)
    replayed = split.of(events.StepReplayed)
    assert [event.step for event in replayed] == [1] * len(replayed)
    assert replayed[0].reason == "out of memory"
    assert engines[0].calls["backward"] > 6
    if not changes:
        assert [event.micro_batch_tokens for event in replayed] == sorted(
            {event.micro_batch_tokens for event in replayed}, reverse=True
        )
    records = read_records(run.read_events())
    assert records[1].is_done
    assert records[1].deviations


def test_a_resumed_run_remembers_that_memory_was_short(tmp_path: Path, patch: Patch) -> None:
    watched = Watched()
    work = make_work(tmp_path, watch=watched)
    with patch.context() as once:
        with_faults(once, before_backward=memory_for(60))
        watched.after = lambda event: _ask(work.stop, event, 2)
        assert train(work).outcome.step == 2
    engines = with_faults(patch, before_backward=memory_for(60))
    ended, later = resume(work)
    assert ended.outcome.reason == "finished"
    assert later.of(events.StepReplayed) == []
    assert ended.progress.budget_tokens == watched.of(events.StepReplayed)[-1].micro_batch_tokens
    assert engines[0].calls["backward"] > 4


def _ask(stop: object, event: events.Event, step: int) -> None:
    if isinstance(event, events.StepDone) and event.step == step:
        stop.reason = "SIGTERM"  # type: ignore[attr-defined]


def test_one_row_that_does_not_fit_ends_the_run_with_the_estimate(tmp_path: Path, patch: Patch) -> None:
    with_faults(patch, before_backward=memory_for(10))
    work = make_work(tmp_path)
    with pytest.raises(OutOfMemoryError, match=r"step 1: memory ran out with one row at once \(\d+ tokens\)") as caught:
        train(work)
    assert "data.max_length" in caught.value.hint
    assert caught.value.details["items"].keys() >= {"weights", "activations"}  # type: ignore[index]
    assert [event["code"] for event in work.run.read_events() if event["kind"] == "failed"] == ["out_of_memory"]
    assert work.run.state == "failed"


@pytest.mark.slow
def test_memory_that_runs_out_once_in_the_middle_of_a_step_costs_no_gradient(tmp_path: Path, patch: Patch) -> None:
    changes = {"optim.micro_batch": 2}
    _, unsplit = run_whole(tmp_path / "whole", changes)

    def once(number: int, batch: object) -> None:
        if number == 6:  # the second micro-batch of the third step; the gradients of the first are there already
            raise OutOfMemory("no room")

    with_faults(patch, before_backward=once)
    _, split = run_whole(tmp_path / "split", changes)
    np.testing.assert_allclose(split.losses, unsplit.losses, rtol=1e-5)
    assert [event.step for event in split.of(events.StepReplayed)] == [3]


@pytest.mark.slow
def test_memory_that_runs_out_in_an_evaluation_makes_it_smaller(tmp_path: Path, patch: Patch) -> None:
    changes = {"evaluate.every_steps": 3}
    _, whole = run_whole(tmp_path / "whole", changes)
    with_faults(patch, before_forward=memory_for(70))
    _, split = run_whole(tmp_path / "split", changes)
    for one, other in zip(whole.of(events.Evaluated), split.of(events.Evaluated), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-6)
        assert (one.token_accuracy, one.tokens) == (other.token_accuracy, other.tokens)
    told = [event for event in split.of(events.Warned) if event.code == "out_of_memory"]
    assert len(told) >= 2
    assert "it goes on with" in told[0].message


def test_a_loss_that_is_not_finite_stops_before_its_step_and_names_its_rows(tmp_path: Path, patch: Patch) -> None:
    with_faults(patch, poison=lambda number, _: number == 4)
    work = make_work(tmp_path)
    with pytest.raises(NonFiniteError, match=r"step 4: the loss is not finite; its rows: train\.jsonl:") as caught:
        train(work)
    rows = caught.value.details["rows"]  # type: ignore[index]
    assert len(rows) == 4
    skipped = [event for event in work.run.read_events() if event["kind"] == "step_skipped"]
    assert [(event["step"], event["rows"]) for event in skipped] == [(4, rows)]
    assert work.run.state == "failed"
    point, _ = work.run.checkpoints().find_newest()
    assert point is not None
    assert point.step == 3  # the state before the step that was refused


def test_after_a_step_that_was_refused_a_resume_takes_it(tmp_path: Path, patch: Patch) -> None:
    whole, _ = run_whole(tmp_path / "whole")
    work = make_work(tmp_path / "refused")
    with patch.context() as once:
        with_faults(once, poison=lambda number, _: number == 4)
        with pytest.raises(NonFiniteError):
            train(work)
    ended, later = resume(work)
    assert ended.outcome.reason == "finished"
    assert [event.step for event in later.of(events.StepDone)] == [4, 5, 6]
    assert final_hash(work.run) == final_hash(whole)


@pytest.mark.slow
def test_as_many_bad_steps_are_skipped_as_the_spec_allows(tmp_path: Path, patch: Patch) -> None:
    with_faults(patch, poison=lambda number, _: number in (2, 4))
    work = make_work(tmp_path / "two", {"optim.max_skipped_steps": 2})
    ended = train(work)
    assert ended.outcome.reason == "finished"
    assert ended.progress.skipped == 2
    assert [event["step"] for event in work.run.read_events() if event["kind"] == "step_done"] == [1, 3, 5, 6]
    log = (work.run.folder / "training_log.json").read_text()
    assert log.count("non-finite loss") == 2
    with_faults(patch, poison=lambda number, _: number in (2, 4, 5))
    with pytest.raises(NonFiniteError, match="step 5"):
        train(make_work(tmp_path / "three", {"optim.max_skipped_steps": 2}))


def test_a_gradient_that_is_not_finite_is_refused_by_the_engine(tmp_path: Path, patch: Patch) -> None:
    engines: list[Faulty] = []

    def blow_up(number: int, batch: object) -> None:
        if number == 3:
            master = engines[0].engine._masters.masters[0]  # type: ignore[attr-defined]
            master.grad = master.detach() * math.inf

    with_faults(patch, before_backward=blow_up, into=engines)
    work = make_work(tmp_path)
    with pytest.raises(NonFiniteError, match="step 3: the gradient is not finite"):
        train(work)
    assert work.run.checkpoints().find_newest()[0].step == 2  # type: ignore[union-attr]
