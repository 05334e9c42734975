"""The facts of one run, read from its folder: what was asked, what happened, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from luthier.errors import LuthierError
from luthier.reports.evidence import Certificate, Comparison, read_certificate, read_comparison
from luthier.reports.rows import Rows, read_rows
from luthier.runs.events import UNREADABLE
from luthier.runs.run import Run, State
from luthier.spec.load import dump_spec
from luthier.spec.method import AdapterKeys
from luthier.spec.run import RunSpec

STEP_VALUES = (
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "trained_tokens",
    "tokens_per_second",
    "seconds",
    "memory_bytes",
)
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Steps:
    """The steps that count in the end, a column for each thing measured; NaN where a value was not finite."""

    number: npt.NDArray[np.int64]
    columns: dict[str, Floats]

    def __len__(self) -> int:
        return len(self.number)

    def column(self, name: str) -> Floats:
        """One value of every step."""
        return self.columns[name]

    def points(self, name: str) -> Floats:
        """Rows of (step, value), those that are finite; none of what was never measured."""
        values = self.columns.get(name, np.full(len(self), np.nan))
        is_finite = np.isfinite(values)
        return np.column_stack([self.number[is_finite].astype(float), values[is_finite]])


@dataclass(frozen=True)
class Evaluation:
    """The held-out rows measured once."""

    step: int
    loss: float
    perplexity: float
    token_accuracy: float
    tokens: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Incident:
    """Something at a step that a curve should show: skipped, replayed, resumed, or a warning."""

    kind: str
    step: int | None
    text: str


@dataclass(frozen=True)
class Cost:
    """What the run took, beside what its plan said; None where nothing is known."""

    seconds: float
    planned_seconds: float | None
    load_seconds: float
    wall_seconds: float | None
    tokens: int
    trained_tokens: int
    repeated_tokens: int
    """Tokens of steps that a resume took back and trained again."""
    memory_items: dict[str, int]
    planned_bytes: int | None
    measured_bytes: int | None
    available_bytes: int | None
    device: str

    @property
    def tokens_per_second(self) -> float:
        """Over the whole run."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Ending:
    """How the run stands, and why."""

    state: State
    reason: str
    message: str
    step: int


@dataclass(frozen=True)
class Report:
    """One run, whole."""

    run: str
    folder: str
    model: str
    spec: RunSpec
    ending: Ending
    planned_steps: int | None
    total_parameters: int | None
    trainable_parameters: int | None
    decisions: tuple[dict[str, Any], ...]
    rows: Rows
    steps: Steps
    evaluations: tuple[Evaluation, ...]
    incidents: tuple[Incident, ...]
    cost: Cost
    lineage: dict[str, Any]
    comparison: Comparison | None
    certificate: Certificate | None
    remarks: tuple[str, ...]
    """What is wrong with the folder's own files; a report never passes over it."""

    def held_out(self, name: str) -> Floats:
        """Rows of (step, value) of one thing measured on the held-out rows, those that are finite."""
        found = [(each.step, each.metrics.get(name, getattr(each, name, math.nan))) for each in self.evaluations]
        return np.array([pair for pair in found if math.isfinite(pair[1])], float).reshape(-1, 2)

    @property
    def is_adapter(self) -> bool:
        """Whether the run trained an adapter."""
        return isinstance(self.spec.method, AdapterKeys)

    @property
    def is_paired(self) -> bool:
        """Whether the run compares two answers."""
        return self.spec.objective.kind in ("dpo", "simpo", "orpo")

    @property
    def best(self) -> Evaluation | None:
        """The evaluation with the lowest loss."""
        finite = [each for each in self.evaluations if math.isfinite(each.loss)]
        return min(finite, key=lambda each: each.loss) if finite else None

    @property
    def kept(self) -> Evaluation | None:
        """The evaluation of the weights that the run kept: its last, or its best where the spec keeps that."""
        if not self.evaluations:
            return None
        return self.best if self.spec.evaluate.keep == "best" else self.evaluations[-1]

    @property
    def base(self) -> str:
        """The base model by its name."""
        return str(self.lineage.get("base", {}).get("name") or self.spec.model.base)

    @property
    def data_hash(self) -> str:
        """The hash of what was trained and held out; empty when it is not known."""
        return str(self.lineage.get("data", {}).get("hash") or "")

    def settings(self) -> dict[str, Any]:
        """Every key of the spec that decides the run, by its dotted path."""
        tables = dump_spec(self.spec)
        found: dict[str, Any] = {}
        for name, table in tables.items():
            if name in ("about", "output"):
                continue
            found |= _by_path(name, table) if isinstance(table, dict) else {}
        return {"seed": self.spec.seed, **found}


