"""The sums of a ledger, and what is shown of dropped rows."""

from __future__ import annotations

from pathlib import Path

from luthier.reports.rows import read_rows
from tests.unit.reports.made import ledger, write_lines


def test_the_sums_add_up(tmp_path: Path) -> None:
    write_lines(tmp_path / "ledger.jsonl", ledger(30, 5, tokens=50, dropped=["not_json", "too_long", "too_long"]))
    rows = read_rows(tmp_path)
    assert rows.places == {"train": 30, "valid": 5, "dropped": 3}
    assert rows.count == 38
    assert rows.reasons == {"too_long": 2, "not_json": 1}
    assert rows.where == {"not_json": ("rows.jsonl:36",), "too_long": ("rows.jsonl:37", "rows.jsonl:38")}
    assert rows.too_long.tolist() == [150, 150]
    assert len(rows.lengths) == 35
    assert rows.tokens["train"] == sum(50 - n % 40 for n in range(30))
    assert rows.trained_share == 600 / rows.tokens["train"]


def test_damaged_lines_are_counted_and_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_bytes(
        b'{"file":"a","line":1,"place":"train"}\nnonsense\n[]\n{"place":"nowhere"}\n'
    )
    assert read_rows(tmp_path).unreadable == 3


def test_a_folder_without_a_ledger_has_no_rows(tmp_path: Path) -> None:
    rows = read_rows(tmp_path)
    assert (rows.count, rows.trained_share, rows.examples) == (0, 0.0, ())


def test_a_few_rows_of_each_reason_are_shown_without_keys(tmp_path: Path) -> None:
    key = "sk-" + "a" * 30
    lines = [
        {"file": "a", "line": n, "reason": f"reason {n % 3}", "message": key, "row": f"x {key}"} for n in range(30)
    ]
    write_lines(tmp_path / "rejected.jsonl", [*lines, {"file": "a", "line": 99, "reason": "nul", "row_base64": "AAE="}])
    examples = read_rows(tmp_path).examples
    assert [example.where for example in examples] == ["a:0", "a:1", "a:2", "a:3", "a:4", "a:5", "a:99"]
    assert {(example.message, example.row) for example in examples[:-1]} == {("[hidden]", "x [hidden]")}
    assert examples[-1].row == "AAE="
