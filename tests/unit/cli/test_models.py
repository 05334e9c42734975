"""`luthier models` and `luthier rows`: what they print, refuse and delete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.cli.main import main
from luthier.runs import events
from luthier.runs.journal import rows_of_step
from luthier.runs.run import Run
from luthier.workflow import prepare_data
from tests.unit.runs.made import build_spec, finish, make_run, step_done, write_rows

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "runs", build_spec(write_rows(tmp_path / "rows.jsonl")))


def read_json(capsys: Captured) -> Any:
    return json.loads(capsys.readouterr().out)


def test_models_are_listed_once_they_have_weights(run: Run, capsys: Captured) -> None:
    assert main(["models"]) == 0
    assert capsys.readouterr().out == "no models yet: `luthier train` makes one\n"
    assert main(["models", "--all", "--json"]) == 0
    assert [each["final"] for each in read_json(capsys)["models"]] == [None]
    finish(run)
    for call in (["models"], ["models", "list"]):
        assert main(call) == 0
        out = capsys.readouterr().out
        assert f"{run.model_id}  qlora   2026-11-20 14:30" in out
        assert main([*call, "--json"]) == 0
        assert read_json(capsys)["models"][0]["id"] == run.model_id


def test_show_says_what_a_model_comes_from(run: Run, capsys: Captured) -> None:
    finish(run)
    assert main(["models", "show", run.model_id]) == 0
    out = capsys.readouterr().out
    assert out.startswith(run.model_id)
    assert "finished" in out
    assert "rows.jsonl" in out
    assert f"(sha256 {run.lineage['data']['hash'][:12]})" in out
    assert main(["models", "show", run.id, "--json"]) == 0
    shown = read_json(capsys)
    assert (shown["run"], shown["state"], shown["lineage"]["run"]) == (run.id, "finished", run.id)


def test_removing_asks_before_it_deletes(run: Run, tmp_path: Path, capsys: Captured) -> None:
    finish(run)
    child = make_run(tmp_path / "runs", build_spec(tmp_path / "rows.jsonl", run.model_id))
    assert main(["models", "remove", child.id, "--delete-files"]) == 2
    assert "--yes says that this is meant" in capsys.readouterr().err
    assert main(["models", "remove", run.id, "--delete-files", "--yes"]) == 1
    assert child.folder.is_dir()
    assert run.folder.is_dir()
    capsys.readouterr()
    assert main(["models", "remove", run.id]) == 0
    text = capsys.readouterr()
    assert f"{run.model_id} is forgotten" in text.out
    assert f"{child.id} starts from it" in text.err
    assert run.folder.is_dir()
    assert main(["models", "remove", child.id, "--delete-files", "--yes", "--json"]) == 0
    assert read_json(capsys)["deleted"] is True
    assert not child.folder.exists()
    assert main(["models", "remove", child.id]) == 1


def test_a_run_in_training_is_not_removed(run: Run, capsys: Captured) -> None:
    with run.lock():
        assert main(["models", "remove", run.id, "--yes", "--delete-files"]) == 1
    assert "is being trained" in capsys.readouterr().err


def test_rows_of_a_step_and_steps_of_a_row(run: Run, capsys: Captured) -> None:
    run.events.append(step_done(1))
    expected = [row.where for row in rows_of_step(run.spec, prepare_data(run.spec), 1)]
    assert main(["rows", run.id, "--step", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == ["step 1 of 5: trained", *(f"  {where}" for where in expected)]
    assert main(["rows", run.id, "--row", expected[0], "--json"]) == 0
    shown = read_json(capsys)
    assert (shown["place"], shown["steps"][0]) == ("train", {"step": 1, "is_done": True, "deviations": []})
    assert main(["rows", str(run.folder), "--row", f"any/where/{expected[0]}"]) == 0
    out = capsys.readouterr().out
    assert f"{expected[0]} is in 2 steps\n  step 1: trained\n" in out
    assert "not taken yet" in out


def test_rows_tells_of_steps_that_went_otherwise(run: Run, capsys: Captured) -> None:
    run.events.append(events.StepReplayed(2, "out of memory", 512))
    run.events.append(step_done(2))
    run.events.append(events.StepSkipped(3, "loss is not finite", ["rows.jsonl:1"]))
    main(["rows", run.id, "--step", "2"])
    assert "step 2 of 5: replayed in micro-batches of 512 tokens (out of memory)" in capsys.readouterr().out
    main(["rows", run.id, "--step", "3"])
    assert "step 3 of 5: skipped, nothing of it was trained (loss is not finite)" in capsys.readouterr().out
    main(["rows", run.id, "--step", "3", "--json"])
    shown = read_json(capsys)
    assert shown["deviations"] == [{"kind": "step_skipped", "reason": "loss is not finite"}]
    assert not shown["is_done"]
    assert {row["file"] for row in shown["rows"]} == {"rows.jsonl"}


def test_rows_tells_where_else_a_row_went(run: Run, capsys: Captured) -> None:
    said = []
    for line in range(1, 11):
        assert main(["rows", run.id, "--row", f"rows.jsonl:{line}"]) == 0
        said.append(capsys.readouterr().out.strip())
    assert sum(each.endswith("is held out for evaluation") for each in said) == 2
    assert sum(each.endswith("is dropped: duplicate") for each in said) == 1


def test_rows_works_from_the_cache_and_refuses_other_data(
    run: Run, tmp_path: Path, capsys: Captured, own_home: Path
) -> None:
    import shutil

    rows = tmp_path / "rows.jsonl"
    content = rows.read_bytes()
    rows.unlink()
    assert main(["rows", run.id, "--step", "1"]) == 0
    shutil.rmtree(own_home / "tokens")
    rows.write_bytes(content)
    assert main(["rows", run.id, "--step", "1"]) == 0
    shutil.rmtree(own_home / "tokens")
    rows.write_bytes(content.replace(b"question 3", b"question x"))
    capsys.readouterr()
    assert main(["rows", run.id, "--step", "1"]) == 1
    assert "no longer what was trained" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ([], "what should be shown?"),
        (["--step", "1", "--row", "a:1"], "what should be shown?"),
        (["--step", "99"], "no step 99: the run has the steps 1 to 5"),
        (["--row", "rows.jsonl"], "names no row"),
        (["--row", "rows.jsonl:x"], "names no row"),
        (["--row", "other.jsonl:1"], "no rows were read from `other.jsonl`"),
        (["--row", "rows.jsonl:99"], "rows.jsonl has no row on line 99"),
    ],
)
def test_a_wrong_call_of_rows_says_what(call: list[str], said: str, run: Run, capsys: Captured) -> None:
    assert main(["rows", run.id, *call]) == 2
    assert said in capsys.readouterr().err
