"""Rows come out of every kind of file whole, in order, with their lines, whatever the size of a block."""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import sys
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from luthier.data import json_elements, source
from luthier.data.json_elements import read_elements
from luthier.data.reasons import RowError
from luthier.data.rows import ReadOptions, RowReader
from luthier.data.source import Row, open_source
from luthier.errors import CallError, DataError, MissingPathError
from luthier.spec.data import Data
from tests.builders import texts, write_jsonl

ROWS = [{"text": f"row {number} \u00e9\u4f60"} for number in range(1, 8)]
LINES = b"".join(orjson.dumps(row) + b"\n" for row in ROWS)
sizes = st.integers(1, 40)


def read(name: Path | str, *, split: str | None = None, limit: int | None = None) -> list[tuple[int, Row]]:
    """Every row of a source with its line."""
    with open_source(str(name), split=split) as opened:
        return [pair for block in opened.blocks(limit=limit) for pair in zip(block.lines, block.rows, strict=True)]


def parsed(rows: list[tuple[int, Row]]) -> list[Any]:
    """The rows as objects."""
    return [orjson.loads(row) if isinstance(row, bytes) else row for _, row in rows]


def blocks_of(size: int, line_bytes: int = source.MAX_LINE_BYTES) -> pytest.MonkeyPatch:
    """Blocks of that many bytes, lines of at most so many, until undone."""
    patch = pytest.MonkeyPatch()
    patch.setattr(source, "BLOCK_BYTES", size)
    patch.setattr(json_elements, "_BLOCK_BYTES", size)
    patch.setattr(source, "MAX_LINE_BYTES", line_bytes)
    return patch


# -- lines


@given(
    rows=st.lists(st.dictionaries(texts, texts, max_size=2), max_size=12),
    size=sizes,
    end=st.sampled_from([b"\n", b"\r\n"]),
)
def test_rows_read_are_the_rows_written(
    rows: list[dict[str, str]], size: int, end: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes(end.join(map(orjson.dumps, rows)))
    patch = blocks_of(size)
    found = read(path)
    patch.undo()
    assert parsed(found) == rows
    assert [line for line, _ in found] == list(range(1, len(rows) + 1))


@given(
    lines=st.lists(
        st.sampled_from([b"", b"  ", b"\t\r", b"{}", b"x" * 30, b"y" * 50, b"z" * 51, b"w" * 200]), max_size=10
    ),
    size=sizes,
    is_ended=st.booleans(),
)
def test_long_lines_are_reported_once_and_the_rest_is_read(lines: list[bytes], size: int, is_ended: bool) -> None:
    patch = blocks_of(size, line_bytes=50)
    file = io.BytesIO(b"\n".join(lines) + (b"\n" if is_ended else b""))
    found = [pair for block in source._line_blocks(file, 0) for pair in zip(block.lines, block.rows, strict=True)]
    patch.undo()
    expected = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    assert [number for number, _ in found] == [number for number, _ in expected]
    for (_, row), (_, line) in zip(found, expected, strict=True):
        if isinstance(row, RowError):
            assert row.reason == "line_too_long"
            assert f"a line of {len(line)} bytes" in row.message
            assert len(line) > 50
        else:
            assert row == line


def test_a_line_of_many_blocks_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text":"a"}\n')
        for _ in range(40):
            file.write(b"x" * (1 << 20))
        file.write(b'\n{"text":"b"}\n')
    tracemalloc.start()
    reader = RowReader(ReadOptions(Data()), ("rows.jsonl",))
    with open_source(str(path)) as opened:
        batches = [reader.read(block) for block in opened.blocks()]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [line for batch in batches for line in batch.lines] == [1, 2, 3]
    (entry,) = [entry for batch in batches for entry in batch.rejected]
    assert (entry["line"], entry["reason"]) == (2, "line_too_long")
    assert f"{40 << 20:,} bytes" in entry["message"]
    assert peak < 36 << 20


def test_blank_lines_are_no_rows_and_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\n\n{"a":1}\n \t\r\n\n{"a":2}\n\n\n{"a":3}')
    assert [line for line, _ in read(path)] == [3, 6, 9]


@pytest.mark.parametrize("content", [b"", b"\n", b"\n\r\n\n"])
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv"])
def test_an_empty_file_has_no_rows(tmp_path: Path, content: bytes, ending: str) -> None:
    path = tmp_path / f"rows{ending}"
    path.write_bytes(content)
    assert read(path) == []


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"a": "x\u2028y\u0085z\u000b"}, {"a": "b"}])
    assert [line for line, _ in read(path)] == [1, 2]


