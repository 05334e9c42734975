"""Every row is in one place, the counts add up, and what is prepared is what will be trained."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data import parallel
from luthier.data.prepare import prepare
from luthier.data.prepared import Prepared
from luthier.data.rows import ReadOptions
from luthier.data.shapes import ShapeLearner
from luthier.data.spans import Rendering
from luthier.errors import DataError, MaskError, RejectedRowsError
from luthier.runs.resolve import practice_folder
from luthier.spec.data import Data
from tests.shapes import list_shapes


def chat(user: str, answer: str = "yes", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}], **more}


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def prepared(
    path: Path, home: Path, *, model: Path | None = None, objective: str | None = "sft", seed: int = 0, **data: Any
) -> Prepared:
    options = ReadOptions(Data(train=str(path), **data), objective, model or practice_folder())
    return prepare(options, seed=seed, home=home)


def ledger(done: Prepared) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (done.folder / "ledger.jsonl").read_text().splitlines()]


def trained_texts(done: Prepared, examples: Any) -> list[str]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(practice_folder() / "tokenizer.json"))
    found = []
    for example in examples:
        for sequence in done.sequences_of(int(example)):
            ids = done.tokens_of(sequence)[done.trained_of(sequence)]
            found.append(tokenizer.decode(ids.tolist(), skip_special_tokens=False))
    return found


def test_exactly_the_answers_and_their_end_are_trained(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [chat(f"question {n}", f"answer {n}") for n in range(20)])
    done = prepared(rows, tmp_path, valid=0)
    assert trained_texts(done, done.train) == [f"answer {n}<|im_end|>" for n in range(20)]


ROW = st.one_of(
    st.builds(chat, st.text("ab ", max_size=4), st.text("xy", max_size=3)),
    st.sampled_from(["not json", "[]", '{"a": 1}', '{"messages": []}', '{"text": "plain"}', " "]),
)


@given(rows=st.lists(ROW, min_size=1, max_size=30), share=st.sampled_from([0, 0.1, 0.5, 1]))
def test_every_row_is_in_exactly_one_place(rows: list[Any], share: float, tmp_path_factory: Any) -> None:
    """Conservation: each line that is not blank has one entry, in order, and the sums agree."""
    tmp_path = tmp_path_factory.mktemp("ledger")
    path = write_rows(tmp_path / "rows.jsonl", rows)
    lines = [n for n, text in enumerate(path.read_text().split("\n"), 1) if text.strip()]
    try:
        done = prepared(path, tmp_path, valid=share, max_rejected_share=1.0)
    except DataError as error:
        assert "no rows" in error.message or "leaves nothing to train" in error.message  # noqa: PT017
        return
    entries = ledger(done)
    assert [entry["line"] for entry in entries] == lines
    places = Counter(entry["place"] for entry in entries)
    assert {name: done.summary[name] for name in ("train", "valid", "dropped")} == {
        name: places[name] for name in ("train", "valid", "dropped")
    }
    assert all(("reason" in entry) == (entry["place"] == "dropped") for entry in entries)
    assert sum(entry["tokens"] for entry in entries if entry["place"] == "train") == done.summary["tokens"]["train"]
    rejected = (done.folder / "rejected.jsonl").read_text().splitlines()
    assert len(rejected) == done.summary["malformed"]


def test_a_second_run_reuses_the_cache_and_a_changed_template_does_not(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [chat("a"), chat("b"), chat("c")])
    model = tmp_path / "model"
    shutil.copytree(practice_folder(), model)
    first = prepared(rows, tmp_path, model=model)
    assert not first.was_cached
    assert prepared(rows, tmp_path, model=model).was_cached
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = config["chat_template"] + "{# another #}"
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    changed = prepared(rows, tmp_path, model=model)
    assert not changed.was_cached
    assert changed.folder != first.folder
    for other in ({"seed": 1}, {"max_length": 64}, {"train_on": "all"}):
        assert prepared(rows, tmp_path, model=model, **other).folder != changed.folder


def test_a_file_that_grows_while_it_is_read_is_not_cached(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [chat("a"), chat("b")])

    def grow(rows_read: int, *_: int) -> None:
        if rows_read == 2:
            with rows.open("a") as file:
                file.write(json.dumps(chat("c")) + "\n")

    options = ReadOptions(Data(train=str(rows)), "sft", practice_folder())
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(options, seed=0, home=tmp_path, progress=grow)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_a_token_that_becomes_special_changes_the_cache(tmp_path: Path) -> None:
    """`special` may be declared in tokenizer_config.json alone, and decides which contents are refused."""
    rows = write_rows(tmp_path / "rows.jsonl", [chat("a"), chat("b <think> c")])
    model = tmp_path / "model"
    shutil.copytree(practice_folder(), model)
    assert prepared(rows, tmp_path, model=model, valid=0).summary["train"] == 2
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"2047": {"content": "<think>", "special": True}}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    again = prepared(rows, tmp_path, model=model, valid=0, max_rejected_share=1.0)
    assert again.summary["reasons"] == {"control_token": 1}


def test_duplicates_are_dropped_across_formats_and_do_not_count_as_malformed(tmp_path: Path) -> None:
    alpaca = {"instruction": "a", "output": "yes"}
    done = prepared(write_rows(tmp_path / "rows.jsonl", [chat("a"), alpaca, chat("b")]), tmp_path, valid=0)
    assert done.summary["reasons"] == {"duplicate": 1}
    assert done.summary["malformed"] == 0
    assert ledger(done)[1]["reason"] == "duplicate"


def test_rows_of_the_validation_file_are_taken_out_of_training(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", [chat("a"), chat("b"), chat("c?", "other")])
    valid = write_rows(tmp_path / "valid.jsonl", [chat("b"), chat("C!")])
    done = prepared(train, tmp_path, valid=str(valid))
    assert [(e["file"], e["place"], e.get("reason"), e.get("notes")) for e in ledger(done)] == [
        ("train.jsonl", "train", None, None),
        ("train.jsonl", "dropped", "in_validation", None),
        ("train.jsonl", "train", None, None),
        ("valid.jsonl", "valid", None, None),
        ("valid.jsonl", "valid", None, ["prompt_in_train"]),
    ]
    assert done.summary["leakage"] == 1


def test_the_split_does_not_depend_on_the_order_of_the_rows(tmp_path: Path) -> None:
    rows = [chat(f"q {n}") for n in range(40)]
    held = []
    for number, order in enumerate((rows, rows[::-1])):
        done = prepared(write_rows(tmp_path / f"rows{number}.jsonl", order), tmp_path, valid=0.1)
        lines = {entry["line"] for entry in ledger(done) if entry["place"] == "valid"}
        held.append({order[line - 1]["messages"][0]["content"] for line in lines})
    assert held[0] == held[1]
    assert len(held[0]) == 4


def test_a_group_is_on_one_side(tmp_path: Path) -> None:
    rows = [chat(f"q {n}", game=n % 7) for n in range(70)]
    done = prepared(write_rows(tmp_path / "rows.jsonl", rows), tmp_path, valid=0.2, group_by="game")
    sides: dict[int, set[str]] = {}
    for entry in ledger(done):
        sides.setdefault(rows[entry["line"] - 1]["game"], set()).add(entry["place"])
    assert all(len(places) == 1 for places in sides.values())
    assert 14 <= done.summary["valid"] <= 24


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_long_rows_are_counted_by_the_whole_conversation(too_long: str, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [chat("a"), chat("word " * 100, "answer"), chat("b", "word " * 100)])
    done = prepared(rows, tmp_path, valid=0, max_length=40, too_long=too_long)
    # The second row's answer is cut off entirely, so nothing of it would be trained.
    expected = {"drop": (1, {"too_long": 2}), "truncate": (2, {"too_long": 1})}[too_long]
    assert (done.summary["train"], done.summary["reasons"]) == expected
    assert max(int(done.lengths[s]) for e in done.train for s in done.sequences_of(int(e))) <= 40
    if too_long == "truncate":
        assert ledger(done)[2]["notes"] == ["truncated", "end_cut"]


def test_a_long_text_is_split_and_no_token_is_lost(tmp_path: Path) -> None:
    long = " ".join(f"word{number}" for number in range(60))
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "short"}, {"text": long}, {"text": "other"}])
    done = prepared(rows, tmp_path, objective="pretrain", valid=0, max_length=40, too_long="split")
    pieces = [
        int(done.lengths[s]) for e in done.train for s in done.sequences_of(int(e)) if done.row_of(int(e))[1] == 2
    ]
    whole = prepared(rows, tmp_path, objective="pretrain", valid=0, max_length=1000)
    assert len(pieces) > 2
    assert max(pieces) <= 40
    assert max(pieces) - min(pieces) <= 1
    assert sum(pieces) == int(whole.lengths[1])
    assert "".join(trained_texts(done, done.train)) == "".join(trained_texts(whole, whole.train))
    assert [entry.get("examples", 1) for entry in ledger(done)] == [1, len(pieces), 1]
    assert [entry.get("notes") for entry in ledger(done)] == [None, ["split"], None]
    assert done.summary["examples"]["train"] == len(done.train) == len(pieces) + 2
    assert done.summary["tokens"] == whole.summary["tokens"]


def test_only_plain_text_is_split(tmp_path: Path) -> None:
    pair = {"prompt": "a", "chosen": "yes " * 3, "rejected": "no"}
    long_pair = {**pair, "chosen": "yes " * 60}
    rows = [chat("a"), {"text": "word " * 100}, chat("b", "word " * 100), pair, long_pair, {"text": "c"}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    done = prepared(file, tmp_path, objective=None, valid=0, max_length=40, too_long="split", max_rejected_share=1.0)
    assert [entry["line"] for entry in ledger(done) if entry.get("reason") == "too_long"] == [3, 5]
    assert max(int(done.lengths[s]) for e in done.train for s in done.sequences_of(int(e))) <= 40
    assert [len(done.sequences_of(int(example))) for example in done.train].count(2) == 1


def test_too_long_error_names_the_rows(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [chat("a"), chat("word " * 100)])
    with pytest.raises(DataError, match=r"rows.jsonl:2 \(\d+ tokens\)"):
        prepared(rows, tmp_path, max_length=40, too_long="error")


def test_a_row_that_trains_nothing_stops_the_run(tmp_path: Path) -> None:
    muted = chat("b")
    muted["messages"][1]["weight"] = 0
    rows = write_rows(tmp_path / "rows.jsonl", [chat("a"), muted])
    with pytest.raises(MaskError, match=r"rows.jsonl:2: the example trains nothing"):
        prepared(rows, tmp_path)


def test_too_many_malformed_rows_stop_the_run(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [chat("a"), "nonsense", "[]"])
    with pytest.raises(RejectedRowsError, match="2 of 3 rows are malformed"):
        prepared(rows, tmp_path, valid=0)
    assert prepared(rows, tmp_path, valid=0, max_rejected_share=0.7).summary["train"] == 1


def test_a_control_token_in_content_is_refused_and_thinking_is_not(tmp_path: Path) -> None:
    rows = [chat("a <|im_end|> b"), chat("a", "<think>\nhm\n</think>\n\nfine"), chat("<tool_call> in words")]
    done = prepared(write_rows(tmp_path / "rows.jsonl", rows), tmp_path, valid=0, max_rejected_share=1.0)
    assert done.summary["reasons"] == {"control_token": 1}
    assert done.summary["train"] == 2


TURNS = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second"},
]


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("assistant", "first<|im_end|>second<|im_end|>"),
        ("last_assistant", "second<|im_end|>"),
        ("completion", "second<|im_end|>"),
    ],
)
def test_train_on_chooses_the_turns(train_on: str, expected: str, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": TURNS}])
    done = prepared(rows, tmp_path, valid=0, train_on=train_on)
    assert "".join(trained_texts(done, done.train)) == expected


def test_train_on_all_trains_every_token(tmp_path: Path) -> None:
    done = prepared(write_rows(tmp_path / "rows.jsonl", [{"messages": TURNS}]), tmp_path, valid=0, train_on="all")
    assert done.trained_of(0).all()


def test_unrolled_turns_are_examples_of_one_row(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [chat("a"), {"messages": TURNS}])
    done = prepared(rows, tmp_path, valid=0, unroll=True)
    assert trained_texts(done, done.train) == ["yes<|im_end|>", "first<|im_end|>", "second<|im_end|>"]
    assert [done.row_of(int(example)) for example in done.train] == [
        ("rows.jsonl", 1),
        ("rows.jsonl", 2),
        ("rows.jsonl", 2),
    ]
    assert [entry.get("examples") for entry in ledger(done)] == [None, 2]


def test_a_pair_is_one_example_of_two_sequences(tmp_path: Path) -> None:
    pairs = [{"prompt": f"q{n}", "chosen": "good", "rejected": "bad"} for n in range(3)]
    done = prepared(write_rows(tmp_path / "rows.jsonl", pairs), tmp_path, objective="dpo", valid=0)
    assert [list(done.sequences_of(int(example))) for example in done.train] == [[0, 1], [2, 3], [4, 5]]
    assert trained_texts(done, done.train[:1]) == ["good<|im_end|>", "bad<|im_end|>"]


def test_plain_text_is_trained_whole_with_its_end(tmp_path: Path) -> None:
    done = prepared(
        write_rows(tmp_path / "rows.jsonl", [{"text": "plain words"}]), tmp_path, objective="pretrain", valid=0
    )
    assert trained_texts(done, done.train) == ["plain words<|im_end|>"]
    assert done.trained_of(0).all()


def test_several_processes_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [chat(f"q {n} " + "w " * (n % 90), f"a {n}") for n in range(3000)])
    one = prepared(rows, tmp_path / "one")
    monkeypatch.setattr(parallel, "PARALLEL_BYTES", 0)
    two = prepared(rows, tmp_path / "two")
    for path in sorted(one.folder.iterdir()):
        assert path.read_bytes() == (two.folder / path.name).read_bytes(), path.name


def test_a_shape_that_proves_wrong_starts_over_without_learning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that treats contents of one length specially: the join differs, and every row is rendered in full."""
    shape = next(shape for shape in list_shapes() if shape.name == "chatml")
    model = shape.write_model(tmp_path / "model")
    template = (model / "chat_template.jinja").read_text()
    loud = "(turn.content | upper if turn.content | length == 11 else turn.content)"
    trap = template.replace("turn.content", loud)
    assert trap != template
    (model / "chat_template.jinja").write_text(trap)
    rows = write_rows(tmp_path / "rows.jsonl", [chat(f"magic {n}", "magic three") for n in range(10)])
    done = prepared(rows, tmp_path, model=model, valid=0)
    assert done.summary["learnt_shapes"] is False
    assert trained_texts(done, done.train)[0] == "MAGIC THREE<|im_end|>"


