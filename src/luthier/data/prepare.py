"""Prepare a run's data: every row read, checked, rendered, tokenised, split and accounted for, once.

The result is a folder of the token cache. A second run with the same rows, template, tokenizer and settings finds it;
anything that could change a token gives another folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import orjson
import tokenizers

from luthier.data import ledger
from luthier.data.cache import build_once, cache_key, code_version, write_array
from luthier.data.hashes import Hashes
from luthier.data.ledger import DROPPED, TRAIN, VALID, RowTable
from luthier.data.notes import END_CUT
from luthier.data.parallel import read_blocks
from luthier.data.prepared import Prepared
from luthier.data.reasons import list_counts
from luthier.data.rows import NOTE_BITS, ReadOptions, RowBatch, Stop
from luthier.data.shapes import ShapeBroken
from luthier.data.source import Block, Source, open_source
from luthier.data.split import choose_valid
from luthier.data.tokens import FastTokenizerDiffers, ModelText
from luthier.errors import CallError, DataError, MaskError, RejectedRowsError

Progress = Callable[[int, int, int], None]
"""Called with rows read, bytes read and bytes in all."""

_SHOWN_ROWS = 5
_SHOWN_LEAKS = 10


def prepare(
    options: ReadOptions,
    *,
    seed: int,
    home: Path,
    split: str | None = None,
    progress: Progress | None = None,
    opened: Source | None = None,
) -> Prepared:
    """The prepared data of these options; raises DataError and its kin where the data does not hold.

    `opened` is the training source where the caller has it open already: standard input can be read only once.
    """
    if options.data.train is None:
        raise DataError(
            "no data to prepare: `data.train` is not set",
            hint="give --data FILE, or set data.train in the spec",
        )
    with ExitStack() as stack:
        if options.data.train == options.data.valid == "-":
            raise CallError("standard input cannot be both the training and the held-out rows")
        sources = [opened or stack.enter_context(open_source(options.data.train, split=split))]
        if isinstance(options.data.valid, str):
            sources.append(stack.enter_context(open_source(options.data.valid, split=split)))
        stamps = [source.stamps() for source in sources]
        folder = home / "tokens" / cache_key(_facts(options, sources, seed))
        was_built = False

        def build(draft: Path) -> None:
            nonlocal was_built
            was_built = True
            _build(draft, options, sources, seed, progress)
            if [source.stamps() for source in sources] != stamps:
                raise DataError("a data file changed while it was read", hint="run again when nobody writes to it")

        build_once(folder, build)
    done = Prepared(folder, was_cached=not was_built)
    _check_share(done.summary, options.data.max_rejected_share)
    return done


def _facts(options: ReadOptions, sources: list[Source], seed: int) -> dict[str, Any]:
    """All that decides the tokens."""
    data = options.data.model_dump(mode="json", exclude={"train", "max_rejected_share"})
    facts: dict[str, Any] = {"code": code_version(), "data": data, "objective": options.objective, "seed": seed}
    facts["rows"] = [source.content_hash() for source in sources]
    facts["names"] = _distinct_names(sources)
    if isinstance(options.data.valid, str):
        data["valid"] = "file"
    if options.model_folder is not None:
        text = ModelText(options.model_folder, chat_template=options.chat_template)
        facts |= {
            "tokenizer": text.hash,
            "template": text.template_hash,
            "tokenizers": tokenizers.__version__,
        }
    return facts


def _build(draft: Path, options: ReadOptions, sources: list[Source], seed: int, progress: Progress | None) -> None:
    """Fill a cache folder; where a shortcut proves wrong for these rows, start over without it."""
    try:
        _Builder(draft, options, sources, progress).build(seed)
    except ShapeBroken:
        _build(draft, replace(options, learn_shapes=False), sources, seed, progress)
    except FastTokenizerDiffers:
        _build(draft, replace(options, fast_tokenizer=False), sources, seed, progress)


class _Builder:
    """Reads all rows into the draft folder, then places them."""

    def __init__(self, draft: Path, options: ReadOptions, sources: list[Source], progress: Progress | None) -> None:
        self._draft = draft
        self._options = options
        self._sources = sources
        self._progress = progress
        self._names = _distinct_names(sources)
        self._table = RowTable()
        self._stops: list[tuple[int, Stop]] = []
        self._formats: dict[str, int] = {}
        self._sequence_counts: list[npt.NDArray[np.uint8]] = []
        self._lengths: list[npt.NDArray[np.uint32]] = []
        self._range_counts: list[npt.NDArray[np.uint32]] = []
        self._tokenizer = ""

    def build(self, seed: int) -> None:
        """Everything: rows, tokens, places, ledger, summary."""
        hashes = self._read_all()
        reasons = self._table.column("reasons")
        self._check_rows(reasons)
        places, leaked = self._place(reasons, seed)
        counts = ledger.count_places(places, reasons, self._table.rows_read)
        with (self._draft / "ledger.jsonl").open("wb") as file:
            file.writelines(ledger.ledger_lines(self._table, places, self._names, leaked))
        lengths = self._write_index(places)
        self._write_summary(counts, places, leaked, {"lengths": lengths, "hashes": hashes})

    # -- reading -----------------------------------------------------------------------------------------------

    def _read_all(self) -> dict[str, str]:
        token_hash, mask_hash = hashlib.sha256(), hashlib.sha256()
        total = sum(source.size_bytes for source in self._sources)
        seen = 0
        with ExitStack() as stack:
            tokens = stack.enter_context((self._draft / "tokens.u32").open("wb"))
            ranges = stack.enter_context((self._draft / "ranges.u32").open("wb"))
            rejected = stack.enter_context((self._draft / "rejected.jsonl").open("wb"))
            for batch in stack.enter_context(read_blocks(self._options, self._names, self._blocks(), total)):
                self._take(batch, tokens, ranges, rejected)
                token_hash.update(batch.ids.tobytes())
                mask_hash.update(batch.lengths.tobytes() + batch.ranges.tobytes())
                seen += batch.read_bytes
                if self._progress:
                    self._progress(self._table.rows_read, seen, total)
        return {"tokens": token_hash.hexdigest(), "mask": mask_hash.hexdigest()}

    def _blocks(self) -> Iterator[Block]:
        first = 0
        for number, source in enumerate(self._sources):
            limit = self._options.data.examples if number == 0 else None
            for block in source.blocks(limit=limit):
                yield replace(block, file=block.file + first)
            first += len(source.names)

    def _take(self, batch: RowBatch, tokens: IO[bytes], ranges: IO[bytes], rejected: IO[bytes]) -> None:
        self._table.add(batch)
        self._tokenizer = batch.tokenizer
        self._stops += [(batch.file, stop) for stop in batch.stops]
        for name, count in batch.formats.items():
            self._formats[name] = self._formats.get(name, 0) + count
        self._sequence_counts.append(batch.sequences_of_example)
        self._lengths.append(batch.lengths)
        self._range_counts.append(batch.ranges_of_sequence)
        tokens.write(batch.ids.tobytes())
        ranges.write(batch.ranges.tobytes())
        for entry in batch.rejected:
            rejected.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))

    # -- placing -----------------------------------------------------------------------------------------------

    def _check_rows(self, reasons: npt.NDArray[np.uint8]) -> None:
        """Stop for what no run may start with: nothing to read, masks that cannot be told, rows too long."""
        if not self._table.rows_read:
            raise DataError(f"{', '.join(self._names)}: no rows", hint="the file is empty or holds only blank lines")
        if self._stops:
            raise _mask_error(self._names, self._stops)
        if self._options.model_folder is None:
            return
        longest = self._table.column("longest")
        if self._options.data.too_long == "error" and (longest > self._options.data.max_length).any():
            raise self._too_long_error(longest)
        kept = self._options.data.too_long == "truncate"
        untrained = (reasons == 0) & (self._table.column("least_trained") == 0)
        if not kept and untrained.any():
            row = int(np.flatnonzero(untrained)[0])
            raise MaskError(
                f"{self._where(row)}: the example trains no token",
                hint="`luthier data show` colours what is trained",
            )

    def _too_long_error(self, longest: npt.NDArray[np.uint32]) -> DataError:
        limit = self._options.data.max_length
        rows = np.flatnonzero(longest > limit)
        shown = ", ".join(f"{self._where(int(row))} ({longest[row]:,} tokens)" for row in rows[:_SHOWN_ROWS])
        return DataError(
            f"{len(rows):,} rows are longer than data.max_length = {limit:,}: {shown}",
            hint='raise data.max_length, or set data.too_long to "drop", "truncate" or (plain text only) "split"',
        )

    def _where(self, row: int) -> str:
        return f"{self._names[self._table.column('files')[row]]}:{self._table.column('lines')[row]}"

    def _place(self, reasons: npt.NDArray[np.uint8], seed: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """Each row's place, reasons filled in for what is dropped here; and which held-out prompts are trained too."""
        data = self._options.data
        contents = self._table.column("contents")
        is_valid_file = self._table.column("files") >= len(self._sources[0].names)
        for side in (True, False):
            rows = np.flatnonzero((reasons == 0) & (is_valid_file == side))
            _, first = np.unique(contents[rows], return_index=True)
            ledger.mark(reasons, np.delete(rows, first), "duplicate")
        held = contents[is_valid_file & (reasons == 0)]
        ledger.mark(reasons, np.flatnonzero(~is_valid_file & np.isin(contents, held)), "in_validation")
        if data.group_by:
            groups_held = self._table.column("groups")[is_valid_file & (reasons == 0)]
            shared = np.isin(self._table.column("groups"), groups_held)
            ledger.mark(reasons, np.flatnonzero(~is_valid_file & shared), "in_validation")
        if self._options.model_folder is not None:
            too_long = self._table.column("longest") > data.max_length
            if data.too_long == "truncate":
                too_long = self._table.column("least_trained") == 0
            ledger.mark(reasons, np.flatnonzero(too_long), "too_long")
        places = np.full(len(reasons), DROPPED, np.uint8)
        usable = np.flatnonzero(reasons == 0)
        places[usable] = np.where(is_valid_file[usable], VALID, TRAIN)
        if not isinstance(data.valid, str):
            groups: Hashes | None = self._table.column("groups")[usable] if data.group_by else None
            places[usable[choose_valid(contents[usable], groups, data.valid, seed)]] = VALID
        self._check_ends(places)
        prompts = self._table.column("prompts")
        leaked = (places == VALID) & np.isin(prompts, prompts[places == TRAIN])
        return places, leaked

    def _check_ends(self, places: npt.NDArray[np.uint8]) -> None:
        """Stop when truncation took the end-of-turn token from every example: the model would never learn to stop."""
        cut = (self._table.column("notes")[places == TRAIN] & NOTE_BITS[END_CUT]) > 0
        if len(cut) and cut.all():
            raise MaskError(
                f"data.max_length = {self._options.data.max_length} cuts every row, so none keeps its end of turn",
                hint='raise data.max_length, or set data.too_long = "drop"',
            )

    # -- writing -----------------------------------------------------------------------------------------------

    def _write_index(self, places: npt.NDArray[np.uint8]) -> dict[str, Any]:
        """Write which sequences each example has and which row it came from; tells the lengths of what was kept."""
        per_row = self._table.column("examples")
        row_of_example = np.repeat(np.arange(len(per_row)), per_row)
        counts = np.concatenate([np.zeros(0, np.uint8), *self._sequence_counts])
        lengths = np.concatenate([np.zeros(0, np.uint32), *self._lengths])
        ranges = np.concatenate([np.zeros(0, np.uint32), *self._range_counts])
        arrays = {
            "offsets.u64": _offsets(lengths),
            "range_offsets.u64": _offsets(ranges),
            "first_sequences.u64": _offsets(counts),
            "rows.u64": row_of_example,
            "row_files.u32": self._table.column("files"),
            "row_lines.u32": self._table.column("lines"),
            "train.u64": np.flatnonzero(places[row_of_example] == TRAIN),
            "valid.u64": np.flatnonzero(places[row_of_example] == VALID),
        }
        for name, values in arrays.items():
            write_array(self._draft, name, values)
        return describe_lengths(lengths[np.repeat(places[row_of_example] != DROPPED, counts)])

    def _write_summary(
        self,
        counts: dict[str, Any],
        places: npt.NDArray[np.uint8],
        leaked: npt.NDArray[np.bool_],
        of_tokens: dict[str, Any],
    ) -> None:
        tokens, trained = (self._table.column(name) for name in ("tokens", "trained"))
        summary = {
            "files": list(self._names),
            **counts,
            "malformed": ledger.count_malformed(counts["reasons"]),
            "formats": self._formats,
            "kinds": ledger.count_kinds(self._table, places),
            "notes": ledger.count_notes(self._table, places),
            "duplicates": counts["reasons"].get("duplicate", 0) + counts["reasons"].get("in_validation", 0),
            "leakage": int(leaked.sum()),
            "leaking_rows": [self._where(int(row)) for row in np.flatnonzero(leaked)[:_SHOWN_LEAKS]],
            "examples": {
                name: int(self._table.column("examples")[places == code].sum())
                for code, name in enumerate(ledger.PLACES[:2])
            },
        }
        if self._options.model_folder is not None:
            summary |= {
                "tokens": {name: int(tokens[places == code].sum()) for code, name in enumerate(ledger.PLACES)},
                "trained_tokens": {
                    name: int(trained[places == code].sum()) for code, name in enumerate(ledger.PLACES[:2])
                },
                "max_length": self._options.data.max_length,
                "tokenizer": self._tokenizer,
                "learnt_shapes": self._options.learn_shapes,
                "fast_tokenizer_differed": not self._options.fast_tokenizer,
                **of_tokens,
            }
        (self._draft / "summary.json").write_bytes(orjson.dumps(summary, option=orjson.OPT_INDENT_2))


