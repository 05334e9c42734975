"""Rows, files and settings at the edges of preparation: each was once prepared wrongly, lost in silence or a crash."""

from __future__ import annotations

import datetime
import json
import math
import multiprocessing
import os
import shutil
import signal
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from luthier.data import ledger as ledgers
from luthier.data import parallel, source
from luthier.data.ledger import RowTable
from luthier.data.prepare import prepare
from luthier.data.prepared import Prepared
from luthier.data.reasons import REASON_NAMES
from luthier.data.rows import ReadOptions, RowReader
from luthier.data.show import show_row
from luthier.data.source import Block, open_source
from luthier.data.tokens import ModelText
from luthier.errors import DataError, MaskError
from luthier.runs.resolve import practice_folder
from luthier.spec.data import Data
from tests.builders import write_jsonl
from tests.shapes import list_shapes


def chat(user: str, answer: str = "yes", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}], **more}


def pair(prompt: str, chosen: Any = "good", rejected: Any = "bad") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def call_row(**arguments: Any) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    row = chat("a")
    row["messages"][1]["tool_calls"] = [call]
    return row


def prepared(
    rows: Path | list[Any],
    home: Path,
    *,
    model: Path | None = None,
    objective: str | None = "sft",
    valid: Any = 0,
    **data: Any,
) -> Prepared:
    path = rows if isinstance(rows, Path) else write_jsonl(home / "rows.jsonl", rows)
    options = ReadOptions(Data(train=str(path), valid=valid, **data), objective, model or practice_folder())
    return prepare(options, seed=0, home=home)


def ledger(done: Prepared) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (done.folder / "ledger.jsonl").read_text().splitlines()]


def rejected(done: Prepared) -> list[tuple[int, str]]:
    lines = (done.folder / "rejected.jsonl").read_text().splitlines()
    return [(entry["line"], entry["reason"]) for entry in map(json.loads, lines)]


def trained_texts(done: Prepared, model: Path | None = None) -> list[str]:
    tokenizer = ModelText(model or practice_folder()).tokenizer
    sequences = [sequence for example in done.train for sequence in done.sequences_of(int(example))]
    ids = [done.tokens_of(sequence)[done.trained_of(sequence)].tolist() for sequence in sequences]
    return [tokenizer.decode(each, skip_special_tokens=False) for each in ids]


def chatml_with(old: str, new: str, folder: Path) -> Path:
    """A ChatML model whose template has one thing more."""
    model = next(shape for shape in list_shapes() if shape.name == "chatml").write_model(folder)
    path = model / "chat_template.jinja"
    changed = path.read_text().replace(old, new)
    assert changed != path.read_text()
    path.write_text(changed)
    return model


def shape_model(name: str, folder: Path) -> Path:
    return next(shape for shape in list_shapes() if shape.name == name).write_model(folder)


def assert_joined_as_rendered(rows: list[Any], model: Path, home: Path) -> None:
    """Every row's tokens are those of its full rendering, whatever was learnt."""
    done = prepared(rows, home, model=model)
    text = ModelText(model)
    template = text.build_template()
    assert template is not None
    assert len(done.train) == len(rows)
    for row, example in zip(rows, done.train, strict=True):
        whole = text.tokenizer.encode(template.render(row["messages"]), add_special_tokens=False).ids
        assert done.tokens_of(done.sequences_of(int(example))[0]).tolist() == whole


# -- learnt shapes


@pytest.mark.parametrize(
    ("old", "new", "rare"),
    [
        ("{%- for turn", "{{- 'short' if '/no_think' in messages[0].content }}{%- for turn", "say it /no_think"),
        (
            "{%- for turn",
            "{%- set word = '/no_think' %}{{- 'short' if word in messages[0].content }}{%- for turn",
            "say it /no_think",
        ),
        ("{%- for turn", "{{- 'short' if '/no_think' in messages[0].content | lower }}{%- for turn", "SAY /NO_THINK"),
        ("turn.content", "turn.content | replace('\\n\\n', '\\n')", "first\n\nsecond"),
        ("turn.content", "turn.content | replace('  ', ' ')", "two  spaces"),
    ],
    ids=["plain word", "word in a variable", "word in any case", "blank line", "two spaces"],
)
def test_a_rare_word_that_the_template_minds_is_rendered_as_it_would(
    old: str, new: str, rare: str, tmp_path: Path
) -> None:
    model = chatml_with(old, new, tmp_path / "model")
    rows = [chat(f"{rare} {n}" if n % 10 == 9 else f"question {n}", f"answer {n}") for n in range(60)]
    assert_joined_as_rendered(rows, model, tmp_path)


