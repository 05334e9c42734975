"""Comparison and certificate: absent, damaged, lying; and which answers are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import RunError
from luthier.reports.evidence import Answer, build_comparison, choose_answers, read_certificate, read_comparison
from tests.unit.reports.made import certificate, comparison


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    assert read_comparison(tmp_path) is None
    assert read_certificate(tmp_path) is None


@pytest.mark.parametrize("content", ["", "[]", "{", '{"results": [3]}', '{"results": [{}]}', '{"metrics": {"a": 1}}'])
def test_a_damaged_comparison_is_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text(content)
    with pytest.raises(RunError, match=r"comparison\.json cannot be read"):
        read_comparison(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", '{"claims": 3}', '{"claims": [{}]}', '{"valid": true}'])
def test_a_damaged_certificate_is_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "certificate.json").write_text(content)
    with pytest.raises(RunError, match=r"certificate\.json cannot be read"):
        read_certificate(tmp_path)


def test_a_certificate_is_no_better_than_its_claims(tmp_path: Path) -> None:
    (tmp_path / "certificate.json").write_text(json.dumps({**certificate(is_valid=False), "valid": True}))
    found = read_certificate(tmp_path)
    assert found is not None
    assert not found.is_valid
    assert [claim.claim for claim in found.broken] == ["artefact equals the live model"]
    (tmp_path / "certificate.json").write_text(json.dumps({**certificate(), "valid": "yes"}))
    found = read_certificate(tmp_path)
    assert found is not None
    assert not found.is_valid


def test_the_comparison_of_the_seed_is_read(tmp_path: Path) -> None:
    content = comparison(3, exact_match="better", length="no detectable difference")
    content["results"].append({"prompt": [{"role": "user", "content": "a"}], "lora_response": "b"})
    (tmp_path / "comparison.json").write_text(json.dumps(content))
    found = read_comparison(tmp_path)
    assert found is not None
    assert found.named("better") == ["exact match"]
    assert found.named("no detectable difference") == ["length"]
    assert found.metrics[0].has_interval
    last = found.answers[-1]
    assert (last.prompt, last.base, last.gain) == ("a", None, None)
    assert found.answers[0].gain == -0.1


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("a\nb", "a\nb"),
        ([{"role": "user", "content": "a"}], "a"),
        ([{"role": "system", "content": "s"}, {"role": "user", "content": "a"}], "system: s\n\nuser: a"),
        ([{"role": "assistant", "content": "b"}], "assistant: b"),
        ([{"role": "user"}], '[{"role":"user"}]'),
        ([], "[]"),
        ({"a": 1}, '{"a":1}'),
    ],
)
def test_a_prompt_reads_as_a_conversation(prompt: Any, shown: str) -> None:
    found = build_comparison({"results": [{"prompt": prompt, "lora_response": "b"}]})
    assert found.answers[0].prompt == shown


def answers(*scores: float | None) -> list[Answer]:
    return [Answer(f"p{n}", "b", "t", base_score=0.0, tuned_score=score) for n, score in enumerate(scores)]


def test_best_median_and_worst_answers_are_shown() -> None:
    shown = choose_answers(answers(*(n / 10 for n in range(11))))
    assert [why for why, _ in shown] == ["best", "best", "median", "median", "worst", "worst"]
    assert [answer.tuned_score for _, answer in shown] == [1.0, 0.9, 0.6, 0.5, 0.1, 0.0]


def test_few_or_unscored_answers_are_shown_as_they_are() -> None:
    assert [why for why, _ in choose_answers(answers(0.1, 0.9, 0.5))] == ["best", "median", "worst"]
    assert [why for why, _ in choose_answers(answers(0.5))] == ["best"]
    assert [answer.prompt for _, answer in choose_answers(answers(*[None] * 9))] == ["p0", "p1", "p2", "p3", "p4", "p5"]
    assert [why for why, _ in choose_answers(answers(0.5, None))] == ["", ""]
    assert [why for why, _ in choose_answers(answers(0.5, 0.5, 0.5))] == ["", "", ""]
    assert choose_answers([]) == []
