"""Event sinks: other places that a run's events go to while it trains; none unless `output.sinks` names it.

The run folder stays the truth. A sink may refuse to be opened, which ends the run before its first step; once it is
open, nothing that goes wrong in it stops the run.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from importlib import import_module
from typing import Protocol

from luthier.errors import CallError, LuthierError, SinkError
from luthier.extras import check_extra
from luthier.runs.events import Evaluated, Event, StepDone, list_secrets, redact
from luthier.runs.run import Run

# Module by name, each with `open_sink(run)` and `find_command(run)`; the extra and its package have the sink's name.
SINKS = {"tensorboard": "luthier.reports.tensorboard", "wandb": "luthier.reports.wandb"}
OnDrop = Callable[[str, str], None]
"""Hears the name of a sink that failed, and why."""
_OF_STEP = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_bytes")
_OF_EVALUATION = ("loss", "perplexity", "token_accuracy")


class EventSink(Protocol):
    """Somewhere that events are told to."""

    def log(self, event: Event) -> None:
        """Take one event; those that mean nothing to the sink are passed over."""

    def close(self) -> None:
        """Write out what is still held."""


class Sinks:
    """Several sinks as one; one that fails is closed and left out from then on, because training must go on."""

    def __init__(self, sinks: dict[str, EventSink], on_drop: OnDrop | None = None) -> None:
        self._sinks = dict(sinks)
        self._on_drop = on_drop
        self._lock = threading.RLock()  # a checkpoint that was saved in the background is told from there

    def log(self, event: Event) -> None:
        """Tell every sink that still works."""
        with self._lock:
            for name, sink in list(self._sinks.items()):
                try:
                    sink.log(event)
                except Exception as error:  # somebody else's code and network: no failure of theirs is ours
                    self._drop(name, error)

    def close(self) -> None:
        """Close them all."""
        with self._lock:
            for name, sink in list(self._sinks.items()):
                try:
                    sink.close()
                except Exception as error:  # as above
                    self._drop(name, error)
            self._sinks.clear()

    def _drop(self, name: str, error: Exception) -> None:
        sink = self._sinks.pop(name)
        with suppress(Exception):
            sink.close()
        if self._on_drop:
            self._on_drop(name, _said(error))


def check_sinks(names: Sequence[str]) -> None:
    """Raise while nothing has been done yet: an unknown name, or a package that is not installed."""
    unknown = [name for name in names if name not in SINKS]
    if unknown:
        raise CallError(f"no sink `{unknown[0]}`", hint=f"there are: {', '.join(SINKS)}")
    for name in names:
        check_extra(name, name)


def open_sinks(names: Sequence[str], run: Run, on_drop: OnDrop | None = None) -> Sinks:
    """The named sinks for a run; SinkError when one refuses."""
    check_sinks(names)
    opened: dict[str, EventSink] = {}
    with ExitStack() as stack:
        for name in dict.fromkeys(names):
            opened[name] = _open(name, run)
            stack.callback(opened[name].close)
        stack.pop_all()
    return Sinks(opened, on_drop)


def _open(name: str, run: Run) -> EventSink:
    try:
        sink: EventSink = import_module(SINKS[name]).open_sink(run)
    except LuthierError:
        raise
    except Exception as error:  # somebody else's code and network
        raise SinkError(
            f"{name} could not be opened for {run.id}: {_said(error)}",
            hint=f"`output.sinks` names it; once {name} works: luthier resume {run.folder}",
        ) from None
    return sink


def _said(error: Exception) -> str:
    said = " ".join(str(error).split())
    return str(redact(f"{type(error).__name__}: {said}"[:300], list_secrets()))


def list_commands(run: Run) -> list[str]:
    """The commands that show what a run's sinks hold; one that is online needs none."""
    commands = [import_module(SINKS[name]).find_command(run) for name in run.spec.output.sinks]
    return [command for command in commands if command]


def list_scalars(event: Event) -> tuple[int, dict[str, float]]:
    """The step and the finite numbers of an event, by the names under which sinks show them; none for most kinds."""
    names: tuple[str, ...]
    if isinstance(event, StepDone):
        prefix, names = "train", _OF_STEP
    elif isinstance(event, Evaluated):
        prefix, names = "valid", _OF_EVALUATION
    else:
        return 0, {}
    numbers = {name: float(getattr(event, name)) for name in names} | dict(event.metrics)
    return event.step, {f"{prefix}/{name}": value for name, value in numbers.items() if math.isfinite(value)}