def _distinct_names(sources: list[Source]) -> tuple[str, ...]:
    """What ledger and errors call each file: its name, or its whole path where two have the same name."""
    names = tuple(name for source in sources for name in source.names)
    if len(set(names)) == len(names):
        return names
    return tuple(path.as_posix() for source in sources for path in source.paths)


def _offsets(counts: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.uint64)]).astype(np.uint64)


def describe_lengths(lengths: npt.NDArray[Any]) -> dict[str, Any]:
    """Quantiles, and a histogram over powers of two."""
    if not len(lengths):
        return {}
    edges = 2 ** np.arange(2, 33)
    bins = np.searchsorted(edges, lengths, side="left")
    counted = np.bincount(bins, minlength=1)
    first, last = int(np.flatnonzero(counted)[0]), len(counted)
    return {
        "min": int(lengths.min()),
        "median": int(np.median(lengths)),
        "p90": int(np.quantile(lengths, 0.9)),
        "p99": int(np.quantile(lengths, 0.99)),
        "max": int(lengths.max()),
        "mean": round(float(lengths.mean()), 1),
        "histogram": [[int(edges[index]), int(counted[index])] for index in range(first, last)],
    }


def _mask_error(names: tuple[str, ...], stops: list[tuple[int, Stop]]) -> MaskError:
    places = [f"{names[file]}:{stop.line}" for file, stop in stops]
    first = stops[0][1]
    more = "".join(
        f"\n  {place}: {stop.message}" for place, (_, stop) in zip(places[1:_SHOWN_ROWS], stops[1:], strict=False)
    )
    rest = f"\n  and {len(stops) - _SHOWN_ROWS:,} more rows" if len(stops) > _SHOWN_ROWS else ""
    return MaskError(
        f"{places[0]}: {first.message}{more}{rest}",
        hint=first.hint,
        where=places[0],
        details=[{"where": place, "message": stop.message} for place, (_, stop) in zip(places, stops, strict=True)][
            :100
        ],
    )


def _check_share(summary: dict[str, Any], most: float) -> None:
    rows, malformed = summary["rows"], summary["malformed"]
    if malformed > most * rows:
        raise RejectedRowsError(
            f"{malformed:,} of {rows:,} rows are malformed ({malformed / rows:.1%}), "
            f"and data.max_rejected_share is {most:g}: {list_counts(summary['reasons'])}",
            hint="`luthier data check` lists every bad row; mend them, or raise data.max_rejected_share",
            details=summary,
        )
