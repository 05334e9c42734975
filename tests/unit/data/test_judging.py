"""Scored answers and preference pairs become conversations of a judge; what cannot is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.example import Conversation
from luthier.data.formats import chat
from luthier.data.judging import (
    Judging,
    Marks,
    Tally,
    check_judging,
    derive_critique,
    judge_row,
    read_marks,
    read_rubric,
)
from luthier.data.reasons import RowError
from luthier.data.scored import Fields
from luthier.errors import CallError, MissingPathError

BARE = Judging(template="{prompt}|{response}")


def row(**keys: Any) -> dict[str, Any]:
    """A scored answer, changed as a test wants it; None takes a key away."""
    made = {"prompt": "2 plus 3?", "response": "5", "score": 5, "critique": "Right."} | keys
    return {key: value for key, value in made.items() if value is not None}


def judge(given: dict[str, Any], judging: Judging = BARE, tally: Tally | None = None) -> list[dict[str, Any]]:
    return judge_row(orjson.dumps(given), "rows.jsonl:1", judging, tally or Tally())


def said(given: dict[str, Any], judging: Judging = BARE) -> list[tuple[str, str]]:
    """What is asked and answered."""
    found = []
    for made in judge(given, judging):
        asked, answered = (message["content"] for message in made["messages"])
        found.append((asked, answered))
    return found


def reason(given: dict[str, Any], judging: Judging = BARE) -> str:
    with pytest.raises(RowError) as caught:
        judge(given, judging)
    return caught.value.reason


def test_a_scored_answer_becomes_a_question_and_a_judgement() -> None:
    (made,) = judge(row())
    assert made["messages"] == [
        {"role": "user", "content": "2 plus 3?|5"},
        {"role": "assistant", "content": "Right.\nScore: 5"},
    ]
    assert made["source"] == "rows.jsonl:1"
    assert isinstance(chat.read(made), Conversation)


@pytest.mark.parametrize(
    "given",
    [
        {"instruction": "2 plus 3?", "response": "5", "rating": "5", "feedback": "Right."},
        {"question": "2 plus 3?", "answer": "5", "reward": 5.0, "rationale": " Right.\n"},
        {"prompt": [{"role": "user", "content": "2 plus 3?"}], "response": "5", "score": 5, "critique": "Right."},
        {"instruction": "2 plus 3?", "input": "", "output": "5", "score": 5, "explanation": "Right."},
        {"prompt": "2 plus 3?", "completion": "5", "score": 5, "critique": "Right."},
        {
            "messages": [{"role": "user", "content": "2 plus 3?"}, {"role": "assistant", "content": "5"}],
            "score": 5,
            "critique": "Right.",
        },
        {
            "conversations": [{"from": "human", "value": "2 plus 3?"}, {"from": "gpt", "value": "5"}],
            "score": 5,
            "critique": "Right.",
        },
    ],
)
def test_the_usual_names_and_formats_are_known(given: dict[str, Any]) -> None:
    assert judge(given) == judge(row())


def test_other_names_are_named() -> None:
    fields = Fields("ask", "said", "helpfulness", "why")
    given = {"ask": "2 plus 3?", "said": "5", "helpfulness": 5, "why": "Right.", "score": 1}
    assert judge(given, Judging(template=BARE.template, fields=fields)) == judge(row())


def test_a_longer_prompt_names_who_speaks() -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "2 plus 3?")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    ((asked, _),) = said(row(prompt=prompt))
    assert asked == "System: Be brief.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: 2 plus 3?|5"
    ((asked, _),) = said(row(system="Be brief."))
    assert asked == "System: Be brief.\n\nUser: 2 plus 3?|5"


def test_a_pair_without_scores_gets_the_two_ends_and_says_so() -> None:
    tally = Tally()
    pair = {"prompt": "2 plus 3?", "chosen": "5", "rejected": "6"}
    better, worse = judge(pair, BARE, tally)
    assert better["messages"][1]["content"] == "The answer is right and complete.\nScore: 5"
    assert worse["messages"][1]["content"] == "The answer is wrong or of no use.\nScore: 1"
    assert [each["source"] for each in (better, worse)] == ["rows.jsonl:1:chosen", "rows.jsonl:1:rejected"]
    assert better["prompt_id"] == worse["prompt_id"] == judge(row())[0]["prompt_id"]
    assert [read_marks(each).is_score_known for each in (better, worse)] == [False, False]
    assert tally.as_dict() == {
        "conversations": 2,
        "pairs": 1,
        "scores": {"1": 1, "5": 1},
        "critiques": {"own": 0, "by_rubric": 2},
        "rounded": 0,
        "contradicted": 0,
    }


@pytest.mark.parametrize("spelling", ["{side}_{name}", "{name}_{side}"])
def test_a_pair_may_carry_scores_and_critiques(spelling: str) -> None:
    pair: dict[str, Any] = {"prompt": "2 plus 3?", "chosen": "5", "rejected": "about 5"}
    for side, score, critique in (("chosen", 4, "Right."), ("rejected", 3, "Vague.")):
        pair[spelling.format(side=side, name="score")] = score
        pair[spelling.format(side=side, name="critique")] = critique
    assert said(pair) == [("2 plus 3?|5", "Right.\nScore: 4"), ("2 plus 3?|about 5", "Vague.\nScore: 3")]
    assert all(read_marks(each).is_score_known for each in judge(pair))
    swapped = {key: {4: 3, 3: 4}.get(value, value) for key, value in pair.items()}
    assert reason(swapped) == "chosen_scores_lower"
    del pair[spelling.format(side="rejected", name="score")]
    assert reason(pair) == "missing_key"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (row(score=None), "missing_key"),
        (row(score="much"), "wrong_type"),
        (row(score=True), "wrong_type"),
        (row(score=6), "score_off_scale"),
        (row(score=0.5), "score_off_scale"),
        (row(response=" "), "empty_content"),
        (row(response=5), "wrong_type"),
        (row(prompt=[{"role": "system", "content": "a"}]), "wrong_order"),
        (row(prompt=[{"role": "user", "content": "a"}] * 2), "wrong_order"),
        (row(critique=5), "wrong_type"),
        ({"score": 5}, "unknown_format"),
        ({"text": "a", "score": 5}, "wrong_kind"),
        ({"messages": [{"role": "user", "content": "a"}], "score": 5}, "last_not_assistant"),
        ({"messages": [], "score": 5}, "missing_key"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen_equals_rejected"),
    ],
)
def test_a_row_that_cannot_be_judged_has_its_reason(given: dict[str, Any], expected: str) -> None:
    tally = Tally()
    with pytest.raises(RowError) as caught:
        judge(given, BARE, tally)
    assert caught.value.reason == expected
    assert tally == Tally(), "a refused row leaves no trace in the counts"


def test_braces_in_an_answer_stay_what_they_are() -> None:
    ((asked, answered),) = said(row(prompt="{response} {score}", response='{"low": 1} {prompt}', critique="{score}"))
    assert asked == '{response} {score}|{"low": 1} {prompt}'
    assert answered == "{score}\nScore: 5"


@pytest.mark.parametrize(
    ("score", "written", "is_rounded"),
    [(0, "1", False), (1, "5", False), (0.5, "3", False), (0.6, "3", True), (0.625, "4", True), (0.61, "3", True)],
)
def test_scores_of_another_scale_are_moved_and_rounded_half_up(score: float, written: str, is_rounded: bool) -> None:
    tally = Tally()
    judging = Judging(template=BARE.template, source_scale=(0, 1))
    (made,) = judge(row(score=score), judging, tally)
    assert made["messages"][1]["content"] == f"Right.\nScore: {written}"
    assert tally.rounded == is_rounded


def test_a_finer_step_keeps_halves() -> None:
    ((_, answered),) = said(row(score=3.5), Judging(step=0.5))
    assert answered.endswith("Score: 3.5")


@given(score=st.floats(0, 10), low=st.integers(-5, 5), width=st.integers(1, 20))
def test_a_score_lands_on_a_step_within_half_of_it(score: float, low: int, width: int) -> None:
    judging = Judging(low, low + width, source_scale=(0, 10), template=BARE.template)
    (made,) = judge(row(score=score), judging)
    number = float(made["messages"][1]["content"].rpartition(" ")[2])
    assert number == int(number)
    assert low <= number <= low + width
    assert abs(number - (low + score / 10 * width)) <= 0.5 + 1e-6


def test_contradictions_are_counted() -> None:
    tally = Tally()
    for each in (row(), row(), row(score=2), row(prompt="3 plus 3?")):
        judge(each, BARE, tally)
    assert (tally.answers, tally.contradicted) == (4, 1)


def test_the_rubric_says_what_nobody_said(tmp_path: Path) -> None:
    path = tmp_path / "rubric.txt"
    path.write_text("5: all right\n\n3 : half right\n")
    rubric = read_rubric(path)
    judging = Judging(rubric=rubric)
    assert [derive_critique(score, judging) for score in (5, 4, 3, 1)] == [
        "all right",
        "half right",
        "half right",
        "half right",
    ]
    ((asked, answered),) = said(row(critique=None, score=4), judging)
    assert "[Scores]\n5: all right\n3: half right\n\n[Prompt]" in asked
    assert answered == "half right\nScore: 4"


def test_every_score_has_a_sentence_without_a_rubric() -> None:
    found = [derive_critique(score, Judging(0, 100)) for score in (0, 9, 10, 50, 70, 99, 100)]
    assert len(set(found)) == 5
    assert found[0] == found[1]
    assert found[4] == found[5]


@pytest.mark.parametrize(
    ("text", "said"),
    [("five: all", ":1: expected a score"), ("5: a\n5: b", ":2: the score 5 stands twice"), ("", "no")],
)
def test_a_rubric_that_is_none_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "rubric.txt"
    path.write_text(text)
    with pytest.raises(CallError, match=said):
        read_rubric(path)
    with pytest.raises(MissingPathError, match="absent"):
        read_rubric(tmp_path / "absent.txt")


@pytest.mark.parametrize(
    ("judging", "said"),
    [
        (Judging(5, 1), "--scale goes from 5 to 1"),
        (Judging(source_scale=(1, 1)), "--source-scale"),
        (Judging(step=9), "--step 9"),
        (Judging(template="{prompt}"), r"--template: \{response\} does not"),
        (Judging(template="{prompt} {response} {score}"), r"--template: \{score\} has no place"),
        (Judging(reply="{score}"), r"--reply: \{critique\}"),
        (Judging(reply="{score}\n{critique}"), "--reply: .*last line"),
        (Judging(rubric={7: "a"}), "--rubric: 7"),
    ],
)
def test_settings_that_cannot_work_are_refused(judging: Judging, said: str) -> None:
    with pytest.raises(CallError, match=said):
        check_judging(judging)


def test_other_rows_have_no_marks() -> None:
    assert read_marks(b'{"messages": []}') == Marks()
    assert read_marks({"prompt_id": 5}) == Marks()
    assert read_marks(RowError("not_json", "x")) == Marks()
    assert read_marks(b'{"prompt_id": "a", "score_known": false}') == Marks("a", is_score_known=False)
