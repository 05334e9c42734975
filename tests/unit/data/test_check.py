"""The order of roles, contents and tool calls: what is a conversation and what is not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.check import check_example, check_messages
from luthier.data.example import ROLES, Conversation, Example, Message, Preference, Text
from luthier.data.reasons import RowError
from tests.builders import call, conversations, examples, turn

ROLE_OF = {"s": "system", "u": "user", "a": "assistant"}


def reason(example: Example) -> str:
    """Why the example is refused; empty when it is not."""
    try:
        check_example(example)
    except RowError as error:
        return error.reason
    return ""


def spelt(letters: str) -> Conversation:
    """A conversation of roles by their first letters."""
    return Conversation([turn(ROLE_OF[letter], f"{letter}{number}") for number, letter in enumerate(letters)])


@given(examples)
def test_what_the_builders_make_passes(example: Example) -> None:
    assert reason(example) == ""


@pytest.mark.parametrize("letters", ["ua", "sua", "uaua", "suauaua"])
def test_good_orders(letters: str) -> None:
    assert reason(spelt(letters)) == ""


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("a", "wrong_order"),
        ("sa", "wrong_order"),
        ("au", "wrong_order"),
        ("uua", "wrong_order"),
        ("uaa", "wrong_order"),
        ("usa", "wrong_order"),
        ("ssua", "wrong_order"),
        ("uasua", "wrong_order"),
        ("s", "no_assistant"),
        ("u", "no_assistant"),
        ("su", "no_assistant"),
        ("uau", "last_not_assistant"),
    ],
)
def test_bad_orders(letters: str, expected: str) -> None:
    assert reason(spelt(letters)) == expected


@given(st.lists(st.sampled_from(ROLES), max_size=6))
def test_every_order_of_roles_is_accepted_or_refused_by_name(roles: list[str]) -> None:
    found = reason(Conversation([turn(role, "x") for role in roles]))
    shape = "".join(role[0] for role in roles)
    is_good = shape.removeprefix("s") == "ua" * (len(shape) // 2) and "ua" in shape
    assert (found == "") == is_good


def test_the_message_counts_from_one_and_says_what_was_expected() -> None:
    with pytest.raises(RowError, match="message 3 is `assistant` after `assistant`; expected user or tool"):
        check_messages(spelt("uaa").messages)
    with pytest.raises(RowError, match="message 1 is `assistant` at the start; expected system or user"):
        check_messages(spelt("a").messages)


@pytest.mark.parametrize("content", ["", " ", "\n\t", "\u3000", "\u2028", None])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_message_that_says_nothing_is_refused(content: str | None, at: int) -> None:
    example = spelt("sua")
    example.messages[at]["content"] = content
    assert reason(example) == "empty_content"


def test_what_looks_empty_and_is_not() -> None:
    assert reason(Conversation([turn("user", "\u200b"), turn("assistant", "0")])) == ""


# -- tools

ASK, END = turn("user", "q"), turn("assistant", "a")


def calls(*ids: str | None) -> Message:
    """A turn that calls a tool once for each id."""
    return turn("assistant", None, tool_calls=[call("f", {}, id) for id in ids])


def result(id: str | None = None) -> Message:
    """What a tool gave back."""
    return turn("tool", "", **({} if id is None else {"tool_call_id": id}))


@pytest.mark.parametrize(
    "messages",
    [
        [ASK, calls("1")],
        [ASK, calls("1"), result("1"), END],
        [ASK, calls("1", "2"), result("2"), result("1"), END],
        [ASK, calls("1", "2"), result(), result(), END],
        [ASK, calls(None), result("7"), END],
        [ASK, calls("1"), result("1"), calls("1"), result("1"), END],
        [ASK, calls("1", "1"), result("1"), result("1"), END],
    ],
)
def test_calls_with_their_results(messages: list[Message]) -> None:
    assert reason(Conversation(messages)) == ""


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([ASK, calls("1"), ASK, END], "unmatched_tool_call"),
        ([ASK, calls("1"), result("2"), END], "unmatched_tool_call"),
        ([ASK, calls("1", "2"), result("1"), END], "unmatched_tool_call"),
        ([ASK, calls("1"), result("1"), result("1"), END], "unmatched_tool_call"),
        ([ASK, END, result(), END], "unmatched_tool_call"),
        ([ASK, result(), END], "wrong_order"),
        ([ASK, calls("1"), result("1")], "last_not_assistant"),
    ],
)
def test_calls_without_their_results(messages: list[Message], expected: str) -> None:
    assert reason(Conversation(messages)) == expected


def test_a_call_that_is_not_matched_names_those_that_wait() -> None:
    with pytest.raises(RowError, match="message 3 answers `9`; the calls before it are `1`, `2`"):
        check_messages([ASK, calls("1", "2"), result("9"), END])


@given(conversations().filter(lambda each: any(m["role"] == "tool" for m in each.messages)), st.data())
def test_a_lost_result_is_noticed(example: Conversation, data: st.DataObject) -> None:
    places = [index for index, message in enumerate(example.messages) if message["role"] == "tool"]
    del example.messages[data.draw(st.sampled_from(places))]
    assert reason(example) in ("unmatched_tool_call", "wrong_order")


# -- pairs and texts


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ""),
        ({"chosen": [turn("assistant", "b")]}, "chosen_equals_rejected"),
        ({"chosen": []}, "empty_content"),
        ({"rejected": []}, "empty_content"),
        ({"rejected": [turn("assistant", "  ")]}, "empty_content"),
        ({"rejected": [turn("user", "b")]}, "wrong_order"),
        ({"chosen": [END, turn("user", "b")]}, "last_not_assistant"),
        ({"prompt": [turn("system", "s")]}, "wrong_order"),
        ({"prompt": []}, "wrong_order"),
        ({"prompt": [ASK, END]}, "wrong_order"),
    ],
)
def test_pairs(change: dict[str, Any], expected: str) -> None:
    pair = {"prompt": [ASK], "chosen": [END], "rejected": [turn("assistant", "b")]} | change
    assert reason(Preference(**pair)) == expected


@pytest.mark.parametrize(("text", "expected"), [("a", ""), ("", "empty_content"), (" \n", "empty_content")])
def test_texts(text: str, expected: str) -> None:
    assert reason(Text(text)) == expected
