"""The events of a run as the database has them: read by complete lines, each said in words, in the order they came."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from luthier.jobs.job import NewEvent
from luthier.runs.events import redact

MOST_LINES = 500
"""Carried over at once."""
_MOST_BYTES = 4 << 20
_MOST_MESSAGE = 2000
_ENVELOPE = ("seq", "time", "kind")
_OF_PLAN = ("steps", "train_examples", "tokens_per_epoch", "trained_tokens_per_epoch", "device", "seconds", "memory")
Event = Mapping[str, Any]


@dataclass(frozen=True)
class Stretch:
    """Lines of a log after the first number and up to the second, as events; and the newest step they speak of."""

    events: tuple[NewEvent, ...]
    lines: tuple[int, int]
    step: int | None = None
    steps: int | None = None


class Relay:
    """Reads on in a run's `events.jsonl` after the lines that are kept already."""

    def __init__(self, path: Path, home: Path, kept: int = 0) -> None:
        self._path, self._home = path, home
        self._steps: int | None = None
        self._kept, self._offset = 0, 0
        self._start = kept

    @property
    def kept(self) -> int:
        """How many lines are in the database."""
        return max(self._kept, self._start)

    def read(self) -> Stretch | None:
        """The next lines, as far as they are complete; None where there are none. The same again until `keep`."""
        if self._kept < self._start and not self._skip():
            return None
        lines, _ = self._lines()
        if not lines:
            return None
        parsed = [_parse(line) for line in lines]
        for each in parsed:
            self._steps = _steps_of(each) or self._steps
        events = tuple(describe(each, self._steps, hide=self._hide) for each in parsed if each)
        told = [each["step"] for each in parsed if isinstance(each.get("step"), int)]
        return Stretch(events, (self._kept, self._kept + len(lines)), told[-1] if told else None, self._steps)

    def keep(self, kept: int) -> None:
        """So many lines are in the database now, by whoever brought them there."""
        if kept <= self._kept:
            return
        lines, sizes = self._lines()
        new = kept - self._kept
        if new <= len(lines):
            self._kept, self._offset = kept, self._offset + sum(sizes[:new])
        else:
            self._start = kept

    def _skip(self) -> bool:
        """Go past what is kept already; the plan on the way says how many steps there are."""
        while self._kept < self._start:
            lines, sizes = self._lines(self._start - self._kept)
            if not lines:
                return False
            for each in map(_parse, lines):
                self._steps = _steps_of(each) or self._steps
            self._kept, self._offset = self._kept + len(lines), self._offset + sum(sizes)
        return True

    def _lines(self, most: int = MOST_LINES) -> tuple[list[bytes], list[int]]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                content = file.read(_MOST_BYTES)
                while content and b"\n" not in content and (more := file.read(_MOST_BYTES)):
                    content += more
        except FileNotFoundError:
            return [], []
        lines = content.split(b"\n")[:-1][:most]
        return lines, [len(line) + 1 for line in lines]

    def _hide(self, text: str) -> str:
        """Without the places of the server's disk."""
        for place in {str(self._home), os.path.realpath(self._home)}:
            text = text.replace(f"{place}{os.sep}", "").replace(place, "")
        return text


def _parse(line: bytes) -> Event:
    """A line as it was written; a damaged one is nothing, and still counts as a line."""
    try:
        found = orjson.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("kind"), str) else {}


def _steps_of(event: Event) -> int | None:
    if event.get("kind") != "planned" or not isinstance(event.get("plan"), dict):
        return None
    steps = event["plan"].get("steps")
    return steps if isinstance(steps, int) else None


