"""Read rows from files, folders, standard input and the hub, in blocks, so that memory does not grow with the file.

Rows of JSON and JSONL are raw bytes, those of other formats are parsed; each has its line. Blank lines are not rows.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import orjson

from luthier.data.json_elements import read_elements
from luthier.data.parse import MAX_LINE_BYTES
from luthier.data.reasons import RowError
from luthier.errors import CallError, DataError, MissingPathError
from luthier.extras import import_extra
from luthier.machine import expand

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
PACKED = (".gz", ".zst")
BLOCK_BYTES = 1 << 20
_BLOCK_ROWS = 2048
_HF = re.compile(r"hf:(?P<name>[^:]+)(?::(?P<config>[^:]+))?(?::(?P<split>[^:]+))?")

Row = bytes | dict[str, Any] | RowError


@dataclass(frozen=True)
class Block:
    """Neighbouring rows of one file, each with its line (or row number, in parquet)."""

    file: int
    lines: list[int]
    rows: list[Row]
    read_bytes: int


@dataclass(frozen=True)
class Source:
    """Where rows come from: named files in a fixed order. `names` are what ledgers and errors call them."""

    paths: tuple[Path, ...]
    names: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes on disk, for progress."""
        return sum(path.stat().st_size for path in self.paths)

    def stamps(self) -> list[tuple[int, int]]:
        """Size and time of change of each file, to see that nobody wrote to one while it was read."""
        return [(found.st_size, found.st_mtime_ns) for found in (path.stat() for path in self.paths)]

    def content_hash(self) -> str:
        """SHA-256 over the names and bytes of all files."""
        whole = hashlib.sha256()
        for path, name in zip(self.paths, self.names, strict=True):
            whole.update(f"{name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        return whole.hexdigest()

    def blocks(self, *, limit: int | None = None) -> Iterator[Block]:
        """All rows in order, the first `limit` of them if one is given."""
        left = limit
        for number, path in enumerate(self.paths):
            for block in _read_file(path, number):
                if left is not None and len(block.rows) >= left:
                    yield Block(number, block.lines[:left], block.rows[:left], block.read_bytes)
                    return
                left = None if left is None else left - len(block.rows)
                yield block


@contextmanager
def open_source(text: str, *, split: str | None = None) -> Iterator[Source]:
    """The source a person named: a file, a folder, `-` or `hf:org/name[:config]:split`.

    What has no file of its own (standard input, the hub) is first written to one, so that it can be read twice.
    """
    if text == "-":
        with _spooled(lambda file: shutil.copyfileobj(sys.stdin.buffer, file)) as path:
            yield Source((path,), ("stdin",))
    elif text.startswith("hf:"):
        rows = _hub_rows(text, split)
        with _spooled(lambda file: _write_rows(rows, file)) as path:
            yield Source((path,), (text,))
    else:
        yield _local_source(expand(text))


def _local_source(path: Path) -> Source:
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and _is_data(p))
        if not found:
            raise DataError(
                f"{path}: no data files in this folder",
                hint=f"looked for {', '.join(ENDINGS)}, also .gz and .zst",
            )
        return Source(tuple(found), tuple(p.relative_to(path).as_posix() for p in found))
    if not path.is_file():
        raise MissingPathError(
            f"no data at {path}", hint="give a file, a folder, `-` or `hf:org/name:split`", where=str(path)
        )
    if _ending(path) not in ENDINGS:
        raise DataError(
            f"{path}: unknown kind of file `{path.suffix}`",
            hint=f"known: {', '.join(ENDINGS)}, also .gz and .zst",
        )
    return Source((path,), (path.name,))


def _is_data(path: Path) -> bool:
    """Data files of a folder: not hidden ones, nor the bad rows of an earlier conversion."""
    return _ending(path) in ENDINGS and not path.name.startswith(".") and not path.name.endswith(".rejected.jsonl")


def _ending(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextmanager
def _spooled(write: Callable[[IO[bytes]], object]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="luthier-") as folder:
        path = Path(folder) / "rows.jsonl"
        with path.open("wb") as file:
            write(file)
        yield path


def _write_rows(rows: Iterator[dict[str, Any]], file: IO[bytes]) -> None:
    for row in rows:
        file.write(orjson.dumps(_without_nulls(row), default=str, option=orjson.OPT_APPEND_NEWLINE))


def _hub_rows(text: str, split: str | None) -> Iterator[dict[str, Any]]:
    """Rows of a hub dataset, a folder of data files or one saved by `save_to_disk`, streamed."""
    match = _HF.fullmatch(text)
    if not match:
        raise CallError(f"{text!r}: expected hf:org/name[:config]:split")
    name, config, named = match["name"], match["config"], match["split"]
    if named is None and config is not None and split is None:
        config, named = None, config
    datasets = import_extra("datasets", "hf")
    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)
            data = loaded[named or split or "train"] if isinstance(loaded, dict) else loaded
        else:
            data = datasets.load_dataset(name, config, split=named or split or "train", streaming=True)
    except (ValueError, KeyError, OSError) as error:
        raise DataError(
            f"{text}: cannot be loaded: {_first_line(error)}", hint="check name, config and split"
        ) from None
    return iter(data)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def open_unpacked(path: Path) -> Iterator[IO[bytes]]:
    suffix = path.suffix.lower()
    broken: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    try:
        if suffix == ".gz":
            with gzip.open(path, "rb") as unpacked:
                yield cast(IO[bytes], unpacked)
        elif suffix == ".zst":
            zstandard = import_extra("zstandard", "zstd")
            broken += (zstandard.ZstdError,)
            with path.open("rb") as raw:
                yield cast(IO[bytes], io.BufferedReader(_ZstdFile(raw, zstandard.ZstdDecompressor()), BLOCK_BYTES))
        else:
            with path.open("rb") as plain:
                yield plain
    except broken as error:
        raise DataError(f"{path.name}: a broken archive: {error}") from None
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read: {error.strerror or error}", where=str(path)) from None


