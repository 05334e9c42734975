"""What an answer is worth: numbers are found where people write them, and metrics fit the references."""

from __future__ import annotations

import re

import pytest

from luthier.evals.metrics import (
    Checks,
    is_json_table,
    is_refusal,
    measure_answers,
    measure_drift,
)
from luthier.evals.statistics import Measure


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I cannot assist with this request.", True),
        ("As an AI language model, I have no opinion.", True),
        ("<think>hm</think>Sorry, no.", True),
        ("I can help with that.", False),
        ("The clerk was sorry.", False),
        ("I cannot praise it enough", False),
    ],
)
def test_refusals(answer: str, found: bool) -> None:
    assert is_refusal(answer) is found


def named(found: list[Measure]) -> dict[str, tuple[float, float]]:
    return {each.name: (each.difference.base, each.difference.tuned) for each in found}


def test_exact_match_and_json_where_references_are_json() -> None:
    right = ['{"a": 1}', '{"a": 2}']
    found = measure_answers(right, (["no", '{"a": 3}'], ['{"a": 1}', ' {"a": 2}\n']), Checks())
    assert named(found) == {"exact match": (0, 1), "valid JSON": (0.5, 1)}


def test_prose_is_not_matched_to_the_letter() -> None:
    right = ["a long answer " * 20] * 2
    assert measure_answers(right, (["x", "y"], ["z", "z"]), Checks()) == []
    assert named(measure_answers(right, (["x", "y"], [right[0], "z"]), Checks())) == {"exact match": (0, 0.5)}


def test_without_references_only_what_a_person_asked_for() -> None:
    answers = (["yes", "{}"], ["YES!", '{"n": 1}'])
    assert measure_answers([None, "{}"], answers, Checks()) == []
    checks = Checks(re.compile("^YES"), {"type": "object", "required": ["n"]})
    found = measure_answers([None, "{}"], answers, checks)
    assert named(found) == {"matches the pattern": (0, 0.5), "valid by the JSON schema": (0, 0.5)}


def test_references_that_come_down_to_scores_are_held_against_scores() -> None:
    right = ["Score: 1", "Score: 2"]
    found = named(measure_answers(right, (["no", "no"], right), Checks()))
    assert found["score accuracy"] == (0, 1)
    assert "exact match" not in found


def test_drift_has_no_good_direction() -> None:
    short, long = ["one two"] * 10, ["I'm sorry, one two three"] * 10
    found = measure_drift((short, long))
    assert found["words"]["verdict"] == "longer"
    assert found["words"]["more"] == 10
    assert found["refusals"]["verdict"] == "more"
    assert measure_drift((long, short))["words"]["verdict"] == "shorter"
    assert measure_drift((short, short))["refusals"]["verdict"] == "no detectable difference"


def test_only_objects_and_lists_are_json_tables() -> None:
    assert [is_json_table(text) for text in ('{"a": 1}', "[]", "7", '"x"', "{", "```json\n{}\n```")] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]
