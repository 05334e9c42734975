"""Hashes are equal for what counts as the same, differ for what does not, and never change."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.example import Conversation, Preference, Text
from luthier.data.formats import FORMATS
from luthier.data.hashes import content_hash, hash_bytes, mix, prompt_hash
from tests.builders import call, conversations, texts, turn

words = st.lists(st.text(st.characters(categories=["Ll", "Lu", "Nd"]), min_size=1, max_size=6), min_size=1, max_size=5)
gaps = st.text(st.sampled_from(" \t\n.,;:!?-_'\"()[]\u3000\u2026\u201c\u00bf"), max_size=3)


def asked(text: str) -> Conversation:
    """A conversation that begins with this question."""
    return Conversation([turn("user", text), turn("assistant", "b")])


@given(words, st.data())
def test_prompts_that_differ_in_gaps_are_the_same(said: list[str], data: st.DataObject) -> None:
    loose = "".join(word + data.draw(gaps) for word in said)
    # A mark between two words may join them under NFKC; letters and digits alone never do.
    assert prompt_hash(asked(data.draw(gaps) + loose)) == prompt_hash(asked("".join(said)))


@given(texts)
def test_prompts_that_differ_in_form_are_the_same(text: str) -> None:
    assert prompt_hash(asked(unicodedata.normalize("NFKC", text))) == prompt_hash(asked(text))
    assert prompt_hash(asked(unicodedata.normalize("NFD", text))) == prompt_hash(asked(text))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Hello, world!", "hello world"),
        ("STRASSE", "stra\u00dfe"),
        ("\uff28\uff45\uff4c\uff4c\uff4f", "hello"),
        ("caf\u00e9", "cafe\u0301"),
        ("\ufb01ne", "fine"),
        ("a\u00a0b", "ab"),
        ("\u4f60\u597d\uff0c\u4e16\u754c\u3002", "\u4f60\u597d\u4e16\u754c"),
    ],
)
def test_prompts_equal_to_a_reader(one: str, other: str) -> None:
    assert prompt_hash(asked(one)) == prompt_hash(asked(other))


@pytest.mark.parametrize(
    ("one", "other"), [("1+2", "1-2"), ("caf\u00e9", "cafe"), ("a b", "b a"), ("a", ""), ("$5", "5")]
)
def test_prompts_that_say_something_else(one: str, other: str) -> None:
    assert prompt_hash(asked(one)) != prompt_hash(asked(other))


@given(words, words)
def test_other_words_are_another_prompt(one: list[str], other: list[str]) -> None:
    plain_one, plain_other = (unicodedata.normalize("NFKC", "".join(each)).casefold() for each in (one, other))
    same = prompt_hash(asked(" ".join(one))) == prompt_hash(asked(" ".join(other)))
    assert same == (plain_one == plain_other)


def test_only_what_the_person_said_is_the_prompt() -> None:
    one = Conversation([turn("system", "s"), turn("user", "q"), turn("assistant", "a")])
    pair = Preference([turn("user", "q")], [turn("assistant", "x")], [turn("assistant", "y")])
    assert prompt_hash(one) == prompt_hash(asked("q")) == prompt_hash(pair) == prompt_hash(Text("q"))


@given(conversations())
def test_content_is_the_same_whatever_the_order_of_keys(example: Conversation) -> None:
    turned = Conversation([dict(reversed(each.items())) for each in example.messages], example.tools)
    assert content_hash(turned) == content_hash(example)


@given(conversations(rich=False, max_turns=1))
def test_content_is_the_same_whatever_the_format(example: Conversation) -> None:
    hashes = {
        content_hash(form.read(form.write(example)))
        for form in (FORMATS[name] for name in ("chat", "sharegpt", "alpaca", "completion"))
    }
    assert hashes == {content_hash(example)}


def test_content_differs_by_everything_that_is_trained_or_shown() -> None:
    ask = turn("user", "q")
    made = [
        Conversation([ask, turn("assistant", "a")]),
        Conversation([ask, turn("assistant", "a ")]),
        Conversation([ask, turn("assistant", "A")]),
        Conversation([ask, turn("assistant", "a", weight=0)]),
        Conversation([ask, turn("assistant", "a", reasoning_content="r")]),
        Conversation([ask, turn("assistant", "a")], [{"type": "function"}]),
        Conversation([ask, turn("assistant", "a", tool_calls=[call("f", {"x": 1})])]),
        Conversation([ask, turn("assistant", "a", tool_calls=[call("f", {"x": 2})])]),
        Preference([ask], [turn("assistant", "a")], [turn("assistant", "b")]),
        Preference([ask], [turn("assistant", "b")], [turn("assistant", "a")]),
        Text("q"),
    ]
    assert len({content_hash(each) for each in made}) == len(made)


# -- golden numbers: splits, orders and caches of every run ever made depend on them


def test_hashes_never_change() -> None:
    assert hash_bytes(b"luthier") == 8972201191011516762
    assert content_hash(asked("What is 2 + 2?")) == 14622117477564656227
    assert prompt_hash(asked("What is 2 + 2?")) == hash_bytes(b"whatis2+2") == 16132865198837845591
    assert mix(np.arange(4, dtype=np.uint64), 7).tolist() == [
        14232521865600346940,
        9648886400068060533,
        13633754720362554755,
        16393961507643560470,
    ]


def test_mix_by_seed_zero_is_splitmix64() -> None:
    # The first outputs of the reference implementation, started at 0: state k * 0x9E3779B97F4A7C15.
    states = np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix(states, 0).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@given(st.lists(st.integers(0, 2**64 - 1), unique=True, max_size=50), st.integers(0, 2**63))
def test_mix_keeps_different_values_different(values: list[int], seed: int) -> None:
    mixed = mix(np.array(values, np.uint64), seed)
    assert len(set(mixed.tolist())) == len(values)
    assert mixed.dtype == np.uint64