def describe(event: Event, steps: int | None = None, *, hide: Callable[[str], str] = str) -> NewEvent:
    """An event of a run as an event of its job: a sentence, and the facts without the server's paths."""
    kind = str(event["kind"])
    message = _SENTENCES.get(kind, _by_name)(event, steps)
    facts = {key: value for key, value in event.items() if key not in _ENVELOPE}
    if kind == "planned":
        facts = {key: value for key, value in event.get("plan", {}).items() if key in _OF_PLAN}
    step = event.get("step")
    return NewEvent(
        kind=kind,
        message=hide(redact(message))[:_MOST_MESSAGE],
        level=_LEVELS.get(kind, "info"),
        step=step if isinstance(step, int) else None,
        data=_without_paths(redact(facts), hide),
        created_at=_seconds(event.get("time")),
    )


def _without_paths(value: Any, hide: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, dict):
        return {key: _without_paths(each, hide) for key, each in value.items()}
    return [_without_paths(each, hide) for each in value] if isinstance(value, list) else value


def _seconds(time: Any) -> float | None:
    try:
        return datetime.fromisoformat(str(time)).timestamp()
    except ValueError:
        return None


_LEVELS = {
    "step_skipped": "warn",
    "step_replayed": "warn",
    "checkpoint_broken": "warn",
    "warned": "warn",
    "paused": "warn",
    "failed": "error",
}


def _say(text: str, event: Event, steps: int | None) -> str:
    """The sentence with the event's values; one that lacks a value is said as far as it goes."""
    known = {"of": f"/{steps}" if steps else "", **event}
    try:
        return text.format(**known)
    except (LookupError, ValueError, TypeError):
        return str(event["kind"]).replace("_", " ")


def _by_name(event: Event, _: int | None) -> str:
    return str(event["kind"]).replace("_", " ")


def _counted(event: Event, _: int | None) -> str:
    rows = event.get("summary", {})
    return (
        f"Rows are ready: {rows.get('train', 0):,} to train, {rows.get('valid', 0):,} held out, "
        f"{rows.get('dropped', 0):,} dropped"
    )


def _planned(event: Event, _: int | None) -> str:
    plan = event.get("plan", {})
    return f"The plan: {plan.get('steps', 0):,} steps on {plan.get('train_examples', 0):,} examples"


def _resumed(event: Event, _: int | None) -> str:
    step = event.get("step")
    return f"Going on after step {step}" if step else "There is no checkpoint yet: from the first step on"


def _saved(event: Event, _: int | None) -> str:
    return f"Checkpoint saved at step {event.get('step')}"


def _working(event: Event, _: int | None) -> str:
    done, count = event.get("done", 0), event.get("count", 0)
    how = ("done" if done else "begun") if count == 1 else f"{done:,} of {count:,}"
    return f"{str(event.get('what')).capitalize()}: {how}"


_SENTENCES: dict[str, Callable[[Event, int | None], str]] = {
    "run_started": partial(_say, "The trainer has started (attempt {attempt} at the run)"),
    "planned": _planned,
    "data_ready": _counted,
    "engine_loaded": partial(_say, "The model is loaded: {trainable:,} parameters to train, in {dtype}"),
    "working": _working,
    "waiting": partial(_say, "Waiting for {what}"),
    "saved_on_service": partial(_say, "Checkpoint {name} lies on the service"),
    "step_done": partial(_say, "Step {step}{of}: training loss {loss:.4f}"),
    "evaluated": partial(_say, "Step {step}{of}: held-out loss {loss:.4f}, token accuracy {token_accuracy:.1%}"),
    "checkpoint_saved": _saved,
    "step_skipped": partial(_say, "Step {step}{of} was skipped: {reason}"),
    "step_replayed": partial(_say, "Step {step}{of} is computed again in smaller parts: {reason}"),
    "checkpoint_broken": partial(_say, "A damaged checkpoint was passed over: {reason}"),
    "memory_measured": partial(_say, "The run took {measured_bytes:,} bytes of memory"),
    "resumed": _resumed,
    "warned": partial(_say, "{message}"),
    "stopped": partial(_say, "Stopped after step {step}, with the state saved"),
    "paused": partial(_say, "The run cannot go on for now: {reason}"),
    "failed": partial(_say, "The run failed: {message}"),
    "finished": partial(_say, "Training is done after step {step}"),
}
