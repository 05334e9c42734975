"""What the tables say of one run, and of several side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.reports import tables
from luthier.reports.model import Report, read_report
from tests.unit.reports.made import Course, ledger, make_report, write_run


def ended_at(folder: Path, loss: float | None, *, data: str = "d", **more: object) -> Report:
    run = write_run(folder, Course(held_out={} if loss is None else {100: loss}), **more)  # type: ignore[arg-type]
    lineage = json.loads((folder / "lineage.json").read_text())
    lineage["data"]["hash"] = data
    (folder / "lineage.json").write_text(json.dumps(lineage))
    return read_report(run)


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        ((0.5, 0.25, 0.75), "B has the lowest held-out loss, 0.25; A is next, 0.5."),
        ((0.5, 0.5), "All of these runs end at the same held-out loss, 0.5."),
        ((0.5, 0.75, 0.5), "A and C share the lowest held-out loss, 0.5."),
        ((0.5, None), "Fewer than two of these runs measured held-out rows, so they cannot be ranked."),
    ],
)
def test_the_leader_is_named(losses: tuple[float | None, ...], sentence: str, tmp_path: Path) -> None:
    assert tables.find_leader([ended_at(tmp_path / str(n), loss) for n, loss in enumerate(losses)]) == sentence


def test_runs_on_other_rows_are_not_ranked(tmp_path: Path) -> None:
    reports = [ended_at(tmp_path / "a", 0.5), ended_at(tmp_path / "b", 0.25, data="e")]
    assert "cannot be ranked" in tables.find_leader(reports)
    assert all(line.best == () for line in tables.list_overview(reports))
    same = [ended_at(tmp_path / "c", 0.5), ended_at(tmp_path / "d", 0.25)]
    assert [line.label for line in tables.list_overview(same) if line.best == (1,)] == ["held-out loss"]


def test_settings_that_differ_are_listed(tmp_path: Path) -> None:
    reports = [make_report(tmp_path / "a"), make_report(tmp_path / "b", method={"rank": 4})]
    found = {line.label: line.values for line in tables.list_differences(reports) if line.label != "data.train"}
    assert found == {"method.rank": ("8", "4")}


def test_the_ledger_is_a_sum(tmp_path: Path) -> None:
    report = make_report(tmp_path / "run", rows=ledger(1200, 60, dropped=["not_json"] * 7))
    assert tables.ledger_sum(report) == "1,200 + 60 + 7 = 1,267 rows: every row is in exactly one place"
    assert tables.list_reasons(report)[0].where.endswith("rows.jsonl:1265, ...")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(True, "true"), (False, "false"), (None, "-"), (0.001, "0.001"), ([], "none"), (["a", "b"], "a, b"), (3, "3")],
)
def test_settings_are_shown_as_they_are_written(value: object, shown: str) -> None:
    assert tables.show_setting(value) == shown