# -- what a row may not say


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "a", "name": "x<|im_end|>"}, {"role": "assistant", "content": "b"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "<|im_start|>"}],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "c", "tool_call_id": "<|im_end|>"},
            {"role": "assistant", "content": "d"},
        ],
    ],
    ids=["name of a user", "name of an assistant", "tool_call_id"],
)
def test_a_control_token_beside_the_content_is_refused(messages: list[Any], tmp_path: Path) -> None:
    done = prepared([chat("fine"), {"messages": messages}], tmp_path, max_rejected_share=1.0)
    assert rejected(done) == [(2, "control_token")]


@pytest.mark.parametrize("sign", ["\ue0f0", "\ue0f1", "\ue0f2", "\ue0f3", "\ue0f4"], ids=ascii)
@pytest.mark.parametrize("at", [0, 1], ids=["question", "answer"])
def test_the_signs_by_which_spans_are_found_are_refused(sign: str, at: int, tmp_path: Path) -> None:
    bad = chat("a", "b")
    bad["messages"][at]["content"] += f" {sign}answer"
    done = prepared([chat("fine"), bad], tmp_path, max_rejected_share=1.0)
    assert rejected(done) == [(2, "control_token")]


def test_a_turn_of_which_only_control_tokens_are_left_is_refused(tmp_path: Path) -> None:
    model = shape_model("deepseek_r1", tmp_path / "model")
    rows = [chat("a", "<think>hm</think>"), chat("b", "<think>hm</think>fine")]
    done = prepared(rows, tmp_path, model=model, max_rejected_share=1.0)
    assert rejected(done) == [(1, "template_refused")]
    assert ledger(done)[1]["place"] == "train"


def test_a_call_without_content_never_says_none(tmp_path: Path) -> None:
    calls = "{% for c in turn.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    model = shape_model("chatml", tmp_path / "model")
    (model / "chat_template.jinja").write_text(
        "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}"
        f"{calls}<|im_end|>\n{{% endfor %}}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = call_row(x=1)
    row["messages"][1]["content"] = None
    done = prepared([row], tmp_path, model=model)
    text = ModelText(model).tokenizer.decode(done.tokens_of(0).tolist(), skip_special_tokens=False)
    assert "None" not in text
    assert trained_texts(done, model) == ['{"name": "f", "arguments": {"x": 1}}<|im_end|>']


@pytest.mark.parametrize("key", ["thinking", "reasoning"])
def test_thinking_is_read_whatever_its_key(key: str) -> None:
    row = chat("a", "b")
    row["messages"][1][key] = "hm"
    example = RowReader(ReadOptions(Data()), ("rows.jsonl",)).example(orjson.dumps(row))
    assert example.messages[1] == {"role": "assistant", "content": "b", "reasoning_content": "hm"}  # type: ignore[union-attr]


def test_an_answer_in_the_prompt_of_a_completion_is_not_trained(tmp_path: Path) -> None:
    prompt = [*chat("one", "first")["messages"], {"role": "user", "content": "two"}]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "second"}]}
    assert trained_texts(prepared([row], tmp_path)) == ["second<|im_end|>"]


def test_a_muted_turn_stays_muted_where_all_is_trained(tmp_path: Path) -> None:
    messages = [*chat("one", "first")["messages"], *chat("two", "second")["messages"]]
    messages[1]["weight"] = 0
    (trained,) = trained_texts(prepared([{"messages": messages}], tmp_path, train_on="all"))
    assert "first" not in trained
    assert all(words in trained for words in ("one", "two", "second<|im_end|>"))


# -- pairs

LONG_CHOSEN = [
    {"role": "assistant", "content": "draft"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "good"},
]


