"""Write rows to files: converted to another format, or parted into train and valid as the ledger says."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import orjson

from luthier.data.formats import FORMATS, Format, chat, preference, text
from luthier.data.judging import Judging, Tally, judge_row
from luthier.data.prepare import Progress
from luthier.data.prepared import Prepared
from luthier.data.reasons import RowError
from luthier.data.rows import RowReader, describe_rejected
from luthier.data.source import Row, Source
from luthier.errors import CallError, LedgerError, LuthierError, StorageError

_CANONICAL: dict[str, Any] = {"conversation": chat, "preference": preference, "text": text}


@dataclass
class Written:
    """What a conversion did with the rows."""

    rows: int = 0
    written: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    rejected: list[dict[str, Any]] = field(default_factory=list)


def convert_rows(
    source: Source, reader: RowReader, to: str, out: Path, *, limit: int | None = None, progress: Progress | None = None
) -> Written:
    """Write at most `limit` good rows to `out` in the format `to` (`canonical`: the format of its kind)."""

    def convert(row: Row, _: str) -> list[dict[str, Any]]:
        example = reader.example(row)
        target: Format = _CANONICAL[example.kind] if to == "canonical" else FORMATS[to]
        return [target.write(example)]

    return write_rows(source, convert, out, limit=limit, progress=progress)


def judge_rows(
    source: Source, judging: Judging, out: Path, *, limit: int | None = None, progress: Progress | None = None
) -> tuple[Written, Tally]:
    """Write the answers of every good row to `out` as conversations of a judge; `limit` rows at most."""
    tally = Tally()
    done = write_rows(
        source, lambda row, place: judge_row(row, place, judging, tally), out, limit=limit, progress=progress
    )
    return done, tally


def write_rows(
    source: Source,
    make: Callable[[Row, str], list[dict[str, Any]]],
    out: Path,
    *,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write what `make` makes of each row and its place; it raises RowError for a bad one.

    Bad rows go to `<out>.rejected.jsonl`, which exists only if there are any.
    """
    _check_output(source, out)
    done = Written()
    seen_bytes = 0
    with _replacing(out) as file, _rejects(out) as refuse:
        for block in source.blocks():
            seen_bytes += block.read_bytes
            if progress:
                progress(done.rows, seen_bytes, source.size_bytes)
            name = source.names[block.file]
            for line, row in zip(block.lines, block.rows, strict=True):
                done.rows += 1
                try:
                    for each in make(row, f"{name}:{line}"):
                        file.write(orjson.dumps(each, option=orjson.OPT_APPEND_NEWLINE))
                    done.written += 1
                except RowError as error:
                    done.reasons[error.reason] = done.reasons.get(error.reason, 0) + 1
                    entry = describe_rejected(name, line, row, error)
                    done.rejected.append({key: entry[key] for key in ("file", "line", "reason", "message")})
                    refuse(entry)
                if done.written == limit:
                    return done
    return done


def part_rows(
    source: Source, prepared: Prepared, train_out: Path, valid_out: Path, *, limit: int | None = None
) -> None:
    """Copy the source's rows into two files by their places in the ledger, unchanged and in their order.

    `limit` is that of the preparation: the first rows of the source, which are all that the ledger knows.
    """
    if train_out == valid_out:
        raise CallError("the two outputs are the same file", hint="give --train-out and --valid-out different names")
    for out in (train_out, valid_out):
        _check_output(source, out)
    with (
        _replacing(train_out) as train,
        _replacing(valid_out) as valid,
        (prepared.folder / "ledger.jsonl").open("rb") as ledger,
    ):
        outputs: dict[str, IO[bytes] | None] = {"train": train, "valid": valid, "dropped": None}
        rows = 0
        for block in source.blocks(limit=limit):
            for row in block.rows:
                output = outputs[orjson.loads(ledger.readline())["place"]]
                rows += 1
                if output is not None:
                    output.write(_as_line(row))
        if rows != prepared.summary["rows"]:
            raise LedgerError(f"{rows} rows were parted, and the ledger has {prepared.summary['rows']}")


def _check_output(source: Source, out: Path) -> None:
    """Rows are written as JSONL, and never over what they are read from."""
    if str(out) != "-" and out.suffix not in (".jsonl", ".ndjson"):
        raise CallError(f"{out}: rows are written as JSONL", hint="give the output the ending .jsonl")
    if any(out.resolve() == path.resolve() for path in source.paths):
        raise CallError(f"{out} is the file that the rows come from", hint="give the output another name")


def _as_line(row: Row) -> bytes:
    if isinstance(row, bytes):
        # An object spread over lines, as in a JSON array, is written on one.
        return (
            orjson.dumps(orjson.loads(row), option=orjson.OPT_APPEND_NEWLINE) if b"\n" in row else row.strip() + b"\n"
        )
    return orjson.dumps(row, default=str, option=orjson.OPT_APPEND_NEWLINE)


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its place only when it is whole; `-` is standard output."""
    if str(path) == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    draft = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        if isinstance(error, LuthierError):
            raise
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _rejects(out: Path) -> Iterator[Any]:
    """A function that keeps bad rows in `<out>.rejected.jsonl`; the file is made with the first of them."""
    path = out.with_name(f"{out.name}.rejected.jsonl")
    opened: list[IO[bytes]] = []

    def refuse(entry: dict[str, Any]) -> None:
        if str(out) == "-":
            return
        if not opened:
            opened.append(path.open("wb"))
        opened[0].write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))

    path.unlink(missing_ok=True)
    try:
        yield refuse
    finally:
        for file in opened:
            file.close()


def write_text(path: Path, content: str) -> None:
    """A text file, whole or not at all."""
    with _replacing(path) as file:
        file.write(content.encode())
