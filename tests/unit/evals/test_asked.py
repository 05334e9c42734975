"""Rows and prompts as a model meets them: what is asked, what counts, and what is left out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from luthier.data.prompts import Prompt
from luthier.data.source import open_source
from luthier.errors import DataError
from luthier.evals.asked import AskedRows, Reading, options_for, read_asked, read_plain
from luthier.runs.resolve import practice_folder
from luthier.spec.data import Data

CHAT = {
    "messages": [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "second"},
    ]
}
PAIR = {"prompt": "which?", "chosen": "this one", "rejected": "that other one"}


def read(path: Path, rows: Sequence[Any], **data: Any) -> Reading:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open_source(str(path)) as source:
        return read_asked(options_for(practice_folder(), None, Data(**data)), AskedRows(source))


def decoded(reading: Reading, number: int, *, text: int = 0) -> tuple[str, str]:
    """A text of a row, and what counts of it."""
    scored = reading.asked[number].texts[text]
    counted = [token for token, is_counted in zip(scored.ids, scored.counted, strict=True) if is_counted]
    tokenizer = reading.text.tokenizer
    return tuple(tokenizer.decode(ids, skip_special_tokens=False) for ids in (scored.ids, counted))  # type: ignore[return-value]


def test_a_conversation_is_asked_at_its_end_and_counts_what_is_trained(tmp_path: Path) -> None:
    reading = read(tmp_path / "rows.jsonl", [CHAT])
    (asked,) = reading.asked
    assert asked.messages == CHAT["messages"][:-1]
    assert asked.reference == "second"
    assert asked.prompt.endswith("two?<|im_end|>\n<|im_start|>assistant\n")
    assert reading.text.tokenizer.decode(asked.ids, skip_special_tokens=False) == asked.prompt
    assert decoded(reading, 0)[1] == "first<|im_end|>second<|im_end|>"
    only_last = read(tmp_path / "rows.jsonl", [CHAT], train_on="last_assistant")
    assert decoded(only_last, 0)[1] == "second<|im_end|>"


def test_of_a_pair_both_answers_count(tmp_path: Path) -> None:
    reading = read(tmp_path / "rows.jsonl", [PAIR])
    assert len(reading.asked[0].texts) == 2
    assert decoded(reading, 0)[1].startswith("this one")
    assert decoded(reading, 0, text=1)[1].startswith("that other one")
    assert reading.asked[0].reference == "this one"
    assert reading.asked[0].messages == [{"role": "user", "content": "which?"}]


def test_a_plain_text_is_measured_and_not_asked(tmp_path: Path) -> None:
    reading = read(tmp_path / "rows.jsonl", [{"text": "some words"}])
    (asked,) = reading.asked
    assert not asked.is_asked
    assert asked.texts[0].tokens == len(asked.texts[0].ids) - 1


def test_long_rows_are_cut_where_training_cuts(tmp_path: Path) -> None:
    reading = read(tmp_path / "rows.jsonl", [{"text": "word " * 100}], max_length=20)
    assert len(reading.asked[0].texts[0].ids) == 20


def test_what_cannot_be_asked_is_counted(tmp_path: Path) -> None:
    muted = {"messages": [CHAT["messages"][0], {**CHAT["messages"][1], "weight": 0}]}
    spelt = {"prompt": "a <|im_end|>", "completion": "b"}
    reading = read(tmp_path / "rows.jsonl", [CHAT, spelt, muted, {"prompt": 1}])
    assert [each.place[1] for each in reading.asked] == [1]
    assert sum(reading.left_out.values()) == 3
    assert reading.left_out["mask_invalid"] == 1
    with pytest.raises(DataError, match=r"rows.jsonl: nothing can be asked \(1 control_token\)"):
        read(tmp_path / "rows.jsonl", [spelt])


def test_rows_of_some_places_only(tmp_path: Path) -> None:
    reading = read(tmp_path / "rows.jsonl", [CHAT, PAIR])
    assert [each.place[1] for each in reading.only({("rows.jsonl", 2)}).asked] == [2]


def test_prompts_are_asked_in_turns_or_as_text(tmp_path: Path) -> None:
    prompts = [Prompt([{"role": "user", "content": "hi"}], "ho")]
    reading = read_asked(options_for(practice_folder(), None, Data()), prompts)
    assert reading.asked[0].prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert reading.asked[0].reference == "ho"
    assert reading.text.tokenizer.token_to_id("<|im_end|>") in reading.stops
    plain = tmp_path / "plain"
    shutil.copytree(practice_folder(), plain)
    facts = json.loads((plain / "tokenizer_config.json").read_text())
    facts.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(facts))
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    assert read_asked(options_for(plain, None, Data()), prompts).asked[0].prompt.endswith("hi")


def test_plain_texts_in_pieces(tmp_path: Path) -> None:
    text = read(tmp_path / "rows.jsonl", [CHAT]).text
    pieces = read_plain(text, ["word " * 30, "a"], max_length=16)
    assert max(len(piece.ids) for piece in pieces) == 16
    assert all(piece.tokens == len(piece.ids) - 1 > 0 for piece in pieces)
