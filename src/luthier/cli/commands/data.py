"""`luthier data`: check, show, split, prepare, convert and judge training data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from luthier.cli.flags import DATA_FLAGS, ROW_FLAGS, read_overrides, spec_flags
from luthier.cli.output import Group, has_colour, paint, print_json, print_table, progress_bar, say, warn

if TYPE_CHECKING:
    from luthier.data.files import Written
    from luthier.data.judging import Judging
    from luthier.data.rows import RowReader
    from luthier.data.show import ShownText
    from luthier.spec.run import RunSpec

_LISTED = 10
_TWO_OUTPUTS = "standard output cannot hold both the rows and a report"
_hub_split = click.option("--split", metavar="NAME", help="Split of a hub dataset.")
_out = click.option("-o", "--out", required=True, metavar="OUT.jsonl", help="File to write; `-` is standard output.")


@click.group("data", cls=Group)
def command() -> None:
    """Check, show, split, prepare and convert training data, and make that of a judge."""


def _is_spec(file: str) -> bool:
    """Whether FILE is a spec whose data is meant; .json is data, which a spec may be too."""
    return file.endswith((".toml", ".yaml", ".yml"))


def _takes_any_kind(file: str, given: dict[str, Any]) -> bool:
    """Whether rows of every kind are welcome: a spec has an objective, a file only if a flag names one."""
    return given["flag_objective"] is None and not _is_spec(file)


def _rejection(entry: dict[str, Any]) -> str:
    """A bad row as every command names it."""
    return f"{entry['file']}:{entry['line']}: {entry['message']} [{entry['reason']}]"


def _spec_of(file: str, given: dict[str, Any], settings: tuple[str, ...]) -> RunSpec:
    """The spec of a call about one file: its own when FILE is a spec, else one made of the flags."""
    from luthier.spec.load import Override, load_spec

    overrides = read_overrides(given, settings)
    if _is_spec(file):
        return load_spec(Path(file), overrides).spec
    named = [] if given.get("flag_model") else [Override("model.base", "practice", "default")]
    return load_spec(None, [Override("data.train", file, "argument"), *named, *overrides]).spec


@command.command("check")
@click.argument("file")
@_hub_split
@spec_flags("model", *DATA_FLAGS)
def check(file: str, split: str | None, settings: tuple[str, ...], as_json: bool, **flags: Any) -> int:
    """Check every row of FILE (or of a SPEC's data): counts by place and reason, lengths, duplicates, leakage.

    Without a model, everything but tokens. Exit code 1 when more rows are malformed than the limit allows.
    """
    from luthier.cli.report import print_data_report
    from luthier.workflow import nothing_left, prepare_data

    spec = _spec_of(file, flags, settings)
    with_model = bool(flags["flag_model"]) or _is_spec(file)
    limit = spec.data.max_rejected_share
    # The report comes first here, so the limit is applied after it.
    lenient = spec.model_copy(update={"data": spec.data.model_copy(update={"max_rejected_share": 1.0})})
    any_kind = _takes_any_kind(file, flags)
    with progress_bar("checking rows", quiet=as_json) as progress:
        prepared = prepare_data(
            lenient, with_model=with_model, any_kind=any_kind, split=split, progress=progress, may_be_empty=True
        )
    summary = prepared.summary
    is_clean = summary["malformed"] <= limit * summary["rows"] and summary["train"] > 0
    if as_json:
        rejected = list(_read_rejected(prepared.folder))
        print_json({"ok": is_clean, **summary, "rejected": rejected, "ledger": str(prepared.folder / "ledger.jsonl")})
        return 0 if is_clean else 1
    print_data_report(summary)
    _list_rejected(prepared.folder, summary["malformed"])
    if summary["train"] == 0:
        warn(nothing_left(summary).message)
    elif not is_clean:
        share = summary["malformed"] / summary["rows"]
        warn(f"{share:.1%} of the rows are malformed; training stops above data.max_rejected_share = {limit:g}")
    return 0 if is_clean else 1


def _read_rejected(folder: Path) -> Iterator[dict[str, Any]]:
    import orjson

    with (folder / "rejected.jsonl").open("rb") as file:
        for line in file:
            yield orjson.loads(line)


def _list_rejected(folder: Path, count: int) -> None:
    for index, entry in enumerate(_read_rejected(folder)):
        if index == 0:
            say()
        if index == _LISTED:
            say(f"  and {count - _LISTED:,} more in {folder / 'rejected.jsonl'}")
            return
        say(f"  {_rejection(entry)}")


@command.command("show")
@click.argument("file")
@click.option("-n", "count", type=click.IntRange(1), default=3, show_default=True, metavar="N", help="Rows to show.")
@click.option("--row", type=int, metavar="LINE", help="Show the row on this line only.")
@click.option("--html", "page", metavar="OUT", help="Write a page instead.")
@_hub_split
@spec_flags("model", *ROW_FLAGS)
def show(
    file: str,
    count: int,
    row: int | None,
    page: str | None,
    split: str | None,
    settings: tuple[str, ...],
    as_json: bool,
    **flags: Any,
) -> int:
    """Show rows of FILE as the model will see them, the trained tokens coloured."""
    from luthier.data.rows import RowReader
    from luthier.data.show import render_page
    from luthier.data.tokens import ModelText
    from luthier.errors import CallError
    from luthier.workflow import read_options

    if not flags["flag_model"] and not _is_spec(file):
        raise CallError("no model to render with", hint="give --model MODEL, for instance --model practice")
    spec = _spec_of(file, flags, settings)
    # A few rows need no shortcuts, and so nothing that could prove wrong half way.
    options = replace(
        read_options(spec, any_kind=_takes_any_kind(file, flags)), learn_shapes=False, fast_tokenizer=False
    )
    assert options.model_folder is not None
    text = ModelText(options.model_folder, chat_template=options.chat_template)
    reader = RowReader(options, (file,))
    shown, rejected = _find_rows(spec, reader, text, count, row, split)
    if as_json:
        print_json({"rows": [each.as_dict() for each in shown], "rejected": rejected})
    elif page:
        from luthier.data.files import write_text

        write_text(Path(page), render_page(f"{Path(file).name} as {spec.model.base} sees it", shown))
        say(f"{len({each.line for each in shown})} rows written to {page}")
    else:
        _print_shown(shown)
    if not as_json:
        for entry in rejected:
            warn(_rejection(entry))
    return 1 if rejected and not shown else 0


def _find_rows(
    spec: RunSpec, reader: RowReader, text: Any, count: int, only: int | None, split: str | None
) -> tuple[list[ShownText], list[dict[str, Any]]]:
    """The wanted rows as shown, and those on the way that were rejected."""
    from luthier.data.reasons import RowError
    from luthier.data.show import show_row
    from luthier.data.source import open_source
    from luthier.errors import DataError, MaskError

    shown: list[ShownText] = []
    rejected: list[dict[str, Any]] = []
    rows = 0
    assert spec.data.train is not None
    with open_source(spec.data.train, split=split) as source:
        for block in source.blocks(limit=spec.data.examples):
            for line, row in zip(block.lines, block.rows, strict=True):
                if only is not None and line != only:
                    continue
                where = {"file": source.names[block.file], "line": line}
                try:
                    shown += show_row(reader, text, line, row)
                    rows += 1
                except RowError as error:
                    rejected.append({**where, "reason": error.reason, "message": error.message})
                except MaskError as error:
                    rejected.append({**where, "reason": error.code, "message": error.message})
                if rows >= count or only is not None:
                    return shown, rejected
    if only is not None:
        raise DataError(f"{spec.data.train}: no row on line {only}")
    return shown, rejected


def _print_shown(shown: list[ShownText]) -> None:
    from luthier.data.notes import NOTES

    colour = has_colour()
    for each in shown:
        name = f", {each.name}" if each.name else ""
        say(f"line {each.line}{name}: {sum(each.trained)} of {len(each.tokens)} tokens trained")
        for note in each.notes:
            say(f"note: {NOTES[note]}")
        say(_coloured(each) if colour else _bracketed(each))
        say()


def _coloured(shown: ShownText) -> str:
    from luthier.data.show import visible

    tokens = zip(shown.pieces, shown.trained, shown.control, strict=True)
    return "".join(_ansi(visible(piece), on=bool(on), control=control) for piece, on, control in tokens)


def _ansi(piece: str, *, on: bool, control: bool) -> str:
    codes = ("32;4" if on else "90") + (";1" if control else "")
    return "\n".join(f"\x1b[{codes}m{part}\x1b[0m" if part else "" for part in piece.split("\n"))


def _bracketed(shown: ShownText) -> str:
    """Without colour, trained stretches stand between guillemets."""
    out, before = [], 0
    for piece, on in zip(shown.pieces, shown.trained, strict=True):
        if on != before:
            out.append("\u00ab" if on else "\u00bb")
        out.append(piece)
        before = on
    return "".join(out) + ("\u00bb" if before else "")


@command.command("prepare")
@click.argument("source")
@_out
@_hub_split
@click.option("--max-examples", type=click.IntRange(1), metavar="N", help="Write the first N good rows only.")
@spec_flags("format", "max-rejected-share")
def prepare(
    source: str,
    out: str,
    split: str | None,
    max_examples: int | None,
    settings: tuple[str, ...],
    as_json: bool,
    **flags: Any,
) -> int:
    """Write SOURCE as canonical JSONL: chat rows, preference pairs or texts."""
    return _convert(source, "canonical", out, split, max_examples, settings, as_json, flags)


@command.command("convert")
@click.argument("file")
@click.option(
    "--to",
    "to",
    required=True,
    metavar="FORMAT",
    help="chat, alpaca, sharegpt, completion, text or preference.",
)
@_out
@_hub_split
@spec_flags("format", "max-rejected-share")
def convert(
    file: str, to: str, out: str, split: str | None, settings: tuple[str, ...], as_json: bool, **flags: Any
) -> int:
    """Write FILE in another format; rows it cannot hold are kept beside it with their reasons."""
    from luthier.data.formats import get_format

    get_format(to)
    return _convert(file, to, out, split, None, settings, as_json, flags)


@command.command("judge")
@click.argument("source")
@_out
@click.option("--scale", nargs=2, type=float, default=(1, 5), show_default=True, metavar="LOW HIGH", help="Scale.")
@click.option("--source-scale", nargs=2, type=float, metavar="LOW HIGH", help="Scale of the rows, where it is another.")
@click.option("--step", type=float, default=1, show_default=True, metavar="X", help="Scores are rounded to such steps.")
@click.option(
    "--template", metavar="FILE", help="What the judge is asked: {prompt}, {response}, {low}, {high}, {rubric}."
)
@click.option("--reply", metavar="TEXT", help="What it answers, instead of `{critique}\\nScore: {score}`.")
@click.option("--rubric", metavar="FILE", help="What each score means: lines such as `5: right and complete`.")
@click.option("--prompt-key", metavar="KEY", help="Key of the prompt, where it has no usual name.")
@click.option("--response-key", metavar="KEY", help="Key of the answer.")
@click.option("--score-key", metavar="KEY", help="Key of the score.")
@click.option("--critique-key", metavar="KEY", help="Key of the critique.")
@click.option("--max-examples", type=click.IntRange(1), metavar="N", help="Use the first N good rows only.")
@_hub_split
@spec_flags("max-rejected-share")
def judge(
    source: str,
    out: str,
    split: str | None,
    max_examples: int | None,
    settings: tuple[str, ...],
    as_json: bool,
    **asked: Any,
) -> int:
    """Write scored answers or preference pairs as conversations of a judge: a critique, then a score.

    SOURCE holds rows of a prompt, an answer and a score, or pairs of chosen and rejected, or both. A pair becomes two
    conversations; without scores of its own the chosen answer gets the highest and the other the lowest. A row
    without a critique gets the sentence that the rubric has for its score.
    """
    from luthier.data.files import judge_rows
    from luthier.data.source import open_source
    from luthier.errors import CallError

    if as_json and out == "-":
        raise CallError(_TWO_OUTPUTS, hint="give -o a file, or leave out --json")
    limit_share = _spec_of(source, asked, settings).data.max_rejected_share
    judging = _judging(asked)
    with open_source(source, split=split) as rows, progress_bar("writing rows", quiet=as_json) as progress:
        done, tally = judge_rows(rows, judging, Path(out), limit=max_examples, progress=progress)
    found = tally.as_dict()
    if not as_json and out != "-":
        _print_judged(source, done, found)
    return _end_writing(done, out, limit_share, as_json=as_json, more=found)


def _judging(asked: dict[str, Any]) -> Judging:
    """How answers become conversations, by the options that were given."""
    from luthier.data.judging import REPLY, TEMPLATE, Judging, check_judging, read_rubric, read_template
    from luthier.data.scored import Fields

    low, high = asked["scale"]
    made = Judging(
        low,
        high,
        asked["step"],
        tuple(asked["source_scale"]) if asked["source_scale"] else None,
        read_template(Path(asked["template"])) if asked["template"] else TEMPLATE,
        asked["reply"].replace("\\n", "\n") if asked["reply"] else REPLY,
        read_rubric(Path(asked["rubric"])) if asked["rubric"] else {},
        Fields(*(asked[f"{part}_key"] for part in ("prompt", "response", "score", "critique"))),
    )
    check_judging(made)
    return made


def _print_judged(source: str, done: Written, found: dict[str, Any]) -> None:
    from luthier.data.reasons import REASONS

    bad = done.rows - done.written
    say(f"{done.rows:,} rows read from {source}")
    places = [("judged", f"{done.written:,}", ""), ("dropped", f"{bad:,}", "")]
    places += [(f"  {name}", f"{count:,}", REASONS[name].sentence) for name, count in done.reasons.items()]
    print_table(places, right=(1,))
    ledger = f"{done.written:,} + {bad:,} = {done.rows:,}: every row is in one place"
    say(f"  {paint('ledger', '32')}  {ledger}")
    pairs = f", {found['pairs']:,} rows being pairs of two answers" if found["pairs"] else ""
    say(f"  conversations  {found['conversations']:,}{pairs}")
    say("  scores  " + ", ".join(f"{count:,} of {score}" for score, count in found["scores"].items()))
    critiques = found["critiques"]
    say(f"  critiques  {critiques['own']:,} of the rows, {critiques['by_rubric']:,} by the rubric")
    if found["rounded"]:
        say(f"  note: {found['rounded']:,} scores were rounded to the scale's steps")
    if found["contradicted"]:
        say(f"  note: {found['contradicted']:,} answers stand there once more with another score")


def _convert(
    file: str,
    to: str,
    out: str,
    split: str | None,
    limit: int | None,
    settings: tuple[str, ...],
    as_json: bool,
    flags: dict[str, Any],
) -> int:
    from luthier.data.files import convert_rows
    from luthier.data.rows import RowReader
    from luthier.data.source import open_source
    from luthier.errors import CallError
    from luthier.workflow import read_options

    if as_json and out == "-":
        raise CallError(_TWO_OUTPUTS, hint="give -o a file, or leave out --json")
    spec = _spec_of(file, flags, settings)
    with open_source(file, split=split) as source, progress_bar("writing rows", quiet=as_json) as progress:
        reader = RowReader(read_options(spec, with_model=False, any_kind=True), source.names)
        done = convert_rows(source, reader, to, Path(out), limit=limit, progress=progress)
    if not as_json and out != "-":
        say(f"{done.written:,} of {done.rows:,} rows written to {out}")
    return _end_writing(done, out, spec.data.max_rejected_share, as_json=as_json)


def _end_writing(
    done: Written, out: str, limit_share: float, *, as_json: bool, more: dict[str, Any] | None = None
) -> int:
    """Name the rows that were not written, and return the exit code: 1 when they are more than the limit allows."""
    bad = done.rows - done.written
    is_clean = bad <= limit_share * done.rows and done.written > 0
    result = {"ok": is_clean, "rows": done.rows, "written": done.written, "reasons": done.reasons, "out": out}
    if as_json:
        print_json({**result, **(more or {}), "rejected": done.rejected})
        return 0 if is_clean else 1
    for entry in done.rejected[:_LISTED]:
        warn(_rejection(entry))
    if bad and out != "-":
        warn(f"{bad:,} rows were not written; they are in {out}.rejected.jsonl")
    if not is_clean:
        warn(f"{bad / max(1, done.rows):.1%} of the rows were not written; --max-rejected-share allows {limit_share:g}")
    return 0 if is_clean else 1


@command.command("split")
@click.argument("file")
@click.option("-o", "--out", metavar="DIR", help="Folder that receives train.jsonl and valid.jsonl.")
@click.option("--train-out", metavar="FILE", help="The file of training rows.")
@click.option("--valid-out", metavar="FILE", help="The file of held-out rows.")
@_hub_split
@spec_flags("model", *DATA_FLAGS)
def split_command(
    file: str,
    out: str | None,
    train_out: str | None,
    valid_out: str | None,
    split: str | None,
    settings: tuple[str, ...],
    as_json: bool,
    **flags: Any,
) -> int:
    """Part FILE into training and held-out rows, and say what was filtered.

    With a model, rows longer than --max-length are dropped, by the full rendered conversation.
    """
    from luthier.cli.report import print_data_report
    from luthier.data.files import part_rows
    from luthier.data.source import open_source
    from luthier.errors import CallError
    from luthier.workflow import prepare_data

    if bool(out) == bool(train_out or valid_out) or bool(train_out) != bool(valid_out):
        raise CallError("where should the rows go?", hint="give either -o DIR, or both --train-out and --valid-out")
    if flags["flag_max_length"] and not flags["flag_model"]:
        raise CallError("--max-length counts tokens, and no model says what a token is", hint="give --model MODEL")
    spec = _spec_of(file, flags, settings)
    if isinstance(spec.data.valid, str):
        raise CallError(
            "--valid names a file; a split needs a share or a count",
            hint="for instance --valid 500 or --valid 0.05",
        )
    train, valid = (
        (Path(out) / "train.jsonl", Path(out) / "valid.jsonl") if out else (Path(str(train_out)), Path(str(valid_out)))
    )
    with open_source(file, split=split) as source:
        with progress_bar("reading rows", quiet=as_json) as progress:
            prepared = prepare_data(
                spec,
                with_model=bool(flags["flag_model"]),
                any_kind=_takes_any_kind(file, flags),
                progress=progress,
                opened=source,
            )
        part_rows(source, prepared, train, valid, limit=spec.data.examples)
    if as_json:
        print_json({"train_out": str(train), "valid_out": str(valid), **prepared.summary})
        return 0
    print_data_report(prepared.summary)
    _list_rejected(prepared.folder, prepared.summary["malformed"])
    say()
    say(f"{prepared.summary['train']:,} rows written to {train}")
    say(f"{prepared.summary['valid']:,} rows written to {valid}")
    return 0