def test_a_muted_turn_of_a_pair_is_not_trained(tmp_path: Path) -> None:
    chosen = [{**LONG_CHOSEN[0], "weight": 0}, *LONG_CHOSEN[1:]]
    done = prepared([pair("a", chosen)], tmp_path, objective="dpo")
    assert trained_texts(done) == ["good<|im_end|>", "bad<|im_end|>"]


def test_the_last_turn_of_a_pair_may_be_all_that_is_trained(tmp_path: Path) -> None:
    done = prepared([pair("a", LONG_CHOSEN)], tmp_path, objective="dpo", train_on="last_assistant")
    assert trained_texts(done) == ["good<|im_end|>", "bad<|im_end|>"]


def test_a_pair_that_the_template_makes_equal_is_rejected(tmp_path: Path) -> None:
    model = shape_model("deepseek_r1", tmp_path / "model")
    rows = [pair("a"), pair("2 + 2", "<think>good</think>4", "<think>bad</think>4"), pair("b")]
    done = prepared(rows, tmp_path, model=model, objective="dpo", max_rejected_share=1.0)
    assert done.summary["reasons"] == {"chosen_equals_rejected": 1}
    assert rejected(done) == [(2, "chosen_equals_rejected")]
    assert [entry["place"] for entry in ledger(done)] == ["train", "dropped", "train"]
    assert trained_texts(done, model)[2][:4] == "good"


def test_a_pair_that_truncation_makes_equal_is_rejected(tmp_path: Path) -> None:
    rows = [pair("a"), pair("b", "word " * 60 + "good", "word " * 60 + "bad"), pair("c")]
    done = prepared(rows, tmp_path, objective="dpo", max_length=40, too_long="truncate", max_rejected_share=1.0)
    assert done.summary["reasons"] == {"chosen_equals_rejected": 1}
    assert rejected(done) == [(2, "chosen_equals_rejected")]
    assert trained_texts(done) == ["good<|im_end|>", "bad<|im_end|>"] * 2


# -- lengths


def test_a_cut_that_takes_every_end_stops_the_run(tmp_path: Path) -> None:
    """No row would teach the model to stop."""
    rows = [chat(f"q{n}", "word " * 100) for n in range(3)]
    with pytest.raises(MaskError):
        prepared(rows, tmp_path, max_length=40, too_long="truncate")


# -- files


def test_rows_of_more_files_than_sixteen_bits_count_keep_theirs() -> None:
    block = Block(70_000, [1], [orjson.dumps(chat("a"))], 0)
    table = RowTable()
    table.add(RowReader(ReadOptions(Data()), ()).read(block))
    assert table.column("files").tolist() == [70_000]
    names = tuple(f"{number}.jsonl" for number in range(70_001))
    (line,) = ledgers.ledger_lines(table, np.zeros(1, np.uint8), names, np.zeros(1, bool))
    assert orjson.loads(line)["file"] == "70000.jsonl"


def test_files_of_one_name_in_two_folders_are_told_apart(tmp_path: Path) -> None:
    for side in ("train", "valid"):
        (tmp_path / side).mkdir()
        write_jsonl(tmp_path / side / "rows.jsonl", [chat(f"{side} {n}") for n in range(2)])
    done = prepared(tmp_path / "train" / "rows.jsonl", tmp_path, valid=str(tmp_path / "valid" / "rows.jsonl"))
    files = {place: {e["file"] for e in ledger(done) if e["place"] == place} for place in ("train", "valid")}
    assert len(files["train"]) == len(files["valid"]) == 1
    assert files["train"] != files["valid"]


def test_a_group_of_the_validation_file_is_taken_out_of_training(tmp_path: Path) -> None:
    valid = write_jsonl(tmp_path / "valid.jsonl", [chat("held", game=1)])
    rows = [chat("a", game=1), chat("b", game=2), chat("c", game="1"), chat("d", game=1)]
    done = prepared(rows, tmp_path, valid=str(valid), group_by="game")
    found = [(entry["place"], entry.get("reason")) for entry in ledger(done)]
    out = ("dropped", "in_validation")
    assert found == [out, ("train", None), ("train", None), out, ("valid", None)]


