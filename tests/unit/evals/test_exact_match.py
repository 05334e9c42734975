"""Exact match counts what it should, with Wilson's interval, and knows right from almost right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.render import Question
from luthier.data.rows import ReadOptions
from luthier.data.source import open_source
from luthier.evals.exact_match import Answer, ExactMatch, count_changes, measure_exact_match, wilson_interval
from luthier.evals.heldout import HeldOut, read_held_out
from luthier.evals.perplexity import measure_perplexity
from luthier.runs.resolve import practice_folder
from luthier.spec.data import Data
from tests.unit.evals.scripted import Scripted


def held_out(path: Path, rows: list[object]) -> HeldOut:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open_source(str(path)) as source:
        return read_held_out(ReadOptions(Data(), None, practice_folder(), fast_tokenizer=False), source)


def answered(expected: str, got: str, *, line: int = 1, is_cut: bool = False) -> Answer:
    return Answer(("rows.jsonl", line), Question("?", expected, "<|im_end|>"), got, is_cut)


@pytest.mark.parametrize(
    ("expected", "got", "is_right"),
    [
        ("5", "5", True),
        ("5", " 5\n", True),
        ("5", "5.", False),
        ("five", "Five", False),
        ("5", "", False),
        ("5", "<think>\n2 + 3\n</think>\n\n5", True),
        ("<think>\n\n</think>\n\n5", "<think>\nquite another thought\n</think>\n\n5", True),
        ("<think>\n2 + 3\n</think>\n\n5", "5", True),
        ("5", "<think>\n5", False),
    ],
)
def test_right_is_equal_but_for_white_space_and_thoughts(expected: str, got: str, is_right: bool) -> None:
    assert answered(expected, got).is_right is is_right
    assert not answered(expected, got, is_cut=True).is_right


def test_wilson_of_none_and_all_has_a_closed_form() -> None:
    z = 1.96
    assert wilson_interval(0, 200, z) == pytest.approx((0.0, z * z / (200 + z * z)))
    assert wilson_interval(200, 200, z) == pytest.approx((200 / (200 + z * z), 1.0))
    assert wilson_interval(0, 200) == pytest.approx((0.0, 0.0188453), abs=1e-6)


@given(st.integers(1, 10_000).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_wilson_holds_the_share_and_stays_a_share(drawn: tuple[int, int]) -> None:
    right, count = drawn
    low, high = wilson_interval(right, count)
    assert 0.0 <= low <= right / count <= high <= 1.0
    assert low < high
    for bound in (low, high):  # where the share stops being within z standard errors of the bound
        if 0 < right < count:
            assert (right / count - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / count, rel=1e-4)
    mirrored = wilson_interval(count - right, count)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_changes_are_counted_by_row() -> None:
    first = ExactMatch(tuple(answered("a", got, line=line) for line, got in enumerate("aaab")), 4, 1.0)
    second = ExactMatch(tuple(answered("a", got, line=line) for line, got in enumerate("abba")), 4, 1.0)
    assert count_changes(first, second) == (2, 1)
    assert (first.right, second.right) == (3, 2)


def test_answers_are_greedy_end_with_the_turn_and_are_compared(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {word}", "completion": word} for word in ("yes", "no", "perhaps")]
    rows_read = held_out(tmp_path / "rows.jsonl", rows)
    tokenizer = rows_read.text.tokenizer

    def answer(prompt: list[int]) -> list[int]:
        asked = tokenizer.decode(prompt, skip_special_tokens=False)
        assert asked.endswith("<|im_end|>\n<|im_start|>assistant\n")
        word = "maybe" if "perhaps" in asked else asked.split("say ")[1].split("<")[0]
        return list(tokenizer.encode(f" {word}", add_special_tokens=False).ids)

    sampler = Scripted(answer)
    found = measure_exact_match(sampler, rows_read)
    assert sampler.params is not None
    assert sampler.params.temperature == 0.0
    assert tokenizer.token_to_id("<|im_end|>") in sampler.params.stop_tokens
    assert (found.rows, found.right, found.cut) == (3, 2, 0)
    assert [(each.place, each.got.strip()) for each in found.wrong] == [(("rows.jsonl", 3), "maybe")]
    shown = found.as_dict(wrong=1)
    assert (shown["right"], shown["share"]) == (2, pytest.approx(2 / 3))
    assert shown["wrong"][0]["expected"] == "perhaps"
    assert found.as_dict(wrong=0)["wrong"] == []


def test_an_answer_that_does_not_end_is_wrong(tmp_path: Path) -> None:
    rows_read = held_out(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "yes"}])
    yes = rows_read.text.tokenizer.encode("yes", add_special_tokens=False).ids
    endless = Scripted(lambda prompt: yes * 1000)
    found = measure_exact_match(endless, rows_read)
    assert (found.right, found.cut) == (0, 1)
    # The limit leaves room behind the longest expected answer, and no more.
    assert endless.params is not None
    assert endless.params.max_tokens == len(yes) + 32
    measure_exact_match(endless, rows_read, max_tokens=7)
    assert endless.params.max_tokens == 7


def test_a_control_token_within_an_answer_makes_it_wrong(tmp_path: Path) -> None:
    rows_read = held_out(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "yes"}])
    tokenizer = rows_read.text.tokenizer
    for got, right in (("yes<|endoftext|>", 1), ("<|im_start|>yes", 0)):
        ids = tokenizer.encode(got, add_special_tokens=False).ids
        assert measure_exact_match(Scripted(lambda prompt, ids=ids: ids), rows_read).right == right


def test_perplexity_is_over_every_token_but_the_first_of_a_text(tmp_path: Path) -> None:
    rows_read = held_out(tmp_path / "rows.jsonl", [{"text": "one two three"}, {"text": "four " * 3000}])
    found = measure_perplexity(Scripted(lambda prompt: [], loss=0.5), rows_read)
    lengths = [len(ids) for ids in rows_read.texts]
    pieces = 1 + -(-lengths[1] // 2048)
    assert (found.texts, found.tokens) == (2, sum(lengths) - pieces)
    assert found.loss == pytest.approx(0.5)
    assert found.perplexity == pytest.approx(1.6487, abs=1e-4)
