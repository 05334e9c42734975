"""What an answer is worth: numbers are found where people write them, and metrics fit the references."""

from __future__ import annotations

import math
import re

import pytest

from luthier.evals.metrics import (
    Checks,
    Measure,
    find_score,
    is_json_table,
    is_refusal,
    is_score,
    measure_answers,
    measure_drift,
    measure_scores,
)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("7", 7),
        ("Score: 7", 7),
        ("7/10", 7),
        ("I give it 8 out of 10.", 8),
        ("<think>9</think>\n\n-3.5", -3.5),
        ("First 2, then 1,250.5", 1250.5),
        (r"so it is \boxed{4}.", 4),
        ("<score>6</score>", 6),
        ("GPT4 and v2.1", math.nan),
        ("no number", math.nan),
        ("", math.nan),
    ],
)
def test_the_number_that_an_answer_says(answer: str, score: float) -> None:
    assert find_score(answer) == pytest.approx(score, nan_ok=True)


@pytest.mark.parametrize(
    ("reference", "found"),
    [
        ("7", True),
        (" 8.5\n", True),
        ("7/10", True),
        ("Score: 3", True),
        ("It is long.\nIt is wrong.\n\nFinal score: 2/10", True),
        (r"Hence \boxed{42}", True),
        ("<score>7</score>", True),
        ("7 boxes", False),
        ("It is long.\n7", False),
        ('{"count": 7}', False),
        ("", False),
    ],
)
def test_references_that_come_down_to_a_number(reference: str, found: bool) -> None:
    assert is_score(reference) is found


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


def test_scores_agree_by_hits_error_and_order() -> None:
    right = ["1", "2", "3", "9"]
    found = measure_scores(right, (["9", "no idea", "3", "2"], ["1", "2", "4", "score: 9/10"]))
    assert named(found)["score accuracy"] == (0.25, 0.75)
    # Off by 8, by the whole range for no number at all, by 0 and by 7.
    assert named(found)["score error"] == (pytest.approx(23 / 4), pytest.approx(1 / 4))
    base, tuned = named(found)["score order (Spearman)"]
    assert tuned == pytest.approx(1.0)
    assert base < 0
    assert [each.difference.is_higher_better for each in found] == [True, False, True]
    assert named(measure_answers(right, (right, right), Checks())).keys() == named(found).keys()


def test_numbers_of_one_value_have_no_order() -> None:
    assert len(measure_scores(["5", "5"], (["5", "5"], ["4", "5"]))) == 2


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