def _by_path(name: str, table: dict[str, Any]) -> dict[str, Any]:
    """The keys of a table and of those inside it, by their dotted paths."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        path = f"{name}.{key}"
        found |= _by_path(path, value) if isinstance(value, dict) else {path: value}
    return found


def read_report(run: Run) -> Report:
    """Everything a run folder says of itself; files that may be absent are, and what is damaged is remarked on."""
    events = run.read_events()
    remarks: list[str] = []
    plan = _last(events, "planned").get("plan", {})
    rows = read_rows(run.folder)
    if unreadable := sum(event["kind"] == UNREADABLE for event in events):
        remarks.append(f"events.jsonl: lines that cannot be read: {unreadable}")
    if rows.unreadable:
        remarks.append(f"ledger.jsonl: lines that cannot be read: {rows.unreadable}")
    comparison, certificate = _read_evidence(run, remarks)
    kept, repeated = _list_kept(events)
    steps = _build_steps(kept)
    return Report(
        run=run.id,
        folder=str(run.folder),
        model=run.model_id,
        spec=run.spec,
        ending=_build_ending(run, events, steps),
        planned_steps=plan.get("steps"),
        total_parameters=plan.get("total_parameters"),
        trainable_parameters=plan.get("trainable_parameters"),
        decisions=tuple(plan.get("decisions", ())),
        rows=rows,
        steps=steps,
        evaluations=tuple(_list_evaluations(kept)),
        incidents=tuple(_list_incidents(kept)),
        cost=_build_cost(events, plan, steps, repeated),
        lineage=run.lineage,
        comparison=comparison,
        certificate=certificate,
        remarks=tuple(remarks),
    )


def _read_evidence(run: Run, remarks: list[str]) -> tuple[Comparison | None, Certificate | None]:
    comparison, certificate = None, None
    try:
        comparison = read_comparison(run.folder)
    except LuthierError as error:
        remarks.append(error.message)
    try:
        certificate = read_certificate(run.folder)
    except LuthierError as error:
        remarks.append(error.message)
        certificate = Certificate(False, ())
    return comparison, certificate


def _last(events: Iterable[dict[str, Any]], *kinds: str) -> dict[str, Any]:
    return next((event for event in reversed(list(events)) if event["kind"] in kinds), {})


def _list_kept(events: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """The events that count in the end: what a resume took back is left out, and its tokens are counted."""
    kept: list[dict[str, Any]] = []
    repeated = 0
    for event in events:
        if event["kind"] == "resumed":
            undone = [each for each in kept if _of_step(each) > event["step"]]
            repeated += sum(int(each["tokens"]) for each in undone if each["kind"] == "step_done")
            kept = [each for each in kept if _of_step(each) <= event["step"]]
        kept.append(event)
    return kept, repeated


def _of_step(event: dict[str, Any]) -> int:
    return int(event["step"]) if event["kind"] in ("step_done", "evaluated", "step_skipped", "step_replayed") else 0


def _build_steps(kept: Iterable[dict[str, Any]]) -> Steps:
    taken = {int(event["step"]): event for event in kept if event["kind"] == "step_done"}
    ordered = [taken[number] for number in sorted(taken)]
    columns = {name: np.array([_float(event.get(name)) for event in ordered], float) for name in STEP_VALUES}
    metrics = [event.get("metrics") or {} for event in ordered]
    for name in dict.fromkeys(str(name) for each in metrics for name in each):
        columns.setdefault(name, np.array([_float(each.get(name)) for each in metrics], float))
    return Steps(np.array(sorted(taken), np.int64), columns)


def _float(value: Any) -> float:
    """A number of an event; JSON writes what is not finite as null."""
    return math.nan if value is None else float(value)


def _list_evaluations(kept: Iterable[dict[str, Any]]) -> list[Evaluation]:
    found = {}
    for event in kept:
        if event["kind"] == "evaluated":
            found[int(event["step"])] = Evaluation(
                step=int(event["step"]),
                loss=_float(event.get("loss")),
                perplexity=_float(event.get("perplexity")),
                token_accuracy=_float(event.get("token_accuracy")),
                tokens=int(event.get("tokens", 0)),
                metrics={str(name): _float(value) for name, value in event.get("metrics", {}).items()},
            )
    return [found[step] for step in sorted(found)]


def _list_incidents(kept: Iterable[dict[str, Any]]) -> Iterable[Incident]:
    for event in kept:
        kind, step = event["kind"], event.get("step")
        if kind == "step_skipped":
            rows = event.get("rows", [])
            yield Incident(kind, step, f"step {step} skipped: {event['reason']}; its rows: {', '.join(rows[:5])}")
        elif kind == "step_replayed":
            yield Incident(kind, step, f"step {step} computed again in smaller parts: {event['reason']}")
        elif kind == "resumed":
            yield Incident(kind, step, f"resumed after step {step}")
        elif kind == "checkpoint_broken":
            yield Incident(kind, None, f"checkpoint passed over: {event['reason']}")
        elif kind == "warned":
            yield Incident(kind, None, str(event["message"]))


def _build_ending(run: Run, events: list[dict[str, Any]], steps: Steps) -> Ending:
    last = _last(events, "stopped", "paused", "failed", "finished")
    step = last.get("step", int(steps.number[-1]) if len(steps) else 0)
    state = run.state
    # A process that was killed leaves no word of its end; the run then counts as stopped.
    is_told = last.get("kind") == state
    reason = str(last.get("reason", last.get("code", ""))) if is_told else ""
    return Ending(state, reason, str(last.get("message", "")) if is_told else "", int(step))


def _build_cost(events: list[dict[str, Any]], plan: dict[str, Any], steps: Steps, repeated: int) -> Cost:
    memory = plan.get("memory", {})
    measured = _last(events, "memory_measured")
    finished = _last(events, "finished")
    peak = steps.column("memory_bytes")
    seen = float(np.nanmax(peak)) if np.isfinite(peak).any() else 0.0
    return Cost(
        seconds=float(finished.get("seconds") or np.nansum(steps.column("seconds"))),
        planned_seconds=plan.get("seconds"),
        load_seconds=sum(float(event["seconds"]) for event in events if event["kind"] == "engine_loaded"),
        wall_seconds=_wall_seconds(events),
        tokens=int(np.nansum(steps.column("tokens"))),
        trained_tokens=int(np.nansum(steps.column("trained_tokens"))),
        repeated_tokens=repeated,
        memory_items={str(name): int(size) for name, size in memory.get("items", {}).items()},
        planned_bytes=memory.get("total_bytes"),
        measured_bytes=measured.get("measured_bytes") or (int(seen) or None),
        available_bytes=memory.get("available_bytes"),
        device=str(memory.get("device", "")),
    )


def _wall_seconds(events: list[dict[str, Any]]) -> float | None:
    """From each start of a process to its last event, added up; the time a run lay still is not its cost."""
    total, start, last = 0.0, None, None
    for event in events:
        if not event.get("time"):
            continue
        now = datetime.fromisoformat(event["time"])
        if event["kind"] == "run_started":
            total += (last - start).total_seconds() if start and last else 0.0
            start = now
        last = now
    return total + (last - start).total_seconds() if start and last else None
