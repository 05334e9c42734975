"""`luthier evaluate`: what it measures, prints and refuses, on the practice model and a run of a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.cli.main import main
from tests.builders import chat_row, write_jsonl

pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]
Captured = pytest.CaptureFixture[str]


def sums(count: int) -> list[dict[str, Any]]:
    """Additions, which the practice model can do."""
    return [chat_row(f"What is {n} + {n + 3}?", str(2 * n + 3)) for n in range(2, 2 + count)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with its own chat template."""
    folder = tmp_path_factory.mktemp("evaluate")
    rows = write_jsonl(folder / "rows.jsonl", sums(12))
    template = folder / "mine.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(folder / "home"))
        call = ["--model", "practice", "--data", str(rows), "--valid", "3", "--method", "lora", "--steps", "2"]
        call += ["--set", "method.targets=['q_proj']", "--chat-template", str(template)]
        assert main(["train", *call, "--output-dir", str(folder / "runs"), "--json"]) == 0
    (made,) = (folder / "runs").iterdir()
    return made


def read_json(capsys: Captured) -> Any:
    return json.loads(capsys.readouterr().out)


def test_a_model_is_measured_and_shows_where_it_is_wrong(tmp_path: Path, capsys: Captured) -> None:
    wrong = chat_row("What is 2 + 2?", "five\n\x1b[31m")
    rows = write_jsonl(tmp_path / "rows.jsonl", [*sums(8), wrong])
    assert main(["evaluate", "practice", "--data", str(rows)]) == 0
    out = capsys.readouterr().out
    assert "8 of 9  88.9%  56.5% to 98.0%" in out
    assert "wrong at rows.jsonl:9" in out
    assert "  asked     <|im_start|>user\\nWhat is 2 + 2?<|im_end|>\\n<|im_start|>assistant\\n" in out
    assert "  expected  five\\n\\x1b[31m" in out
    assert "\x1b" not in out
    assert main(["evaluate", "practice", "--data", str(rows), "-n", "4", "--wrong", "0", "--json"]) == 0
    (found,) = read_json(capsys)["models"]
    assert (found["exact_match"]["right"], found["exact_match"]["rows"], found["perplexity"]) == (4, 4, None)


def test_a_share_can_be_demanded(tmp_path: Path, capsys: Captured) -> None:
    rows = str(write_jsonl(tmp_path / "rows.jsonl", [*sums(3), chat_row("What is 2 + 2?", "five")]))
    texts = str(write_jsonl(tmp_path / "texts.jsonl", [{"text": "The park is full in spring."}]))
    assert main(["evaluate", "practice", "--data", rows, "--at-least", "0.75"]) == 0
    assert main(["evaluate", "practice", "--data", rows, "--at-least", "0.76"]) == 1
    assert "the exact match is lower than --at-least 0.76" in capsys.readouterr().err
    assert main(["evaluate", "practice", "--data", texts, "--at-least", "0.1", "--json"]) == 1
    assert read_json(capsys)["ok"] is False


def test_a_run_is_measured_on_the_rows_it_held_out_by_its_own_template(run: Path, capsys: Captured) -> None:
    assert main(["evaluate", str(run), "--base-too", "--wrong", "9", "--json"]) == 0
    tuned, base = read_json(capsys)["models"]
    assert (tuned["model"], base["model"]) == (f"ft:practice:{run.name}", "practice")
    assert tuned["exact_match"]["rows"] == base["exact_match"]["rows"] == 3
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    held = {entry["line"] for entry in ledger if entry["place"] == "valid"}
    for found in (tuned, base):
        for answer in found["exact_match"]["wrong"]:
            assert answer["line"] in held
            assert answer["prompt"].endswith("<|im_end|><|im_start|>assistant: ")
    assert tuned["exact_match"]["right"] + len(tuned["exact_match"]["wrong"]) == 3


def test_two_models_stand_beside_each_other(run: Path, tmp_path: Path, capsys: Captured) -> None:
    rows = str(write_jsonl(tmp_path / "rows.jsonl", sums(3)))
    assert main(["evaluate", "practice", "--data", rows, "--against", str(run), "--wrong", "0"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[:3]] == ["model", f"ft:practice:{run.name}", "practice"]
    assert "rows are right only with practice," in out[3]


def test_scores_are_held_against_the_right_ones(tmp_path: Path, capsys: Captured) -> None:
    """The practice model adds: a sum is a number, and so a score."""
    marked = [{**row, "prompt_id": str(number // 2)} for number, row in enumerate(sums(8))]
    rows = write_jsonl(tmp_path / "rows.jsonl", [*marked, chat_row("What is 2 + 2?", "9")])
    assert main(["evaluate", "practice", "--data", str(rows), "--wrong", "0"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "score right 95 % interval error Spearman better scored higher readable" in out
    assert "88.9% 56.5% to 98.0% 0.556 0.971 100.0% of 4 100.0%" in out
    assert main(["evaluate", "practice", "--data", str(rows), "--json"]) == 0
    scores = read_json(capsys)["models"][0]["scores"]
    assert (scores["rows"], scores["right"], scores["prompts"], scores["better_higher"]) == (9, 8, 4, 1)


def test_plain_texts_are_measured_by_perplexity(tmp_path: Path, capsys: Captured) -> None:
    texts = [{"text": "The sailor and the baker came to the market together."}, {"text": "The park is full in spring."}]
    rows = str(write_jsonl(tmp_path / "rows.jsonl", [*texts, {"prompt": "a <|im_end|>", "completion": "b"}]))
    assert main(["evaluate", "practice", "--data", rows]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["model", "perplexity", "loss", "texts", "tokens"]
    assert "note: 1 rows were left out: 1 control_token" in out
    assert main(["evaluate", "practice", "--data", rows, "--json"]) == 0
    (found,) = read_json(capsys)["models"]
    assert found["exact_match"] is None
    assert found["perplexity"]["texts"] == 2
    assert 1 < found["perplexity"]["perplexity"] < 20


@pytest.mark.parametrize(
    ("call", "said", "code"),
    [
        (["practice"], "practice is no run, so it held no rows out", 2),
        (["practice", "--data", "rows.jsonl", "--base-too", "--against", "practice"], "name two other models", 2),
        (["practice", "--data", "nowhere.jsonl"], "no data at nowhere.jsonl", 2),
        (["practise", "--data", "rows.jsonl"], "no model at practise", 1),
        (["practice", "--data", "rows.jsonl", "--chat-template", "none.jinja"], "no chat template at none.jinja", 2),
    ],
)
def test_what_cannot_be_measured_says_so(
    call: list[str], said: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", sums(1))
    assert main(["evaluate", *call]) == code
    assert said in capsys.readouterr().err


def test_a_run_without_held_out_rows_asks_for_some(run: Path, tmp_path: Path, capsys: Captured) -> None:
    import shutil

    copied = tmp_path / run.name
    shutil.copytree(run, copied)
    ledger = copied / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"valid"', '"train"'))
    assert main(["evaluate", str(copied)]) == 2
    assert "held no rows out" in capsys.readouterr().err
