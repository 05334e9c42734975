"""Which rows an optimizer step trained and which steps a row was in: computed from the order, never stored.

Only deviations are recorded, as events: a step skipped, a step replayed in smaller parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from luthier.data.cache import map_array
from luthier.data.order import count_steps, find_steps, step_examples
from luthier.errors import CallError

if TYPE_CHECKING:
    from luthier.data.prepared import Prepared
    from luthier.spec.run import RunSpec


@dataclass(frozen=True)
class TrainedRow:
    """One example of a step, and the row it came from."""

    file: str
    line: int
    example: int

    @property
    def where(self) -> str:
        """`file:line`, as ledger and errors name it."""
        return f"{self.file}:{self.line}"


@dataclass
class StepRecord:
    """What the events say of one step."""

    is_done: bool = False
    deviations: list[dict[str, Any]] = field(default_factory=list)


def stream_end(spec: RunSpec, count: int) -> int | None:
    """The position at which the stream of examples ends; None when `optim.steps` decides."""
    return None if spec.optim.steps else max(1, round(count * spec.optim.epochs))


def planned_steps(spec: RunSpec, prepared: Prepared) -> int:
    """Optimizer steps of the whole run."""
    optim = spec.optim
    return count_steps(len(prepared.train), optim.batch, epochs=optim.epochs, steps=optim.steps)


def rows_of_step(spec: RunSpec, prepared: Prepared, step: int) -> list[TrainedRow]:
    """The examples of a step, counted from 1 as the log prints it, in the order in which they are trained."""
    total = planned_steps(spec, prepared)
    if not 1 <= step <= total:
        raise CallError(f"no step {step}: the run has the steps 1 to {total}")
    count = len(prepared.train)
    places = step_examples(step - 1, count, spec.optim.batch, spec.seed, last=stream_end(spec, count))
    return [TrainedRow(*prepared.row_of(example), example) for example in prepared.train[places].tolist()]


def steps_of_row(spec: RunSpec, prepared: Prepared, file: str, line: int) -> list[int]:
    """The steps, from 1, that train any example of a row; empty for one that is held out, dropped or never reached."""
    count, batch, total = len(prepared.train), spec.optim.batch, planned_steps(spec, prepared)
    end = stream_end(spec, count)
    reached = min(total * batch, total * batch if end is None else end)
    found: set[int] = set()
    for index in _places_of_row(prepared, file, line):
        found |= {step + 1 for step in find_steps(index, count, batch, spec.seed, epochs=math.ceil(reached / count))}
    # The last epoch may be left half way: a step counts only if the row is really among its examples.
    own = {int(prepared.train[index]) for index in _places_of_row(prepared, file, line)}
    last_full = reached // batch
    return sorted(
        step
        for step in found
        if step <= last_full or (step <= total and own & {row.example for row in rows_of_step(spec, prepared, step)})
    )


def _places_of_row(prepared: Prepared, file: str, line: int) -> list[int]:
    """Positions in `prepared.train` of the examples of a row."""
    files = prepared.summary["files"]
    if file not in files:
        return []
    is_row = (map_array(prepared.folder, "row_files.u32") == files.index(file)) & (
        map_array(prepared.folder, "row_lines.u32") == line
    )
    rows = map_array(prepared.folder, "rows.u64")[prepared.train.astype(np.int64)]
    return [int(place) for place in np.flatnonzero(is_row[rows.astype(np.int64)])]


def find_in_ledger(ledger: Path, file: str, line: int) -> dict[str, Any] | None:
    """The row's entry in a ledger: its place, and why it was dropped if it was."""
    with ledger.open("rb") as lines:
        for text in lines:
            entry: dict[str, Any] = orjson.loads(text)
            if entry["line"] == line and entry["file"] == file:
                return entry
    return None


def find_file(files: list[str], named: str) -> str:
    """The file of a ledger that a person names by its name or path; raises CallError when none or several fit."""
    fitting = [name for name in files if name == named]
    fitting = fitting or [name for name in files if Path(name).name == Path(named).name]
    if len(fitting) == 1:
        return fitting[0]
    listed = ", ".join(fitting or files)
    what = "several files are called" if fitting else "no rows were read from"
    raise CallError(f"{what} `{named}`", hint=f"the run read {listed}")


def read_records(events: Iterable[dict[str, Any]]) -> dict[int, StepRecord]:
    """What happened to each step, as it counts in the end: what a resume threw away is forgotten."""
    records: dict[int, StepRecord] = {}
    for event in events:
        kind, step = event["kind"], event.get("step")
        if kind == "resumed":
            records = {number: record for number, record in records.items() if number <= event["step"]}
        elif kind == "step_done" and isinstance(step, int):
            records.setdefault(step, StepRecord()).is_done = True
        elif kind in ("step_skipped", "step_replayed") and isinstance(step, int):
            records.setdefault(step, StepRecord()).deviations.append(event)
    return records
