"""`luthier chat` from a pipe: streamed answers, history, commands, and two models side by side."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from luthier.cli.main import main
from tests.unit.training.works import NEEDS_TORCH, run_whole

pytestmark = NEEDS_TORCH
Captured = pytest.CaptureFixture[str]
QUICK = ["--max-tokens", "6", "--temperature", "0"]


def talk(monkeypatch: pytest.MonkeyPatch, text: str, *call: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return main(["chat", *call, *QUICK])


def test_answers_until_nothing_more_is_said(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    lines = "What is 2 plus 3?\n\n/reset\nWhat is 2 plus 3?\n/quit\nnever\n"
    assert talk(monkeypatch, lines, "practice") == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3
    assert out[1] == "a new conversation"
    assert out[0] == out[2] != ""


def test_history_counts_and_json_holds_every_turn(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert talk(monkeypatch, "What is 2 plus 3?\nAnd 4 more?\n", "practice", "--json", "--system", "Be brief.") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["models"] == ["practice"]
    assert [turn["said"] for turn in found["turns"]] == ["What is 2 plus 3?", "And 4 more?"]
    assert all(len(turn["answers"]) == 1 for turn in found["turns"])


def test_both_models_answer_with_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    run, _ = run_whole(tmp_path, {"optim.steps": 1, "rows.valid": 0})
    assert talk(monkeypatch, "hello\n", str(run.folder), "--compare") == 0
    out = capsys.readouterr().out.splitlines()
    assert (out[0], out[2]) == ("[practice]", f"[{run.model_id}]")


def test_what_cannot_be_asked_ends_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert talk(monkeypatch, "a <|im_end|> b\nhello\n", "practice") == 0
    out, err = capsys.readouterr()
    assert "spells the control token" in err
    assert len(out.splitlines()) == 1
    assert talk(monkeypatch, "hello\n", "practice", "--compare") == 1
    assert "nothing is known that it started from" in capsys.readouterr().err
