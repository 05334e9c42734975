"""`luthier rows`: the rows of any optimizer step of a run, and the steps of any row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from luthier.cli.output import Command, print_json, say, warn

if TYPE_CHECKING:
    from luthier.data.prepared import Prepared
    from luthier.runs.journal import StepRecord
    from luthier.runs.run import Run

_PLACES = {"valid": "held out for evaluation", "dropped": "dropped"}


@click.command("rows", cls=Command)
@click.argument("run")
@click.option("--step", type=click.IntRange(1), metavar="N", help="Show the rows of this step, as the log counts it.")
@click.option("--row", metavar="FILE:LINE", help="Show the steps that train this row.")
def command(run: str, step: int | None, row: str | None, as_json: bool) -> None:
    """Show which rows a step of RUN trained, or which steps trained a row."""
    from luthier.errors import CallError
    from luthier.runs.journal import read_records
    from luthier.runs.run import open_run

    if (step is None) == (row is None):
        raise CallError("what should be shown?", hint="give either --step N or --row FILE:LINE")
    opened = open_run(run)
    prepared = _find_data(opened)
    records = read_records(opened.read_events())
    found = _of_step(opened, prepared, records, step) if step else _of_row(opened, prepared, records, str(row))
    if as_json:
        print_json({"run": opened.id, **found})
    elif step:
        _print_step(found)
    else:
        _print_row(found)


def _find_data(run: Run) -> Prepared:
    """The run's own tokens from the cache, else prepared again and held against what the lineage says."""
    from luthier.data.cache import find_valid
    from luthier.data.prepared import Prepared
    from luthier.errors import RunError
    from luthier.runs.home import luthier_home
    from luthier.runs.lineage import data_hash
    from luthier.workflow import prepare_data

    recorded = run.lineage.get("data", {})
    name = str(recorded.get("cache", ""))
    cached = find_valid(luthier_home() / "tokens" / name) if name.isalnum() else None
    prepared = Prepared(cached, was_cached=True) if cached else prepare_data(run.spec)
    if recorded.get("hash") not in (None, data_hash(prepared)):
        raise RunError(
            f"the data of {run.id} is no longer what was trained, so its steps cannot be told",
            hint="the run's ledger.jsonl still says what became of each row",
        )
    return prepared


def _of_step(run: Run, prepared: Prepared, records: dict[int, StepRecord], step: int) -> dict[str, Any]:
    from luthier.runs.journal import planned_steps, rows_of_step

    rows = rows_of_step(run.spec, prepared, step)
    return {
        "steps": planned_steps(run.spec, prepared),
        "rows": [{"file": row.file, "line": row.line, "example": row.example} for row in rows],
        **_told(records, step),
    }


def _of_row(run: Run, prepared: Prepared, records: dict[int, StepRecord], named: str) -> dict[str, Any]:
    from luthier.errors import CallError
    from luthier.runs.journal import find_file, find_in_ledger, steps_of_row
    from luthier.runs.layout import LEDGER

    file, colon, text = named.rpartition(":")
    if not colon or not text.isdecimal():
        raise CallError(f"`{named}` names no row", hint="a row is FILE:LINE, for instance train.jsonl:17")
    file, line = find_file(prepared.summary["files"], file), int(text)
    entry = find_in_ledger(run.folder / LEDGER, file, line)
    if entry is None:
        raise CallError(f"{file} has no row on line {line}", hint=f"{run.folder / LEDGER} lists every row")
    steps = steps_of_row(run.spec, prepared, file, line)
    return {
        "file": file,
        "line": line,
        "place": entry["place"],
        "reason": entry.get("reason"),
        "steps": [_told(records, step) for step in steps],
    }


def _told(records: dict[int, StepRecord], step: int) -> dict[str, Any]:
    """A step with whether it was trained, and how it deviated."""
    record = records.get(step)
    deviations = [
        {key: each[key] for key in ("kind", "reason", "micro_batch_tokens") if key in each}
        for each in (record.deviations if record else [])
    ]
    return {"step": step, "is_done": bool(record and record.is_done), "deviations": deviations}


def _print_step(found: dict[str, Any]) -> None:
    say(f"step {found['step']:,} of {found['steps']:,}: {_standing(found)}")
    for row in found["rows"]:
        say(f"  {row['file']}:{row['line']}")


def _print_row(found: dict[str, Any]) -> None:
    where = f"{found['file']}:{found['line']}"
    if found["place"] != "train":
        reason = f": {found['reason']}" if found["reason"] else ""
        say(f"{where} is {_PLACES[found['place']]}{reason}")
    elif not found["steps"]:
        warn(f"{where} is among the training rows, and the run ends before it comes to it")
    else:
        say(f"{where} is in {len(found['steps'])} step{'s' if len(found['steps']) > 1 else ''}")
        for each in found["steps"]:
            say(f"  step {each['step']:,}: {_standing(each)}")


def _standing(step: dict[str, Any]) -> str:
    """Whether a step was trained, in words."""
    said = []
    for each in step["deviations"]:
        if each["kind"] == "step_skipped":
            said.append(f"skipped, nothing of it was trained ({each['reason']})")
        else:
            said.append(f"replayed in micro-batches of {each['micro_batch_tokens']:,} tokens ({each['reason']})")
    if not said and not step["is_done"]:
        return "not taken yet"
    return "; ".join(said) if said else "trained"
