"""Each format reads what it wrote, is found by its keys, and refuses what it cannot hold."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.check import check_example
from luthier.data.example import Conversation, Example, Preference, Text
from luthier.data.formats import FORMATS, find_format, get_format
from luthier.data.hashes import content_hash
from luthier.data.parse import parse_line
from luthier.data.reasons import RowError
from luthier.errors import CallError
from tests.builders import call, conversations, examples, preferences, texts, turn

plain = conversations(rich=False)
one_answer = conversations(rich=False, max_turns=1)
HELD = {
    "preference": preferences(),
    "chat": conversations(),
    "sharegpt": conversations(),
    "alpaca": plain,
    "completion": one_answer,
    "text": st.builds(Text, texts),
}
REFUSED: dict[str, list[Example]] = {
    "preference": [Text("a"), Conversation([])],
    "chat": [Text("a"), Preference([], [], [])],
    "sharegpt": [Text("a"), Preference([], [], [])],
    "alpaca": [
        Text("a"),
        Conversation([turn("user", "a"), turn("assistant", "b")], [{"type": "function"}]),
        Conversation([turn("user", "a"), turn("assistant", "b", weight=0)]),
        Conversation([turn("user", "a"), turn("assistant", "b", reasoning_content="c")]),
        Conversation([turn("user", "a"), turn("tool", "b"), turn("assistant", "c")]),
        Conversation([turn("user", "a")]),
        Conversation([turn("system", "a")]),
    ],
    "completion": [
        Text("a"),
        Conversation([turn("user", "a"), turn("assistant", "b")] * 2),
        Conversation([turn("user", "a"), turn("assistant", "b")], [{"type": "function"}]),
        Conversation([turn("user", "a"), turn("assistant", "b", weight=0)]),
    ],
    "text": [Conversation([turn("user", "a"), turn("assistant", "b")]), Preference([], [], [])],
}


def read(row: dict[str, Any]) -> Example:
    """The row in the format its keys tell."""
    return find_format(row).read(row)


def reason(row: dict[str, Any]) -> str:
    """Why the row is refused."""
    with pytest.raises(RowError) as caught:
        read(row)
    return caught.value.reason


def test_every_format_is_covered_here() -> None:
    assert len(FORMATS) == 6
    assert set(HELD) == set(REFUSED) == set(FORMATS)
    assert all(name == form.NAME for name, form in FORMATS.items())


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
def test_what_a_format_wrote_it_reads_back(name: str, data: st.DataObject) -> None:
    example = data.draw(HELD[name])
    check_example(example)
    row = parse_line(orjson.dumps(FORMATS[name].write(example)))
    assert find_format(row) is FORMATS[name]
    assert FORMATS[name].read(row) == example
    assert content_hash(FORMATS[name].read(row)) == content_hash(example)


@pytest.mark.parametrize("name", FORMATS)
@given(example=examples)
def test_a_format_writes_an_example_whole_or_refuses_it(name: str, example: Example) -> None:
    with suppress(RowError):
        row = FORMATS[name].write(example)
        assert FORMATS[name].read(parse_line(orjson.dumps(row))) == example


@pytest.mark.parametrize(("name", "example"), [(name, each) for name, held in REFUSED.items() for each in held])
def test_a_format_refuses_what_it_cannot_hold(name: str, example: Example) -> None:
    with pytest.raises(RowError, match=name) as caught:
        FORMATS[name].write(example)
    assert caught.value.reason == "wrong_kind"


def test_a_format_is_got_by_name() -> None:
    assert get_format("auto") is None
    assert get_format("alpaca") is FORMATS["alpaca"]
    with pytest.raises(CallError, match="no format `alpacca`") as caught:
        get_format("alpacca")
    assert all(name in caught.value.hint for name in FORMATS)


def test_unknown_keys_are_named() -> None:
    with pytest.raises(RowError, match="found `question`, `answer`"):
        read({"question": "a", "answer": "b"})


# -- chat


def test_chat_developer_is_the_system() -> None:
    row = {"messages": [turn("developer", "be short"), turn("user", "a"), turn("assistant", "b")]}
    assert read(row) == Conversation([turn("system", "be short"), turn("user", "a"), turn("assistant", "b")])


def test_chat_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    example = read({"messages": [turn("user", parts), turn("assistant", "b")]})  # type: ignore[arg-type]
    assert example == Conversation([turn("user", "one two"), turn("assistant", "b")])


def test_chat_arguments_become_an_object() -> None:
    given = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, "x"]}'}}
    row = {"messages": [turn("user", "a"), {"role": "assistant", "tool_calls": [given]}]}
    expected = turn("assistant", "", tool_calls=[call("f", {"a": [1, "x"]}, "1")])
    assert read(row) == Conversation([turn("user", "a"), expected])


@pytest.mark.parametrize("given", [{"name": "f"}, {"function": {"name": "f", "arguments": ""}}])
def test_chat_call_without_arguments_has_none(given: dict[str, Any]) -> None:
    row = {"messages": [turn("user", "a"), {"role": "assistant", "tool_calls": [given]}]}
    assert read(row) == Conversation([turn("user", "a"), turn("assistant", "", tool_calls=[call("f", {})])])


def test_chat_writes_arguments_as_text() -> None:
    example = Conversation([turn("user", "a"), turn("assistant", "", tool_calls=[call("f", {"a": 1})])])
    (written,) = FORMATS["chat"].write(example)["messages"][1]["tool_calls"]
    assert written["function"] == {"name": "f", "arguments": '{"a":1}'}
    assert example.messages[1]["tool_calls"] == [call("f", {"a": 1})], "writing must not change the example"


def test_chat_weight_one_is_no_weight() -> None:
    one, none = ({"messages": [turn("user", "a"), turn("assistant", "b", **extra)]} for extra in ({"weight": 1}, {}))
    assert read(one) == read(none)


def test_chat_tools_come_as_list_or_text() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    messages = [turn("user", "a"), turn("assistant", "b")]
    assert read({"messages": messages, "tools": orjson.dumps(tools).decode()}) == Conversation(messages, tools)
    assert read({"messages": messages, "tools": tools}) == Conversation(messages, tools)
    assert (
        read({"messages": messages, "tools": []})
        == read({"messages": messages, "tools": None})
        == read({"messages": messages})
    )


def test_chat_nearest_role_is_named() -> None:
    with pytest.raises(RowError, match=r"message 2 has role `asistant`.*did you mean `assistant`\?"):
        read({"messages": [turn("user", "a"), turn("asistant", "b")]})


# -- ShareGPT


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("human", "user"),
        ("user", "user"),
        ("gpt", "assistant"),
        ("chatgpt", "assistant"),
        ("assistant", "assistant"),
        ("bing", "assistant"),
        ("bard", "assistant"),
        ("model", "assistant"),
        ("system", "system"),
        ("tool", "tool"),
        ("observation", "tool"),
        ("function_response", "tool"),
    ],
)
@pytest.mark.parametrize(("who", "said"), [("from", "value"), ("role", "content")])
def test_sharegpt_role_names_in_both_spellings(name: str, role: str, who: str, said: str) -> None:
    assert read({"conversations": [{who: name, said: "a"}]}) == Conversation([turn(role, "a")])


@pytest.mark.parametrize("key", ["conversations", "conversation"])
def test_sharegpt_system_beside_the_turns(key: str) -> None:
    row = {"system": "s", key: [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert read(row) == Conversation([turn("system", "s"), turn("user", "a"), turn("assistant", "b")])


def test_sharegpt_function_call_is_a_call_and_its_result() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "42"},
            {"from": "gpt", "value": "b"},
        ],
        "tools": '[{"name": "f"}]',
    }
    example = read(row)
    check_example(example)
    called = turn("assistant", "", tool_calls=[call("f", {"x": 1})])
    messages = [turn("user", "a"), called, turn("tool", "42"), turn("assistant", "b")]
    assert example == Conversation(messages, [{"type": "function", "function": {"name": "f"}}])


# -- Alpaca


def test_alpaca_joins_instruction_and_input() -> None:
    row = {"instruction": "Translate.", "input": "Haus", "output": "house"}
    assert read(row) == Conversation([turn("user", "Translate.\n\nHaus"), turn("assistant", "house")])


@pytest.mark.parametrize(
    "empty", [{}, {"input": ""}, {"input": None}, {"history": []}, {"history": ""}, {"system": ""}]
)
def test_alpaca_keys_may_be_empty(empty: dict[str, Any]) -> None:
    assert read({"instruction": "a", "output": "b", **empty}) == Conversation(
        [turn("user", "a"), turn("assistant", "b")]
    )


@pytest.mark.parametrize("history", [[["q", "r"]], '[["q", "r"]]'])
def test_alpaca_history_and_system_come_first(history: object) -> None:
    row = {"instruction": "a", "output": "b", "system": "s", "history": history}
    expected = [("system", "s"), ("user", "q"), ("assistant", "r"), ("user", "a"), ("assistant", "b")]
    assert read(row) == Conversation([turn(*each) for each in expected])


# -- prompt and completion


def test_completion_of_texts_and_of_messages_are_the_same() -> None:
    of_texts = {"prompt": "a", "completion": "b", "system": "s"}
    of_messages = {"prompt": [turn("user", "a")], "completion": [turn("assistant", "b")], "system": "s"}
    expected = Conversation([turn("system", "s"), turn("user", "a"), turn("assistant", "b")])
    assert read(of_texts) == read(of_messages) == expected


def test_completion_of_one_text_and_one_list_is_refused() -> None:
    assert reason({"prompt": "a", "completion": [turn("assistant", "b")]}) == "wrong_type"


# -- preference pairs

ASK, GOOD, BAD = turn("user", "a"), turn("assistant", "b"), turn("assistant", "c")
PAIR = Preference([ASK], [GOOD], [BAD])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "a", "chosen": [GOOD], "rejected": "c"},
        {"prompt": "a", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": None, "messages": None, "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"messages": [ASK], "chosen": "b", "rejected": "c"},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"input": {"messages": [ASK]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
    ],
)
def test_preference_spellings_are_one_pair(row: dict[str, Any]) -> None:
    if row.get("prompt", 0) is None:
        row = {key: value for key, value in row.items() if key != "messages"}
    assert read(row) == PAIR


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    ],
)
def test_preference_system_beside_the_pair_is_kept(row: dict[str, Any]) -> None:
    assert read({"system": "s", **row}) == Preference([turn("system", "s"), ASK], [GOOD], [BAD])


def test_preference_without_prompt_shares_up_to_the_last_user_turn() -> None:
    more = turn("user", "d")
    row = {"chosen": [ASK, GOOD, more, GOOD], "rejected": [ASK, GOOD, more, BAD]}
    assert read(row) == Preference([ASK, GOOD, more], [GOOD], [BAD])
    apart = {"chosen": [ASK, GOOD, more, GOOD], "rejected": [ASK, GOOD, turn("user", "e"), BAD]}
    assert read(apart) == Preference([ASK], [GOOD, more, GOOD], [GOOD, turn("user", "e"), BAD])


def test_preference_tools_of_openai_stand_in_the_input() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"input": {"messages": [ASK], "tools": tools}, "preferred_output": [GOOD], "non_preferred_output": [BAD]}
    assert read(row) == Preference([ASK], [GOOD], [BAD], tools)


@pytest.mark.parametrize("missing", ["chosen", "rejected"])
def test_preference_with_one_answer_is_no_pair(missing: str) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    del row[missing]
    assert reason(row) == "unknown_format"


@given(preferences())
def test_preference_prompt_repeated_in_the_answers_is_taken_once(pair: Preference) -> None:
    pair.tools = None
    row: dict[str, Any] = {
        "prompt": pair.prompt,
        "chosen": pair.prompt + pair.chosen,
        "rejected": pair.prompt + pair.rejected,
    }
    assert read(row) == pair
    del row["prompt"]
    assert read(row) == pair