class _ZstdFile(io.RawIOBase):
    """Frames one after the other; a last frame cut off is an EOFError, where the package's own reader just ends."""

    def __init__(self, packed: IO[bytes], decompressor: Any) -> None:
        self._packed = packed
        self._decompressor = decompressor
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            is_between = self._frame is None or self._frame.eof
            data = (self._frame.unused_data if self._frame and is_between else b"") or self._packed.read(1 << 14)
            if not data and is_between:
                return 0
            if not data:
                raise EOFError("it ends in the middle of a frame")
            if is_between:
                self._frame = self._decompressor.decompressobj()
            self._ready = self._frame.decompress(data)
        taken = self._ready[: len(buffer)]
        self._ready = self._ready[len(taken) :]
        buffer[: len(taken)] = taken
        return len(taken)


def _read_file(path: Path, number: int) -> Iterator[Block]:
    ending = _ending(path)
    if ending == ".parquet" and path.suffix.lower() in PACKED:
        with open_unpacked(path) as file, _spooled(partial(shutil.copyfileobj, file)) as plain:
            yield from _blocks_of(_parquet_rows(plain, path.name), number)
        return
    if ending == ".parquet":
        yield from _blocks_of(_parquet_rows(path, path.name), number)
        return
    with open_unpacked(path) as file:
        if ending == ".csv":
            yield from _blocks_of(_csv_rows(file, path.name), number)
        elif ending == ".json":
            yield from _blocks_of(read_elements(file, path.name), number)
        else:
            yield from _line_blocks(file, number)


def _line_blocks(file: IO[bytes], number: int) -> Iterator[Block]:
    """Lines, read by the block; of a line longer than any row may be only the length is kept."""
    line, rest, passed_bytes, read_bytes = 1, b"", 0, 0
    is_open = True
    while is_open:
        data = file.read(BLOCK_BYTES)
        is_open = bool(data)
        rows: list[Row] = [*(rest + data).split(b"\n")]
        rest = cast(bytes, rows.pop()) if is_open else b""
        if rows and passed_bytes:
            size = passed_bytes + len(cast(bytes, rows[0]))
            rows[0] = RowError("line_too_long", f"a line of {size:,} bytes; the most is {MAX_LINE_BYTES:,}")
            passed_bytes = 0
        if len(rest) > MAX_LINE_BYTES:
            passed_bytes += len(rest)
            rest = b""
        read_bytes += len(data)
        kept = {line + index: row for index, row in enumerate(rows) if not _is_blank(row)}
        if kept:
            yield Block(number, list(kept), list(kept.values()), read_bytes)
            read_bytes = 0
        line += len(rows)


def _is_blank(row: Row) -> bool:
    return isinstance(row, bytes) and (not row or row.isspace())


def _blocks_of(rows: Iterator[tuple[int, Row]], number: int) -> Iterator[Block]:
    """Rows in blocks of at most so many, and of about so many bytes: one row may be as large as a thousand others."""
    lines: list[int] = []
    kept: list[Row] = []
    size = 0
    for line, row in rows:
        lines.append(line)
        kept.append(row)
        size += _row_bytes(row)
        if len(kept) == _BLOCK_ROWS or size >= BLOCK_BYTES:
            yield Block(number, lines, kept, size)
            lines, kept, size = [], [], 0
    if kept:
        yield Block(number, lines, kept, size)


def _row_bytes(row: Row) -> int:
    if isinstance(row, bytes):
        return len(row)
    return sum(len(str(value)) for value in row.values()) if isinstance(row, dict) else 0


def _csv_rows(file: IO[bytes], name: str) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(MAX_LINE_BYTES)
    with io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        try:
            header = next(filter(None, reader), None)
            if header is None:
                return
            if len(set(header)) != len(header):
                raise DataError(f"{name}:{reader.line_num}: a column name stands twice in the header")
            line = reader.line_num + 1
            for row in reader:
                if len(row) == len(header):
                    yield line, dict(zip(header, row, strict=True))
                elif row:
                    told = f"{len(row)} columns; the header has {len(header)}"
                    yield line, RowError("wrong_columns", told, row=orjson.dumps(row).decode())
                line = reader.line_num + 1
        except UnicodeDecodeError as error:
            raise DataError(f"{name}: not UTF-8 text after line {reader.line_num}: {error.reason}") from None
        except csv.Error as error:
            raise DataError(f"{name}:{reader.line_num}: not valid CSV: {error}") from None


def _parquet_rows(path: Path, name: str) -> Iterator[tuple[int, Row]]:
    parquet = import_extra("pyarrow.parquet", "parquet")
    pyarrow = import_extra("pyarrow", "parquet")
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for found in batch.to_pylist():
                    row += 1
                    yield row, _without_nulls(found)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{name}: not a parquet file, or a broken one: {_first_line(error)}") from None


def _without_nulls(value: Any) -> Any:
    """Parquet gives every row every key; a null there is a key that the row does not have."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
