"""What was looked for in a comparison is told, found or not, and taints the verdict where it must."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.reports.evidence import build_comparison, read_comparison
from luthier.reports.findings import describe_asked, list_findings
from luthier.reports.html import render_page
from luthier.reports.model import read_report
from luthier.reports.verdict import find_gain, find_verdict
from tests.unit.reports.made import certificate, comparison, looked_for, write_run


def findings(**changes: Any) -> dict[str, tuple[str, str]]:
    found = build_comparison({**comparison(), **looked_for(**changes)})
    return {each.label: (each.mark, each.sentence) for each in list_findings(found)}


def test_what_was_looked_for_and_not_found_is_told() -> None:
    assert findings() == {
        "contamination": (
            "good",
            "None of the 12 rows, and none of their prompts, stands among the 300 trained rows.",
        ),
        "parroting": ("good", "No answer of the tuned model repeats a training answer that would be wrong here."),
        "length": ("open", "The answers became longer: 8 to 14.5 words on average (difference +5 to +8)."),
        "refusals": ("good", "No detectable difference: 0 % to 0 % of them."),
        "forgetting": (
            "good",
            "No detectable difference: general text perplexity went from 4 to 4.1 (difference -0.1 to +0.1).",
        ),
    }


@pytest.mark.parametrize(
    ("changes", "label", "mark", "told"),
    [
        (
            {"contamination": {"same_row": 2, "same_prompt": 5}},
            "contamination",
            "bad",
            "2 of the 12 rows were trained, and 3 more share their prompt with a trained row: they say nothing",
        ),
        ({"contamination": {"same_prompt": 1}}, "contamination", "warn", "1 of the 12 rows shares its prompt"),
        ({"contamination": {"training_rows": 0}}, "contamination", "open", "No training row could be looked at"),
        ({"parroting": {"tuned": 3, "base": 1}}, "parroting", "warn", "3 of 12 answers repeat training answers"),
        ({"forgetting": {"verdict": "worse"}}, "forgetting", "bad", "Worse: general text perplexity went from 4"),
        ({"asked": {"cut": {"base": 0, "tuned": 4}}}, "cut answers", "warn", "after 150 tokens: 4 of the tuned model"),
        (
            {"drift": {"refusals": {"base": 0.0, "tuned": 0.25, "low": 0.1, "high": 0.4, "verdict": "more"}}},
            "refusals",
            "warn",
            "More answers refuse: 0 % to 25.0 %",
        ),
    ],
)
def test_what_was_found_is_told(changes: dict[str, Any], label: str, mark: str, told: str) -> None:
    found = findings(**changes)[label]
    assert found[0] == mark
    assert told in found[1]


def test_what_stands_among_the_metrics_is_not_told_twice() -> None:
    told = build_comparison({**comparison(general_text_perplexity="worse"), **looked_for()})
    assert "forgetting" not in {each.label for each in list_findings(told)}


def test_a_comparison_of_another_program_has_none(tmp_path: Path) -> None:
    found = build_comparison(comparison())
    assert (list_findings(found), describe_asked(found)) == ([], "")
    for name in ("drift", "contamination", "asked", "forgetting", "parroting"):
        (tmp_path / "comparison.json").write_text(json.dumps({**comparison(), name: {"a": 1}}))
        with pytest.raises(ValueError, match="cannot be read"):
            read_comparison(tmp_path)


def test_a_gain_on_rows_that_were_trained_is_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run.folder / "certificate.json").write_text(json.dumps(certificate()))
    tainted = {**comparison(exact_match="better"), **looked_for(contamination={"same_row": 6, "same_prompt": 6})}
    (run.folder / "comparison.json").write_text(json.dumps(tainted))
    report = read_report(run)
    assert find_gain(report).mark == "warn"
    assert find_verdict(report).sentence == (
        "The tuned model is better than practice on exact match (0.2 to 0.9), but 6 of the 12 rows it was asked were "
        "trained, and the artefact is certified."
    )
    page = render_page([report])
    assert "6 of the 12 rows were trained: they say nothing about new ones." in page
    assert "12 prompts from held.jsonl: temperature 0.7, seed 0, at most 150 tokens." in page
    assert "9 / 2 / 1" in page
