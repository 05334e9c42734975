"""A judge is held to the right scores by hits, error, order and pairs; what cannot be read counts against it."""

from __future__ import annotations

import math

import pytest

from luthier.data.judging import Marks
from luthier.data.render import Question
from luthier.evals.exact_match import Answer, ExactMatch
from luthier.evals.scores import (
    BETTER,
    READABLE,
    find_labelled_score,
    find_score,
    find_scores,
    is_score,
    measure_scores,
    read_scores,
)
from luthier.evals.statistics import Measure

FIVE = [f"Because.\nScore: {number}" for number in (5, 1, 4, 2, 3)]


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
    ("answer", "score"),
    [
        ("the count is 6 not 7\nScore: 4", 4),
        ("Score: 4 because the count is 6", 4),
        ("A score of 2 at first. Final score: 3/5", 3),
        ("**Rating:** 4.5", 4.5),
        ("[RESULT] 4", 4),
        (r"hence \boxed{4}", 4),
        ("<score>-6</score>", -6),
        ("grade: 2", 2),
        ("4", 4),
        ("4/5", 4),
        ("the count is 6 not 7", math.nan),
        ("underscore 7", math.nan),
        ("score", math.nan),
        ("", math.nan),
    ],
)
def test_the_score_behind_its_label(answer: str, score: float) -> None:
    assert find_labelled_score(answer) == pytest.approx(score, nan_ok=True)


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
        ("item desks, count 4\ngrade: 3", True),
        ("7 boxes", False),
        ("It is long.\n7", False),
        ('{"count": 7}', False),
        ("", False),
    ],
)
def test_references_that_come_down_to_a_number(reference: str, found: bool) -> None:
    assert is_score(reference) is found


def named(found: list[Measure]) -> dict[str, tuple[float, float]]:
    return {each.name: (each.difference.base, each.difference.tuned) for each in found}


def test_scores_agree_by_hits_error_and_order() -> None:
    right = ["1", "2", "3", "9"]
    found = measure_scores(right, (["9", "no idea", "3", "2"], ["1", "2", "4", "score: 9/10"]))
    assert named(found)["score accuracy"] == (0.25, 0.75)
    # Off by 8, by the whole range for no number at all, by 0 and by 7.
    assert named(found)["score error"] == (pytest.approx(23 / 4), pytest.approx(1 / 4))
    base, tuned = named(found)["score order (Spearman)"]
    assert tuned == pytest.approx(1.0)
    assert base < 0
    assert named(found)[READABLE] == (0.75, 1)
    assert [each.difference.is_higher_better for each in found] == [True, False, True, True]


def test_a_number_beyond_the_range_costs_no_more_than_none() -> None:
    found = named(measure_scores(["1", "5"], (["1", "9999"], ["1", "no"])))
    assert found["score error"] == (2, 2)


def test_numbers_of_one_value_have_no_order() -> None:
    assert "score order (Spearman)" not in named(measure_scores(["5", "5"], (["5", "5"], ["4", "5"])))


def test_only_a_label_counts_where_every_reference_has_one() -> None:
    unread = ["count 5", "count 1", "count 4", "count 2", "count 3"]
    found = named(measure_scores(FIVE, (unread, FIVE)))
    assert found["score accuracy"] == found[READABLE] == (0, 1)


def test_the_better_of_two_answers_has_to_score_higher() -> None:
    marks = [Marks("a"), Marks("a"), Marks("b"), Marks("b"), Marks("c")]
    tied = [FIVE[0], FIVE[1], FIVE[2], FIVE[2], FIVE[4]]
    unread = [FIVE[0], "no", *FIVE[2:]]
    assert named(measure_scores(FIVE, (tied, FIVE), marks))[BETTER] == (0.5, 1)
    assert named(measure_scores(FIVE, (unread, FIVE), marks))[BETTER] == (0.5, 1)
    assert BETTER not in named(measure_scores(FIVE, (tied, FIVE)))
    same = [Marks("a"), *(Marks(str(number)) for number in range(4))]
    assert BETTER not in named(measure_scores(FIVE, (tied, FIVE), same)), "one answer of a prompt makes no pair"


def test_a_prompt_counts_once_however_many_answers_it_has() -> None:
    marks = [Marks("a")] * 3 + [Marks("b")] * 2
    # Of the three pairs of the first prompt one is right, and the one of the second.
    answers = ["Score: 5", "Score: 1", "Score: 1", *FIVE[3:]]
    right = ["Score: 5", "Score: 4", "Score: 4", *FIVE[3:]]
    assert read_scores(right, answers, marks).agreements.tolist() == [1, 1]
    answers[1:3] = ["Score: 5", "Score: 5"]
    assert read_scores(right, answers, marks).agreements.tolist() == [0, 1]


def test_of_pairs_without_scores_only_the_order_is_held_against_a_judge() -> None:
    marks = [Marks("a", is_score_known=False)] * 2
    found = named(measure_scores(FIVE[:2], ([FIVE[1], FIVE[1]], [FIVE[2], FIVE[3]]), marks))
    assert found == {BETTER: (0, 1), READABLE: (1, 1)}
    facts = read_scores(FIVE[:2], FIVE[2:4], marks).as_dict()
    assert facts == {"rows": 2, "readable": 1, "prompts": 1, "better_higher": 1}


def exact(*pairs: tuple[str, str]) -> ExactMatch:
    answers = tuple(
        Answer(("rows.jsonl", number), Question("?", right, "<end>"), got, is_cut=False)
        for number, (right, got) in enumerate(pairs)
    )
    return ExactMatch(answers, 1, 1.0)


def test_greedy_answers_say_scores_where_the_rows_do() -> None:
    found = find_scores(
        exact((FIVE[0], FIVE[0]), (FIVE[1], FIVE[3]), (FIVE[2], "no")), [Marks("a"), Marks("a"), Marks()]
    )
    assert found is not None
    facts = found.as_dict()
    assert (facts["known"], facts["right"], facts["prompts"], facts["better_higher"]) == (3, 1, 1, 1)
    assert facts["error"] == pytest.approx((0 + 1 + 4) / 3)
    assert facts["readable"] == pytest.approx(2 / 3)
    assert find_scores(exact((FIVE[0], FIVE[0]), ("yes", "yes"))) is None