@pytest.mark.parametrize("limit", range(1, 9))
def test_limit_takes_the_first_rows(tmp_path: Path, limit: int) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(b"\n".join(map(orjson.dumps, ROWS[:4])))
    patch = blocks_of(30)
    assert parsed(read(tmp_path, limit=limit)) == (ROWS[:4] * 2)[:limit]
    patch.undo()


# -- JSON arrays


def _compact(rows: list[Any]) -> bytes:
    return orjson.dumps(rows)


def _pretty(rows: list[Any]) -> bytes:
    return json.dumps(rows, indent=2, ensure_ascii=False).encode()


def _one_after_the_other(rows: list[Any]) -> bytes:
    return b"\n".join(orjson.dumps(row, option=orjson.OPT_INDENT_2) for row in rows)


tricky = st.dictionaries(texts, texts | st.sampled_from(['"', "\\", '\\"', "]", "}", "[{", "\n", '",']), max_size=3)


@pytest.mark.parametrize("write", [_compact, _pretty, _one_after_the_other])
@given(rows=st.lists(tricky, max_size=6), size=sizes)
def test_json_is_read_whatever_the_block(write: Callable[[list[Any]], bytes], rows: list[Any], size: int) -> None:
    text = write(rows)
    patch = blocks_of(size)
    found = list(read_elements(io.BytesIO(text), "rows.json"))
    patch.undo()
    assert [orjson.loads(row) for _, row in found] == rows
    lines = text.split(b"\n")
    assert all(row.split(b"\n")[0] in lines[line - 1] for line, row in found)


def test_json_rows_have_the_line_they_start_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b'[\n {"a":\n  1},\n\n {"a": 2}, {"a": 3}\n]\n')
    assert [line for line, _ in read(path)] == [2, 5, 5]


@pytest.mark.parametrize("text", [b'[{"a":1},', b'[{"a":1}', b'{"a":[1,2}', b'[{"a":"b}]'])
def test_json_cut_off_is_an_error(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "rows.json").write_bytes(text)
    with pytest.raises(DataError, match=r"rows\.json:1: not valid JSON: what starts here never ends"):
        read(tmp_path / "rows.json")


@pytest.mark.parametrize("text", [b'[{"a":1}, oops, {"a":2}]', b'{"a":1}\noops\n{"a":2}', b'[{"a":1} oops, {"a":2}]'])
def test_json_junk_between_rows_is_a_row_of_its_own(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "rows.json").write_bytes(text)
    assert [row for _, row in read(tmp_path / "rows.json")] == [b'{"a":1}', b"oops", b'{"a":2}']


def test_json_bracket_never_closed_stops_before_the_file_is_in_memory() -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(json_elements, "MAX_LINE_BYTES", 1000)
    patch.setattr(json_elements, "_BLOCK_BYTES", 100)
    file = io.BytesIO(b'[\n{"a":' + b"[1]," * 10_000)
    with pytest.raises(DataError, match=r"rows\.json:2: a row of more than 1,000 bytes, or a bracket never closed"):
        list(read_elements(file, "rows.json"))
    patch.undo()
    assert file.tell() < 1300


# -- CSV


@given(rows=st.lists(st.tuples(texts, st.text(st.sampled_from('a,"\n\r \u00e9'), max_size=6)), max_size=6), size=sizes)
def test_csv_read_is_the_csv_written(
    rows: list[tuple[str, str]], size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "completion"), *rows])
    patch = blocks_of(size)
    found = [row for _, row in read(path)]
    patch.undo()
    assert found == [{"prompt": prompt, "completion": answer} for prompt, answer in rows]


def test_csv_rows_have_the_line_they_start_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\xef\xbb\xbfa,b\r\n"x\r\ny",1\r\n\r\nz,2\r\nshort\r\n"p","q\nr",3\r\nlast,4')
    found = read(path)
    assert [line for line, _ in found] == [2, 5, 6, 7, 9]
    assert [row if isinstance(row, dict) else str(row) for _, row in found] == [
        {"a": "x\r\ny", "b": "1"},
        {"a": "z", "b": "2"},
        "1 columns; the header has 2",
        "3 columns; the header has 2",
        {"a": "last", "b": "4"},
    ]


