"""Every rule speaks where its numbers are, names a setting that exists, and a healthy run hears nothing."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.reports import advice
from luthier.reports.advice import RULES, list_advice
from luthier.reports.model import read_report
from luthier.spec.problems import list_kinds
from luthier.spec.run import RunSpec
from tests.unit.reports.made import Course, comparison, ledger, looked_for, make_report, write_run

NOISE = np.random.default_rng(0).normal(size=400)


def curve(start: float, end: float, count: int = 200, *, rate: float = 6.0) -> list[float]:
    """A loss that falls from one value towards another."""
    return [end + (start - end) * math.exp(-rate * n / count) + 0.01 * float(NOISE[n]) for n in range(count)]


def held(*losses: float, every: int = 20) -> dict[int, float]:
    return {every * n: loss for n, loss in enumerate(losses, 1)}


@dataclass
class Case:
    """A run that one rule has something to say of, and what it proposes."""

    change: str
    course: Course = field(default_factory=Course)
    rows: list[Any] | None = None
    tables: dict[str, Any] = field(default_factory=dict)
    compared: dict[str, Any] | None = None


SKIPPED = {"kind": "step_skipped", "step": 9, "reason": "non-finite loss", "rows": ["a:1"]}
REPLAYED = {"kind": "step_replayed", "step": 9, "reason": "out of memory", "micro_batch_tokens": 2048}
FALLING = held(1.5, 1.2, 1.0, 0.9, 0.85, 0.84, 0.83, 0.825, 0.82, 0.815)
OVERFITTED = held(1.2, 0.9, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2)
PAIRS = {"objective": {"kind": "dpo"}}

CASES = {
    "overfitting": Case('evaluate.keep = "best"', Course(curve(2, 0.3), OVERFITTED)),
    "still_falling": Case(
        "optim.epochs = 4", Course(curve(2, 0.8), held(1.9, 1.7, 1.5, 1.4, 1.3, 1.2, 1.1, 1.0, 0.9, 0.8))
    ),
    "compared_on_trained": Case(
        "data.train = a file without these rows",
        Course(curve(2, 0.8), FALLING),
        compared={**comparison(exact_match="better"), **looked_for(contamination={"same_row": 3, "same_prompt": 3})},
    ),
    "parroted": Case(
        "optim.epochs = 1, and more rows that differ",
        Course(curve(2, 0.8), FALLING),
        compared={**comparison(exact_match="better"), **looked_for(parroting={"tuned": 3})},
    ),
    "early_stop": Case(
        "evaluate.early_stop_patience = 2, and evaluate.min_improvement = 0.002",
        Course(curve(2, 0.8), held(1.5, 1.0, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8)),
    ),
    "rate_too_high": Case(
        "optim.learning_rate = 0.00033 (it was 0.001)", Course(curve(2, 0.8), FALLING, more=[SKIPPED])
    ),
    "rate_too_low": Case("optim.learning_rate = 0.003 (it was 0.001)", Course(curve(2, 1.97), held(1.97, 1.96))),
    "clipped": Case("optim.max_grad_norm = 5, or a larger optim.batch", Course(curve(2, 0.8), FALLING, grad_norm=5.0)),
    "few_steps": Case(
        "optim.batch = 4", Course(curve(2, 0.8, 20), {10: 1.0, 20: 0.8}), tables={"optim": {"batch": 16}}
    ),
    "rank": Case("method.rank = 16", Course(curve(2, 0.9, rate=12), held(1.1, 0.95, 0.92, 0.91, 0.905, 0.9))),
    "preference_flat": Case(
        "optim.learning_rate = 0.003 (it was 0.001)",
        Course(curve(0.69, 0.68), held(0.69, 0.68), metrics={"reward_accuracy": 0.51}),
        tables=PAIRS,
    ),
    "replayed": Case(
        "compute.micro_batch_tokens = 2048 (the result is the same)", Course(curve(2, 0.8), FALLING, more=[REPLAYED])
    ),
    "nothing_held_out": Case("data.valid = 0.05", Course(curve(2, 0.8), {}), ledger(300, 0)),
    "few_held_out": Case("data.valid = 64", Course(curve(2, 0.8), FALLING), ledger(300, 20)),
    "no_evaluations": Case(
        "evaluate.every_steps = 20", Course(curve(2, 0.8), {200: 0.8}), tables={"evaluate": {"every_steps": 0}}
    ),
    "too_long": Case("data.max_length = 256", Course(curve(2, 0.8), FALLING), ledger(dropped=["too_long"] * 20)),
    "truncated": Case(
        'data.max_length = 192, or data.too_long = "drop"',
        Course(curve(2, 0.8), FALLING),
        ledger(notes=["truncated", "end_cut"]),
    ),
    "unused_context": Case(
        "data.max_length = 96", Course(curve(2, 0.8), FALLING), tables={"data": {"max_length": 1024}}
    ),
    "malformed": Case(
        "`luthier data check rows.jsonl` lists each with its line",
        Course(curve(2, 0.8), FALLING),
        ledger(dropped=["not_json"] * 9 + ["duplicate"] * 30),
    ),
    "leaked": Case(
        "data.group_by = the key whose equal values belong together",
        Course(curve(2, 0.8), FALLING),
        ledger(notes=["prompt_in_train"]),
    ),
    "thinking": Case("data.unroll = true", Course(curve(2, 0.8), FALLING), ledger(notes=["thinking_dropped"])),
    "got_worse": Case(
        "optim.learning_rate = 0.00033, or mix general rows into data.train",
        Course(curve(2, 0.8), FALLING),
        compared=comparison(exact_match="better", general_text="worse"),
    ),
    "no_difference": Case(
        "data.valid = 200, then `luthier compare` again",
        Course(curve(2, 0.8), FALLING),
        compared=comparison(exact_match="no detectable difference"),
    ),
}


@pytest.mark.parametrize(("tuned", "weight"), [(4.04, "consider"), (4.4, "act")])
def test_forgetting_hardly_anything_presses_nobody(tuned: float, weight: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    name = "general text perplexity"
    lost = {"base": 4.0, "tuned": tuned, "difference": tuned - 4, "low": 0.01, "high": 1.0, "verdict": "worse"}
    told = {**comparison(), "metrics": {name: lost}, "forgetting": {"metric": name, **lost}}
    (run.folder / "comparison.json").write_text(json.dumps(told))
    (found,) = [each for each in list_advice(read_report(run)) if each.title == "Forget less"]
    assert found.weight == weight


def test_every_rule_has_a_case() -> None:
    assert sorted(CASES) == sorted(rule.__name__ for rule in RULES)
    assert len(RULES) >= 20


@pytest.mark.parametrize("name", CASES)
def test_a_rule_speaks_where_its_numbers_are(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    run = write_run(tmp_path / "run", case.course, case.rows, **case.tables)
    if case.compared:
        (run.folder / "comparison.json").write_text(json.dumps(case.compared))
    found = getattr(advice, name)(read_report(run))
    assert found is not None
    assert found.change.replace(str(tmp_path / "run") + "/", "") == case.change
    assert any(letter.isdigit() for letter in found.evidence), "evidence is a number"
    assert found.setting in list_keys()
    assert found.setting.split(".")[1] in found.change or name == "malformed"


def list_keys() -> set[str]:
    keys = set()
    for name, table in RunSpec.model_fields.items():
        for part in list_kinds(table.annotation):
            keys |= {f"{name}.{key}" for key in part.model_fields}
    return keys


def test_a_healthy_run_hears_nothing(tmp_path: Path) -> None:
    assert list_advice(make_report(tmp_path / "run", Course(curve(2, 0.8), FALLING))) == []


def test_what_presses_comes_first(tmp_path: Path) -> None:
    rows = ledger(300, 20, dropped=["too_long"] * 20)
    found = list_advice(make_report(tmp_path / "run", Course(curve(2, 0.3), OVERFITTED), rows))
    assert [each.weight for each in found] == ["act", "act", "consider"]
    assert found[0].setting == "evaluate.keep"


@pytest.mark.parametrize(
    ("losses", "evidence"),
    [
        (curve(2, 0.8)[:150] + curve(1.5, 1.6, 50), "rose again"),
        ([loss + (3 if n % 23 == 22 else 0) for n, loss in enumerate(curve(2, 0.8))], "jumped in 8 of 200 steps"),
    ],
)
def test_a_rate_that_is_too_high_shows_in_the_loss(losses: list[float], evidence: str, tmp_path: Path) -> None:
    found = advice.rate_too_high(make_report(tmp_path / "run", Course(losses, {})))
    assert found is not None
    assert evidence in found.evidence


def test_who_kept_the_best_weights_is_told_to_train_for_less(tmp_path: Path) -> None:
    report = make_report(tmp_path / "run", Course(curve(2, 0.3), OVERFITTED), evaluate={"keep": "best"})
    found = advice.overfitting(report)
    assert found is not None
    assert (found.setting, found.change) == ("optim.epochs", "optim.epochs = 0.6")
    by_steps = make_report(
        tmp_path / "steps", Course(curve(2, 0.3), OVERFITTED), evaluate={"keep": "best"}, optim={"steps": 200}
    )
    found = advice.overfitting(by_steps)
    assert found is not None
    assert found.change == "optim.steps = 60"


def test_a_wide_adapter_that_overfitted_should_be_narrower(tmp_path: Path) -> None:
    found = advice.rank(make_report(tmp_path / "run", Course(curve(2, 0.3), OVERFITTED), method={"rank": 64}))
    assert found is not None
    assert found.change == "method.rank = 16"


@pytest.mark.parametrize("count", [0, 1, 2, 5, 11, 19])
def test_a_run_of_a_few_steps_breaks_no_rule(count: int, tmp_path: Path) -> None:
    losses = curve(2, 0.8)[:count]
    make_report(tmp_path / "run", Course(losses, {1: 1.0} if count else {}))
    list_advice(make_report(tmp_path / "bare", Course(losses, {}), []))
