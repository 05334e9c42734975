"""The facts of a run: what counts in the end, what it cost, and what is wrong with its folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from luthier.reports.model import read_report
from luthier.runs import events
from tests.unit.reports.made import Course, comparison, evaluated, make_report, step_done, write_run
from tests.unit.runs import made as real


def test_a_run_is_read_whole(tmp_path: Path) -> None:
    report = make_report(tmp_path / "run")
    assert (report.ending.state, report.ending.reason, report.ending.step) == ("finished", "finished", 100)
    assert (report.planned_steps, report.trainable_parameters) == (100, 50_000)
    assert len(report.steps) == 100
    assert report.cost.tokens == 64_000
    assert (report.cost.seconds, report.cost.planned_seconds, report.cost.load_seconds) == (100.0, 90.0, 2.5)
    assert (report.cost.planned_bytes, report.cost.measured_bytes) == (65_000_000, 90_000_000)
    assert report.cost.wall_seconds == 114.0
    assert report.best is report.evaluations[-1] is report.kept
    assert report.settings()["optim.learning_rate"] == 1e-3
    assert report.is_adapter
    assert not report.is_paired
    assert report.remarks == ()


def test_what_a_resume_took_back_does_not_count(tmp_path: Path) -> None:
    more = [
        {"kind": "resumed", "step": 90},
        *(step_done(step, 0.25) for step in range(91, 101)),
        evaluated(100, 0.25),
    ]
    report = make_report(tmp_path / "run", Course(more=more))
    assert len(report.steps) == 100
    assert report.steps.column("loss")[90:].tolist() == [0.25] * 10
    assert report.cost.repeated_tokens == 6400
    assert report.evaluations[-1].loss == 0.25
    assert [each.kind for each in report.incidents] == ["resumed"]


def test_a_loss_that_was_not_finite_is_left_out_of_the_curve(tmp_path: Path) -> None:
    skipped = {"kind": "step_skipped", "step": 3, "reason": "non-finite loss", "rows": ["a:1", "b:2"]}
    report = make_report(tmp_path / "run", Course(losses=[2.0, None, 1.0], held_out={}, more=[skipped]))
    assert np.isnan(report.steps.column("loss")[1])
    assert report.steps.points("loss").tolist() == [[1, 2.0], [3, 1.0]]
    assert report.incidents[0].text == "step 3 skipped: non-finite loss; its rows: a:1, b:2"
    assert report.best is None


@pytest.mark.parametrize(
    ("last", "state", "reason"),
    [
        ({"kind": "stopped", "step": 40, "reason": "SIGTERM"}, "stopped", "SIGTERM"),
        ({"kind": "paused", "step": 40, "reason": "disk_full"}, "paused", "disk_full"),
        ({"kind": "failed", "code": "out_of_memory", "message": "no room"}, "failed", "out_of_memory"),
        ({"kind": "working", "what": "x", "done": 1, "count": 2}, "stopped", ""),
    ],
)
def test_every_end_is_told(last: dict[str, object], state: str, reason: str, tmp_path: Path) -> None:
    ending = make_report(tmp_path / "run", Course(last=last)).ending
    assert (ending.state, ending.reason) == (state, reason)
    assert ending.step == (40 if "step" in last else 100)


def test_what_is_damaged_is_remarked_on(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run.folder / "events.jsonl").open("a") as file:
        file.write("broken\n")
    with (run.folder / "ledger.jsonl").open("a") as file:
        file.write("broken\n")
    (run.folder / "comparison.json").write_text("broken")
    (run.folder / "certificate.json").write_text("broken")
    report = read_report(run)
    assert len(report.remarks) == 4
    assert report.comparison is None
    assert report.certificate is not None
    assert not report.certificate.is_valid


def test_a_run_that_has_only_been_made_can_be_read(tmp_path: Path) -> None:
    run = real.make_run(tmp_path / "runs", real.build_spec(real.write_rows(tmp_path / "rows.jsonl")))
    report = read_report(run)
    assert (len(report.steps), report.kept, report.ending.step) == (0, None, 0)
    assert report.rows.count == 10
    run.events.append(events.RunStarted(run.id))
    run.events.append(real.step_done(1, 0.5))
    real.finish(run)
    (run.folder / "comparison.json").write_text(json.dumps(comparison(2)))
    report = read_report(run)
    assert report.ending.state == "finished"
    assert report.comparison is not None
    assert report.data_hash == run.lineage["data"]["hash"]


def test_the_best_weights_count_where_they_are_kept(tmp_path: Path) -> None:
    course = Course(held_out={10: 1.0, 20: 0.5, 30: 2.0})
    last = make_report(tmp_path / "last", course)
    best = make_report(tmp_path / "best", course, evaluate={"keep": "best"})
    assert last.kept is not None
    assert best.kept is not None
    assert (last.kept.step, best.kept.step) == (30, 20)