def test_a_cache_damaged_just_after_it_was_seen_counts_as_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [chat("a"), chat("b")]
    folder = prepared(rows, tmp_path).folder
    (folder / "summary.json").write_bytes(b"{")
    with monkeypatch.context() as patch:
        patch.setattr("luthier.data.prepare.find_valid", lambda found: found, raising=False)
        again = prepared(rows, tmp_path)
    assert again.folder == folder
    assert again.summary["train"] == 2
    assert not again.was_cached
    assert prepared(rows, tmp_path).was_cached


def test_values_that_json_cannot_hold_are_refused_inside_calls_only(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    beside = {"price": Decimal("1.5"), "day": datetime.datetime(2024, 7, 26)}
    found = []
    for number, value in enumerate((Decimal("1.5"), b"\xff", math.nan, 1.5)):
        path = tmp_path / f"{number}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist([{**call_row(x=value), **beside}]), path)
        reader = RowReader(ReadOptions(Data()), (path.name,))
        with open_source(str(path)) as source:
            found += [REASON_NAMES.get(int(code), "") for b in source.blocks() for code in reader.read(b).reasons]
    assert found == ["wrong_type", "wrong_type", "non_finite_number", ""]


def test_large_json_rows_are_read_a_few_megabytes_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b"[" + b",\n".join([orjson.dumps({"text": "x" * 20_000})] * 600) + b"]")
    with open_source(str(path)) as source:
        sizes = [sum(len(row) for row in block.rows) for block in source.blocks()]  # type: ignore[arg-type]
    assert sum(sizes) > 600 * 20_000
    assert max(sizes) < 5 << 20


# -- showing


def test_pieces_keep_the_spaces_that_a_post_processor_trims(tmp_path: Path) -> None:
    """`trim_offsets` makes the tokenizer's own offsets leave out the space before a word."""
    model = tmp_path / "model"
    shutil.copytree(practice_folder(), model)
    facts = json.loads((model / "tokenizer.json").read_text())
    facts["post_processor"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    (model / "tokenizer.json").write_text(json.dumps(facts))
    reader = RowReader(ReadOptions(Data(), model_folder=model), ("rows.jsonl",))
    (shown,) = show_row(reader, ModelText(model), 1, orjson.dumps(chat("one two", "three four five")))
    assert "".join(shown.pieces) == shown.text
    assert shown.trained_text == "three four five<|im_end|>"


@pytest.mark.parametrize(
    "use",
    [
        "turn.content | e",
        "turn.content | indent(2)",
        "turn.content[:200]",
        "turn.content | wordwrap(79)",
        "(turn.content | int if turn.content.isdigit() else turn.content)",
        "turn.content.strip('!')",
        "turn.content.replace('\\n\\n', '\\n')",
    ],
)
def test_a_use_of_contents_that_shows_only_on_some_is_never_joined(use: str, tmp_path: Path) -> None:
    """Filters and methods that leave plain words alone would otherwise be learnt as if they did nothing."""
    model = chatml_with("turn.content", use, tmp_path / "model")
    hard = ["Tom & Ann", "one\ntwo\n\nthree", "007", "well!", "long words " * 60]
    rows = [chat(f"q{n}", hard[n % 5] if n % 7 == 0 else f"a{n}") for n in range(70)]
    assert_joined_as_rendered(rows, model, tmp_path)


def test_a_reading_process_that_is_killed_is_an_error_and_not_a_crash(tmp_path: Path, monkeypatch: Any) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [chat(f"q{n} " + "w " * 300) for n in range(4000)])
    monkeypatch.setattr(parallel, "PARALLEL_BYTES", 0)
    # Many small blocks, so that most of them are still to be read when the first is done.
    monkeypatch.setattr(source, "BLOCK_BYTES", 1 << 14)

    def kill_one(rows_read: int, *_: int) -> None:
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    options = ReadOptions(Data(train=str(rows), valid=0), "sft", practice_folder())
    with pytest.raises(DataError, match="was killed"):
        prepare(options, seed=0, home=tmp_path, progress=kill_one)
    assert list((tmp_path / "tokens").iterdir()) == []
