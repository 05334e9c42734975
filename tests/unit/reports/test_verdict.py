"""The one sentence: the worst that is known first, and never more than was measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from luthier.reports.model import Report, read_report
from luthier.reports.verdict import find_artefact, find_gain, find_verdict
from luthier.runs.lineage import write_lineage
from tests.unit.reports.made import Course, certificate, comparison, make_report, write_run


def judged(folder: Path, compared: Any = None, certified: Any = None, **more: Any) -> Report:
    run = write_run(folder, **more)
    for name, content in (("comparison.json", compared), ("certificate.json", certified)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return read_report(run)


@pytest.mark.parametrize(
    ("last", "mark", "sentence"),
    [
        (
            {"kind": "failed", "code": "out_of_memory", "message": "no room left."},
            "bad",
            "The run failed at step 100 of 100: no room left.",
        ),
        (
            {"kind": "stopped", "step": 40, "reason": "SIGTERM"},
            "warn",
            "The run stopped at step 40 of 100 (SIGTERM) and can go on.",
        ),
        (
            {"kind": "paused", "step": 40, "reason": "disk_full"},
            "warn",
            "The run paused at step 40 of 100 (disk_full) and can go on.",
        ),
    ],
)
def test_a_run_that_did_not_end_says_so(last: Any, mark: str, sentence: str, tmp_path: Path) -> None:
    verdict = find_verdict(make_report(tmp_path / "run", Course(last=last)))
    assert (verdict.mark, verdict.sentence) == (mark, sentence)


def test_curves_alone_claim_nothing_about_the_base(tmp_path: Path) -> None:
    verdict = find_verdict(make_report(tmp_path / "run"))
    assert verdict.mark == "open"
    assert verdict.sentence == (
        "Trained to the end: held-out loss fell from 1.85 at step 10 to 0.5, 75.0 % of held-out tokens predicted "
        "right; whether it is better than the base has not been measured."
    )
    assert verdict.command == f"luthier compare {tmp_path / 'run'}"


@pytest.mark.parametrize(
    ("course", "mark", "said"),
    [
        (Course(held_out={}), "warn", "Training loss fell from 2 to 0.515, and no row was held out"),
        (Course(held_out={100: 0.5}), "open", "Trained to the end: held-out loss is 0.5,"),
        (
            Course(held_out={20: 0.5, 100: 0.9}),
            "warn",
            "The run overfitted after step 20: held-out loss rose by 80.0 %",
        ),
        (Course(losses=[], held_out={}), "warn", "The run finished without a step"),
        (
            Course(last={"kind": "finished", "step": 100, "reason": "early_stop", "seconds": 9.0}),
            "open",
            "Stopped early: held-out loss fell",
        ),
    ],
)
def test_the_curves_are_read(course: Course, mark: str, said: str, tmp_path: Path) -> None:
    verdict = find_verdict(make_report(tmp_path / "run", course))
    assert verdict.sentence.startswith(said)
    assert verdict.mark == mark


def test_preferences_are_judged_by_what_is_preferred(tmp_path: Path) -> None:
    course = Course(metrics={"reward_accuracy": 0.875})
    verdict = find_verdict(make_report(tmp_path / "run", course, objective={"kind": "dpo"}))
    assert "the better answer is preferred in 87.5 % of the held-out pairs" in verdict.sentence


@pytest.mark.parametrize(
    ("changes", "mark", "sentence"),
    [
        ({"a": "better", "b": "better"}, "good", "The tuned model is better than practice on a (0.2 to 0.9) and b."),
        ({"a": "worse"}, "bad", "The tuned model is worse than practice on a (0.2 to 0.9)."),
        ({"a": "better", "b": "worse"}, "warn", "The tuned model is better than practice on a, but worse on b."),
        (
            {"a": "no detectable difference"},
            "warn",
            "No difference between the tuned model and practice could be detected on 12 prompts.",
        ),
        ({}, "open", "As told."),
    ],
)
def test_the_comparison_is_told_in_words(changes: Any, mark: str, sentence: str, tmp_path: Path) -> None:
    verdict = find_gain(judged(tmp_path / "run", comparison(**changes)))
    assert (verdict.mark, verdict.sentence) == (mark, sentence)


def test_a_broken_certificate_comes_before_everything(tmp_path: Path) -> None:
    report = judged(tmp_path / "run", comparison(a="better"), certificate(is_valid=False))
    verdict = find_verdict(report)
    assert verdict.mark == "bad"
    assert verdict.sentence == (
        "Do not use this model: the artefact is not what was trained: 1 of 2 claims does not hold "
        "(artefact equals the live model)."
    )


def test_a_good_run_is_better_and_certified(tmp_path: Path) -> None:
    report = judged(tmp_path / "run", comparison(a="better"), certificate())
    assert find_artefact(report).sentence == "Yes: the artefact is what was trained, all 2 claims hold."
    verdict = find_verdict(report)
    assert verdict.mark == "good"
    assert verdict.sentence == (
        "The tuned model is better than practice on a (0.2 to 0.9), and the artefact is certified."
    )


def test_a_certificate_without_claims_proves_nothing(tmp_path: Path) -> None:
    assert find_artefact(judged(tmp_path / "run", None, {"valid": False, "claims": []})).mark == "bad"
    assert find_artefact(judged(tmp_path / "other", None, {"valid": True, "claims": []})).mark == "bad"


def test_a_run_that_nothing_here_can_certify_says_why(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_lineage(run, {"uncertified": "the weights of its base are not on this machine"})
    found = find_artefact(read_report(run))
    assert (found.mark, found.sentence) == ("open", "Not certified: the weights of its base are not on this machine.")


def test_an_engine_that_does_not_know_the_likeliest_token_is_judged_by_perplexity(tmp_path: Path) -> None:
    report = make_report(tmp_path / "run")
    unknown = tuple(replace(each, token_accuracy=math.nan) for each in report.evaluations)
    verdict = find_verdict(replace(report, evaluations=unknown))
    assert "held-out loss fell from 1.85 at step 10 to 0.5, perplexity " in verdict.sentence
    assert "predicted right" not in verdict.sentence
