"""`luthier plan` says what a run would do and take, as text and as JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from luthier.cli.main import main
from luthier.cli.plan_report import print_plan, show_bytes, show_seconds
from luthier.machine import find_machine
from luthier.spec.plan import Decision, Memory
from tests.builders import chat_row, write_jsonl
from tests.unit.spec.test_plan import make_plan, make_spec

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return str(write_jsonl(tmp_path / "rows.jsonl", [chat_row(f"say {n}", f"yes {n}") for n in range(40)]))


def test_the_plan_of_the_demo(tmp_path: Path, capsys: Captured) -> None:
    assert main(["recipes", "copy", "demo-qlora", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["plan", str(tmp_path / "demo-qlora.toml")]) == 0
    out = capsys.readouterr().out
    for words in (
        "qlora sft of practice",
        "79 of 16 examples (3 epochs)",
        "233,472 of 2,164,928 parameters (10.78%)",
        "1 process, 16 examples of a step",
        "activations",
        "every linear layer but the head",
        "0.03 of 79 steps",
        "about ",
    ):
        assert words in out


def test_the_plan_as_json(rows: str, capsys: Captured) -> None:
    call = ["plan", "--model", "practice", "--data", rows, "--method", "lora", "--batch", "4", "--processes", "2"]
    assert main([*call, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["spec"]["method"]["kind"] == "lora"
    assert shown["steps"] == 10
    assert shown["batch_per_process"] == 2
    assert set(shown["memory"]["items"]) == {
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "overhead",
    }
    assert shown["data"]["rows"] == 40
    assert shown["machine"]["cores"] >= 1
    assert main(call) == 0
    assert "2 processes, 2 examples of a step each" in capsys.readouterr().out


def test_what_does_not_fit_is_an_error(rows: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(find_machine(), device="cpu", device_free_bytes=1 << 20)
    monkeypatch.setattr("luthier.training.planner.find_machine", lambda **_: small)
    assert main(["plan", "--model", "practice", "--data", rows, "--method", "lora", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "plan_does_not_fit"


def test_a_plan_needs_data(capsys: Captured) -> None:
    assert main(["plan", "--model", "practice"]) == 2
    assert "no training data" in capsys.readouterr().err


def test_a_correction_and_uneven_processes_are_said(capsys: Captured) -> None:
    plan = make_plan(make_spec(compute={"processes": 3}), Decision("method.targets", [f"m{n}" for n in range(20)], "x"))
    print_plan(replace(plan, memory=Memory({"weights": 3 << 30}, 2 << 30, "cpu", 1.5)))
    out = capsys.readouterr().out
    assert "x 1.50" in out
    assert "does not fit" in out
    assert "3 processes, 5 to 6 examples of a step each" in out
    assert "m11 and 8 more" in out


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.2, "1 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (5400, "1 h 30 min"), (200_000, "2.3 days")],
)
def test_times_read_plainly(seconds: float, shown: str) -> None:
    assert show_seconds(seconds) == shown


@pytest.mark.parametrize(
    ("count", "shown"), [(12, "12 B"), (2048, "2.0 KiB"), (3 << 20, "3.0 MiB"), (5 << 30, "5.0 GiB")]
)
def test_sizes_read_plainly(count: int, shown: str) -> None:
    assert show_bytes(count) == shown