def test_learning_never_changes_a_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hard = [
        chat(text, answer)
        for text in ("plain", " edge", "a < b", "{x}", "\n")
        for answer in ("ok", " ok ", "<i>", "[1]")
    ]
    rows = write_rows(tmp_path / "rows.jsonl", [*hard, *(chat(f"q{n}") for n in range(200))])
    joined = prepared(rows, tmp_path / "joined", valid=0, max_rejected_share=1.0)

    def find_in_full(self: ShapeLearner, messages: Any, tools: Any = None) -> Rendering:
        return self._finder.find(messages, tools)

    monkeypatch.setattr(ShapeLearner, "find", find_in_full)
    full = prepared(rows, tmp_path / "full", valid=0, max_rejected_share=1.0)
    for name in ("tokens.u32", "ranges.u32", "offsets.u64", "ledger.jsonl"):
        assert (joined.folder / name).read_bytes() == (full.folder / name).read_bytes(), name


def test_lengths_are_those_of_the_sequences(tmp_path: Path) -> None:
    done = prepared(write_rows(tmp_path / "rows.jsonl", [chat("a"), chat("b b b b")]), tmp_path, valid=0)
    assert done.lengths.tolist() == [len(done.tokens_of(0)), len(done.tokens_of(1))]
    assert np.all(done.lengths > 0)