def test_csv_row_of_wrong_columns_is_kept_among_the_rejected(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'prompt,completion\n"a, b",c,"d\ne"\n')
    with open_source(str(path)) as opened:
        blocks = pickle.loads(pickle.dumps(list(opened.blocks())))
        (entry,) = RowReader(ReadOptions(Data()), opened.names).read(blocks[0]).rejected
    assert (entry["file"], entry["line"], entry["reason"]) == ("rows.csv", 2, "wrong_columns")
    assert orjson.loads(entry["row"]) == ["a, b", "c", "d\ne"]


def test_csv_blank_lines_before_the_header_are_no_header(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"\n\ntext\n\na\n")
    assert read(tmp_path / "rows.csv") == [(5, {"text": "a"})]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a,a\n1,2", r"rows\.csv:1: a column name stands twice"),
        (b'a,b\n"1,2', r"rows\.csv:2: not valid CSV: unexpected end of data"),
        (b'a,b\n"1"x,2', r"rows\.csv:2: not valid CSV"),
        (b"a,b\n\xff,2", r"rows\.csv: not UTF-8 text"),
    ],
)
def test_csv_that_cannot_be_read(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(DataError, match=words):
        read(tmp_path / "rows.csv")


# -- parquet


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A parquet file of these rows."""
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_parquet_rows_are_numbered_and_nulls_are_absent_keys(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": '{"x":null}'}}
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}]},
        {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c", "tool_calls": None}]},
    ]
    found = read(write_parquet(tmp_path / "rows.parquet", rows))
    assert [line for line, _ in found] == [1, 2]
    reader = RowReader(ReadOptions(Data()), ("rows.parquet",))
    examples = [reader.example(row) for _, row in found]
    assert examples[0].messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": None}}  # type: ignore[union-attr]
    assert examples[1].messages == [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]  # type: ignore[union-attr]


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"x" * len(b), lambda b: b[:8] + b"\0" * 30 + b[38:]])
def test_parquet_that_is_broken(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = write_parquet(tmp_path / "rows.parquet", ROWS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"rows\.parquet: not a parquet file, or a broken one"):
        read(path)


# -- packed files

PACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".json", ".csv", ".parquet"])
def test_each_kind_of_file_may_be_packed(tmp_path: Path, ending: str, packed: str) -> None:
    if ending == ".parquet":
        plain = write_parquet(tmp_path / "plain.parquet", ROWS).read_bytes()
    elif ending == ".csv":
        plain = b"text\n" + b"".join(row["text"].encode() + b"\n" for row in ROWS)
    else:
        plain = orjson.dumps(ROWS) if ending == ".json" else LINES
    path = tmp_path / f"rows{ending}{packed}"
    path.write_bytes(PACK[packed](plain))
    assert parsed(read(path)) == ROWS


@pytest.mark.parametrize("packed", PACK)
@given(parts=st.lists(st.integers(0, len(LINES)), max_size=3), size=sizes)
def test_packed_files_joined_end_to_end_are_one(
    packed: str, parts: list[int], size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cuts = [0, *sorted(parts), len(LINES)]
    path = tmp_path_factory.mktemp("rows") / f"rows.jsonl{packed}"
    path.write_bytes(b"".join(PACK[packed](LINES[start:stop]) for start, stop in pairwise(cuts)))
    patch = blocks_of(size)
    assert parsed(read(path)) == ROWS
    patch.undo()


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-6], lambda b: b[: len(b) // 2], lambda b: b"{}" + b, lambda b: b[:20] + b"\xff" * 9 + b[29:]],
)
def test_a_broken_archive_is_an_error_and_no_short_file(
    tmp_path: Path, packed: str, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"rows.jsonl{packed}"
    path.write_bytes(damage(PACK[packed](LINES * 40)))
    with pytest.raises(DataError, match="a broken archive"):
        read(path)


# -- places


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.jsonl").write_bytes(orjson.dumps(ROWS[2]))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(orjson.dumps([ROWS[1]])))
    (tmp_path / "a.CSV").write_bytes(b"text\n" + ROWS[0]["text"].encode())
    (tmp_path / "readme.md").write_text("not data")
    assert parsed(read(tmp_path)) == ROWS[:3]
    with open_source(str(tmp_path)) as opened:
        assert opened.names == ("a.CSV", "b.json.gz", "sub/c.jsonl")
        assert [block.file for block in opened.blocks()] == [0, 1, 2]
        assert opened.size_bytes == sum(path.stat().st_size for path in opened.paths)


def test_standard_input_can_be_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LINES)))
    with open_source("-") as opened:
        assert opened.names == ("stdin",)
        twice = [[row for block in opened.blocks() for row in block.rows] for _ in range(2)]
        (path,) = opened.paths
    assert twice[0] == twice[1] == LINES.splitlines()
    assert not path.exists()


@pytest.mark.parametrize("name", ["rows.jsonl", "~nobody-of-this-name/rows.jsonl", "a\0b.jsonl"])
def test_what_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(MissingPathError, match="no data at") as caught:
        read(tmp_path / name if not name.startswith("~") else name)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["rows.txt", "rows", "rows.gz", "rows.jsonl.bz2", "rows.xlsx"])
def test_what_is_no_data(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(LINES)
    with pytest.raises(DataError, match="unknown kind of file"):
        read(tmp_path / name)


def test_a_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data files in this folder"):
        read(tmp_path / "empty")


def test_home_is_expanded(own_home: Path) -> None:
    write_jsonl(own_home / "rows.jsonl", ROWS)
    assert parsed(read("~/rows.jsonl")) == ROWS


def test_the_hash_of_a_source_follows_names_and_bytes(tmp_path: Path) -> None:
    def hash_of(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        with open_source(str(tmp_path / name)) as opened:
            return opened.content_hash()

    one = hash_of("a.jsonl", LINES)
    assert hash_of("a.jsonl", LINES) == one
    assert hash_of("a.jsonl", LINES + b" ") != one
    assert hash_of("b.jsonl", LINES) != one


# -- the hub's library, on folders


@pytest.fixture(scope="module")
def datasets() -> Any:
    return pytest.importorskip("datasets")


@pytest.fixture
def plain_caches(datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library chose its folders when it was imported: give it some of this test's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.mark.usefixtures("plain_caches")
def test_hf_folder_of_data_files(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS[:5])
    write_jsonl(folder / "test.jsonl", ROWS[5:])
    assert parsed(read(f"hf:{folder}")) == ROWS[:5]
    assert parsed(read(f"hf:{folder}:train")) == ROWS[:5]
    assert parsed(read(f"hf:{folder}:test")) == ROWS[5:]
    assert parsed(read(f"hf:{folder}", split="test")) == ROWS[5:]
    assert parsed(read(f"hf:{folder}:train", limit=2)) == ROWS[:2]


@pytest.mark.usefixtures("plain_caches")
def test_hf_folder_saved_to_disk(datasets: Any, tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    parts = {"train": datasets.Dataset.from_list(ROWS[:5]), "test": datasets.Dataset.from_list(ROWS[5:])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "parts")
    assert parsed(read(f"hf:{tmp_path / 'one'}")) == ROWS
    assert parsed(read(f"hf:{tmp_path / 'parts'}")) == ROWS[:5]
    assert parsed(read(f"hf:{tmp_path / 'parts'}", split="test")) == ROWS[5:]
    assert parsed(read(f"hf:{tmp_path / 'parts'}:test")) == ROWS[5:]


@pytest.mark.usefixtures("plain_caches")
def test_hf_nulls_are_absent_keys_as_in_parquet(datasets: Any, tmp_path: Path) -> None:
    mixed = [{"text": "a", "chosen": None}, {"text": None, "chosen": "b"}]
    datasets.Dataset.from_list(mixed).save_to_disk(tmp_path / "one")
    assert parsed(read(f"hf:{tmp_path / 'one'}")) == [{"text": "a"}, {"chosen": "b"}]


@pytest.mark.usefixtures("plain_caches")
@pytest.mark.parametrize("name", ["no/such/folder", "parts:valid"])
def test_hf_that_cannot_be_loaded(datasets: Any, tmp_path: Path, name: str) -> None:
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "parts")
    with pytest.raises(DataError, match="cannot be loaded"):
        read(f"hf:{tmp_path}/{name}")


@pytest.mark.parametrize("name", ["hf:", "hf:a:b:c:d", "hf::train"])
def test_hf_that_is_not_well_named(name: str) -> None:
    with pytest.raises(CallError, match=r"expected hf:org/name\[:config\]:split"):
        read(name)
