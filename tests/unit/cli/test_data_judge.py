"""`luthier data judge`: scored answers and pairs in, conversations of a judge out, every row in one place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.cli.main import main

Captured = pytest.CaptureFixture[str]
SCORED = {"prompt": "2 plus 3?", "response": "5", "score": 5, "critique": "Right."}
PAIR = {"prompt": "3 plus 3?", "chosen": "6", "rejected": "7"}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_row_is_in_one_place(tmp_path: Path, capsys: Captured) -> None:
    source = write(tmp_path / "rows.jsonl", SCORED, PAIR, {**SCORED, "score": 9}, '{"prompt": ', {**SCORED, "score": 2})
    out = tmp_path / "out" / "judged.jsonl"
    assert main(["data", "judge", source, "-o", str(out), "--max-rejected-share", "0.5"]) == 0
    shown = capsys.readouterr()
    lines = [" ".join(line.split()) for line in shown.out.splitlines()]
    assert {"judged 3", "dropped 2", "score_off_scale 1 the score is not on the scale that scores are read by"} <= set(
        lines
    )
    assert "3 + 2 = 5: every row is in one place" in shown.out
    assert "conversations  4, 1 rows being pairs of two answers" in shown.out
    assert "scores  1 of 1, 1 of 2, 2 of 5" in shown.out
    assert "critiques  2 of the rows, 2 by the rubric" in shown.out
    assert "note: 1 answers stand there once more with another score" in shown.out
    assert "rows.jsonl:3: the score 9 is not between 1 and 5 [score_off_scale]" in shown.err
    assert [row["source"].partition(":")[2] for row in read(out)] == ["1", "2:chosen", "2:rejected", "5"]
    assert [row["line"] for row in read(tmp_path / "out" / "judged.jsonl.rejected.jsonl")] == [3, 4]


def test_too_many_bad_rows_end_with_1(tmp_path: Path, capsys: Captured) -> None:
    source = write(tmp_path / "rows.jsonl", SCORED, {**SCORED, "score": None})
    out = str(tmp_path / "judged.jsonl")
    assert main(["data", "judge", source, "-o", out, "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert (shown["ok"], shown["rows"], shown["written"], shown["conversations"]) == (False, 2, 1, 1)
    assert shown["reasons"] == {"missing_key": 1}


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", SCORED, PAIR)
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for out in (first, second):
        assert main(["data", "judge", source, "-o", str(out)]) == 0
    assert first.read_bytes() == second.read_bytes()


def test_scale_template_reply_and_rubric_are_the_callers(tmp_path: Path, capsys: Captured) -> None:
    template, rubric = tmp_path / "template.txt", tmp_path / "rubric.txt"
    template.write_text("From {low} to {high}.{rubric}\n{prompt} -> {response}\n")
    rubric.write_text("10: right\n0: wrong\n")
    source = write(
        tmp_path / "rows.jsonl", {"ask": "2 plus 3?", "said": "5", "help": 1}, {"ask": "a", "said": "b", "help": 0.26}
    )
    options = ["--scale", "0", "10", "--source-scale", "0", "1", "--template", str(template), "--rubric", str(rubric)]
    keys = ["--prompt-key", "ask", "--response-key", "said", "--score-key", "help"]
    out = tmp_path / "judged.jsonl"
    assert (
        main(["data", "judge", source, "-o", str(out), *options, *keys, "--reply", r"{critique}\ngrade: {score}"]) == 0
    )
    assert "note: 1 scores were rounded to the scale's steps" in capsys.readouterr().out
    first, second = ([message["content"] for message in row["messages"]] for row in read(out))
    assert first == ["From 0 to 10.\n\n[Scores]\n10: right\n0: wrong\n2 plus 3? -> 5", "right\ngrade: 10"]
    assert second[1] == "wrong\ngrade: 3"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--scale", "5", "1"], "--scale goes from 5 to 1"),
        (["--reply", "fine"], "{critique} does not stand in it"),
        (["--template", "absent.txt"], "absent.txt: cannot be read"),
    ],
)
def test_a_call_that_cannot_work_writes_nothing(
    tmp_path: Path, capsys: Captured, options: list[str], said: str
) -> None:
    out = tmp_path / "judged.jsonl"
    assert main(["data", "judge", write(tmp_path / "rows.jsonl", SCORED), "-o", str(out), *options]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_standard_output_gets_the_rows_alone(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    source = write(tmp_path / "rows.jsonl", SCORED)
    assert main(["data", "judge", source, "-o", "-"]) == 0
    (row,) = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert row["messages"][1]["content"] == "Right.\nScore: 5"


def test_the_first_rows_only(tmp_path: Path) -> None:
    out = tmp_path / "judged.jsonl"
    source = write(tmp_path / "rows.jsonl", SCORED, PAIR, SCORED)
    assert main(["data", "judge", source, "-o", str(out), "--max-examples", "2"]) == 0
    assert len(read(out)) == 3
