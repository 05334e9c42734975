"""Errors are two lines with a way on, in text and in JSON, and never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.cli.main import COMMANDS, main

Captured = pytest.CaptureFixture[str]


def test_every_command_has_help(capsys: Captured) -> None:
    assert len(COMMANDS) >= 11
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        assert "Usage: luthier " + name in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "code", "said", "hint"),
    [
        (["trian"], 2, "no command `trian`", "did you mean `luthier train`?"),
        (["data", "chekc", "x"], 2, "no such command 'chekc'", "`luthier data --help`"),
        (["train", "--rnak", "3"], 2, "no such option", "`luthier train --help`"),
        (["train", "nowhere.toml"], 2, "no spec at nowhere.toml", "luthier recipes list"),
        (["train", "--model", "practice"], 2, "no training data", "--data FILE"),
        (["train", "--model", "practice", "--data", "no.jsonl"], 2, "no data at no.jsonl", "hf:org/name:split"),
        (["data", "check", "no.jsonl"], 2, "no data at no.jsonl", "give a file"),
        (["data", "show", "no.jsonl"], 2, "no model to render with", "--model practice"),
        (["data", "split", "no.jsonl"], 2, "where should the rows go?", "-o DIR"),
        (["data", "convert", "x", "--to", "xml", "-o", "y"], 2, "no format `xml`", "alpaca"),
        (["recipes", "show", "demo-qlor"], 2, "no recipe `demo-qlor`", "demo-qlora"),
        (["chat", "~nobody0/x"], 1, "no model at ~nobody0/x", "practice"),
        (["train", "--model", "./nowhere", "--data", "no.jsonl"], 1, "no model at ./nowhere", "practice"),
        (["spec", "check", "notes.txt"], 2, "not a run spec", ".toml"),
    ],
)
def test_a_wrong_call_says_what_and_what_next(
    call: list[str], code: int, said: str, hint: str, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(call) == code
    text = capsys.readouterr()
    assert text.out == ""
    error, hinted = text.err.strip().split("\n")
    assert error.startswith("error: ")
    assert said in error.lower()
    assert hinted.startswith("hint: ")
    assert hint in hinted
    assert main([*call, "--json"]) == code
    shown = json.loads(capsys.readouterr().out)["error"]
    assert shown["code"]
    assert said in shown["message"].lower()


def test_an_error_of_our_own_is_reported_without_a_traceback(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[str]:
        raise RuntimeError("boom")

    monkeypatch.setattr("luthier.runs.recipes.list_recipes", broken)
    assert main(["recipes", "list"]) == 1
    text = capsys.readouterr().err
    assert "error of Luthier's own: RuntimeError: boom" in text
    assert "Traceback" not in text
    with pytest.raises(RuntimeError):
        main(["--traceback", "recipes", "list"])


def test_a_closed_pipe_is_not_an_error() -> None:
    """`luthier ... | head -1` ends quietly."""
    reader = [sys.executable, "-c", "import sys; sys.stdin.readline()"]
    command = [str(Path(sys.executable).with_name("luthier")), "spec", "schema"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as luthier:
        subprocess.run(reader, stdin=luthier.stdout, check=True)
        assert luthier.stdout is not None
        luthier.stdout.close()
        assert luthier.stderr is not None
        assert luthier.stderr.read() == b""


def test_doctor_names_keys_and_never_shows_them(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary123")
    assert main(["doctor", "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["keys_present"] == ["HF_TOKEN"]
    assert "canary" not in out


def test_doctor_names_the_conflict_and_the_command(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.0" if name == "tokenizers" else real(name))
    assert main(["doctor"]) == 1
    assert "tokenizers 0.1.0 is not <1,>=0.21; run: pip install" in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, capsys: Captured) -> None:
    assert main(["completion", shell]) == 0
    assert "_LUTHIER_COMPLETE" in capsys.readouterr().out


def test_recipes_are_copied_as_files_of_ones_own(tmp_path: Path, capsys: Captured) -> None:
    assert main(["recipes", "list", "--json"]) == 0
    names = [recipe["name"] for recipe in json.loads(capsys.readouterr().out)["recipes"]]
    assert main(["recipes", "copy", names[0], str(tmp_path)]) == 0
    copied = tmp_path / f"{names[0]}.toml"
    capsys.readouterr()
    assert main(["spec", "check", str(copied)]) == 0
    assert main(["recipes", "copy", names[0], str(tmp_path)]) == 2
    assert main(["recipes", "copy", "demo-qlora", str(tmp_path), "--force"]) == 0
    capsys.readouterr()
    assert main(["train", str(tmp_path / "demo-qlora.toml"), "--dry-run"]) == 0
    assert main(["recipes", "copy", names[0], str(tmp_path), "--force"]) == 0


def test_spec_show_says_where_values_come_from(tmp_path: Path, capsys: Captured) -> None:
    spec = tmp_path / "run.toml"
    spec.write_text('[model]\nbase = "practice"\n[data]\ntrain = "rows.jsonl"\n')
    assert main(["spec", "show", str(spec), "--method", "lora", "--set", "optim.batch=4"]) == 0
    out = capsys.readouterr().out
    assert 'base = "practice"  # run.toml:2' in out
    assert 'kind = "lora"  # flag --method' in out
    assert "batch = 4  # --set optim.batch" in out
    assert "max_length = 2048\n" in out


def test_the_shown_spec_loads_to_the_same_spec(tmp_path: Path, capsys: Captured) -> None:
    spec = tmp_path / "run.toml"
    spec.write_text('[model]\nbase = "practice"\n[data]\ntrain = "rows.jsonl"\n[method]\nkind = "qlora"\nrank = 4\n')
    main(["spec", "show", str(spec)])
    (tmp_path / "again.toml").write_text(capsys.readouterr().out)
    main(["spec", "show", str(spec), "--json"])
    first = json.loads(capsys.readouterr().out)["spec"]
    main(["spec", "show", str(tmp_path / "again.toml"), "--json"])
    assert json.loads(capsys.readouterr().out)["spec"] == first
