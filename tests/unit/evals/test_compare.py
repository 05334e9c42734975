"""Two models side by side, with samplers whose answers are written down: what is measured, said and written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from luthier.engines.verbs import SampleParams
from luthier.errors import CallError, DataError, ModelError
from luthier.evals import answers
from luthier.evals.compare import JUDGED, LOSS, METRIC, PAIRS, Compared, Wanted, compare_model, list_named
from luthier.evals.judge import Judge
from luthier.evals.verdict import describe
from luthier.reports.evidence import read_comparison
from luthier.runs.resolve import practice_folder
from tests.unit.evals.scripted import Scripted

WANTED = Wanted(SampleParams(40, 0.7))
ROWS = [{"prompt": f"{number} plus 0?", "completion": f'{{"sum": {number}}}'} for number in range(20)]


def tokenizer() -> Any:
    from luthier.data.tokens import ModelText

    return ModelText(practice_folder()).tokenizer


class Right(Scripted):
    """Answers as the rows do, and finds every token likelier than the base does."""

    def __init__(self) -> None:
        text = tokenizer()

        def answer(prompt: list[int]) -> list[int]:
            asked = str(text.decode(prompt, skip_special_tokens=False))
            number = asked.rpartition("user\n")[2].partition(" ")[0]
            ids: list[int] = text.encode(f'{{"sum": {number}}}', add_special_tokens=False).ids
            return ids

        super().__init__(answer, loss=0.25)


class Wrong(Scripted):
    """Answers one word to everything."""

    def __init__(self) -> None:
        ids = tokenizer().encode("Sorry", add_special_tokens=False).ids
        super().__init__(lambda prompt: ids, loss=0.5)


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter folder over the practice model; who loads it gets the right answers."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "practice"}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    monkeypatch.setattr(answers, "load_sampler", lambda resolved, _: Right() if resolved.adapters else Wrong())
    return folder


def write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def compare(tuned: Path, **wanted: Any) -> Compared:
    return compare_model(str(tuned), replace(WANTED, **wanted), tuned.parent / "home")


def test_rows_with_answers(tuned: Path, tmp_path: Path) -> None:
    found = compare(tuned, data=write_rows(tmp_path / "rows.jsonl", ROWS))
    facts = found.facts
    assert (facts["base_model"], facts["lora_weights"]) == ("practice", str(tuned))
    assert len(facts["results"]) == 20
    first = facts["results"][0]
    assert first["prompt"] == [{"role": "user", "content": "0 plus 0?"}]
    assert (first["lora_response"], first["base_response"]) == ('{"sum": 0}', "Sorry")
    assert first["reference"] == '{"sum": 0}'
    assert (first["lora_score"], first["base_score"], facts["score"]) == (1.0, 0.0, "exact match")
    assert list(facts["metrics"]) == ["exact match", "valid JSON", LOSS, METRIC]
    exact = facts["metrics"]["exact match"]
    assert (exact["base"], exact["tuned"], exact["wins"], exact["verdict"]) == (0.0, 1.0, 20, "better")
    assert facts["metrics"][LOSS]["difference"] == pytest.approx(-0.25)
    assert facts["metrics"][LOSS]["verdict"] == "better"
    assert facts["forgetting"]["verdict"] == "better"
    assert facts["drift"]["refusals"]["verdict"] == "fewer"
    assert facts["verdict"].startswith(
        "The tuned model is better than practice on exact match (0 to 1, difference +0.7"
    )
    assert "what the model was trained on is not known here" in facts["notes"][0]


def test_the_report_reads_what_was_written(tuned: Path, tmp_path: Path) -> None:
    found = compare(tuned, data=write_rows(tmp_path / "rows.jsonl", ROWS))
    found.write(tmp_path / "run" / "comparison.json")
    read = read_comparison(tmp_path / "run")
    assert read is not None
    assert read.base_model == "practice"
    assert read.named("better") == ["exact match", "valid JSON", LOSS, METRIC]
    assert all(metric.has_interval for metric in read.metrics)
    assert {answer.gain for answer in read.answers} == {1.0}


def test_the_same_twice_is_the_same_file(tuned: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    once, again = (compare(tuned, data=data).facts for _ in range(2))
    assert {**once, "created": ""} == {**again, "created": ""}


def test_prompts_without_answers_are_set_side_by_side(tuned: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("hello\n3 plus 0?\n")
    facts = compare(tuned, prompts=path).facts
    assert facts["metrics"] == {}
    assert facts["results"][1]["lora_response"] == '{"sum": 3}'
    assert "lora_score" not in facts["results"][0]
    assert "stand side by side" in facts["verdict"]
    assert facts["forgetting"]["metric"] == METRIC
    assert len(compare(tuned, prompts=path, rows=1).facts["results"]) == 1


def test_the_shipped_prompts_where_nothing_else_is_named(tuned: Path) -> None:
    facts = compare(tuned).facts
    assert len(facts["results"]) >= 15
    assert facts["asked"]["from"] == "the prompts that are shipped"


def test_pairs_and_plain_texts(tuned: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"{n} plus 0?", "chosen": "it is so", "rejected": "it " * (n + 9)} for n in range(8)]
    facts = compare(tuned, data=write_rows(tmp_path / "pairs.jsonl", pairs)).facts
    # Every token costs the same, so the shorter answer is always the likelier.
    assert facts["metrics"][PAIRS]["base"] == facts["metrics"][PAIRS]["tuned"] == 1.0
    assert facts["metrics"][PAIRS]["verdict"] == "no detectable difference"
    texts = [{"text": f"{n} words of some text"} for n in range(8)]
    facts = compare(tuned, data=write_rows(tmp_path / "texts.jsonl", texts)).facts
    assert list(facts["metrics"]) == [LOSS, METRIC]
    assert facts["results"] == []
    assert facts["held_out"]["tuned_perplexity"] == pytest.approx(1.284, abs=1e-3)


def test_alone(tuned: Path, tmp_path: Path) -> None:
    facts = compare(tuned, data=write_rows(tmp_path / "rows.jsonl", ROWS), with_base=False).facts
    assert facts["measured"]["exact match"] == 1.0
    assert facts["metrics"] == {}
    assert "base_model" not in facts
    assert "base_response" not in facts["results"][0]
    assert facts["verdict"] == "Looked at alone, on 20 prompts; not compared with its base."


def test_a_judge_decides_first_and_is_asked_once(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def ask(_: Judge, messages: Any) -> str:
        asked.append(messages)
        first = messages[-1]["content"].split("=== ANSWER A ===")[1].split("=== ANSWER B ===")[0]
        return "B" if "Sorry" in first else "A"

    monkeypatch.setattr(Judge, "ask", ask)
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    for _ in range(2):
        facts = compare(tuned, data=data, judge=Judge("http://localhost/v1", "mine")).facts
    assert len(asked) == 40
    assert facts["metrics"][JUDGED]["tuned"] == 1.0
    assert facts["score"] == JUDGED
    assert facts["judge"] == {"model": "mine", "judged": 20, "unclear": 0}


def test_calls_that_do_not_hold(tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(CallError, match="--prompts and --data"):
        compare(tuned, prompts=tmp_path / "p", data="d")
    with pytest.raises(ModelError, match="practice is a base model") as caught:
        compare_model("practice", WANTED, tmp_path)
    assert "--no-compare-base" in caught.value.hint


def test_models_by_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b", "a", "file"):
        (tmp_path / name).mkdir()
    (tmp_path / "a.txt").write_text("")
    assert list_named([f"{tmp_path}/[ab]*", "practice", f"{tmp_path}/a"]) == [
        str(tmp_path / "a"),
        str(tmp_path / "b"),
        "practice",
    ]
    monkeypatch.chdir(tmp_path)
    assert list_named(["?"]) == ["a", "b"]
    with pytest.raises(ModelError, match=r"no folder is like runs/\*"):
        list_named(["runs/*"])


def entry(verdict: str) -> dict[str, Any]:
    return {"base": 0.5, "tuned": 0.75, "low": 0.1, "high": 0.4, "verdict": verdict}


def test_the_verdict_says_what_is_known_in_words() -> None:
    nothing = "no detectable difference"
    assert describe({"a": entry(nothing)}, "it", "1 prompt") == (
        "No detectable difference between the tuned model and it on 1 prompt."
    )
    assert describe({"a": entry("better"), "b": entry("worse"), "c": entry(nothing)}, "it", "9 texts") == (
        "The tuned model is better than it on a (0.5 to 0.75, difference +0.1 to +0.4), "
        "but worse than it on b (0.5 to 0.75, difference +0.1 to +0.4)."
    )


def test_different_tokenizers_are_not_compared_by_loss(tuned: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(practice_folder(), other)
    facts = orjson.loads((other / "tokenizer.json").read_bytes())
    (other / "tokenizer.json").write_bytes(orjson.dumps(facts, option=orjson.OPT_INDENT_2) + b" \n")
    found = compare(tuned, data=write_rows(tmp_path / "rows.jsonl", ROWS), base=str(other)).facts
    assert list(found["metrics"]) == ["exact match", "valid JSON"]
    assert found["forgetting"] == {}
    assert any("different tokenizers" in note for note in found["notes"])


def test_a_general_text_that_says_nothing_is_refused(tuned: Path, tmp_path: Path) -> None:
    (tmp_path / "general.txt").write_text("x")
    with pytest.raises(DataError, match="too short to measure forgetting"):
        compare(tuned, data=write_rows(tmp_path / "rows.jsonl", ROWS), general=tmp_path / "general.txt")
