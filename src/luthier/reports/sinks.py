"""Event sinks: other places a run's events go to while it trains; none unless named.

The run folder stays the truth. A sink is told of each event, may refuse to be opened, and never stops a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from importlib import import_module
from typing import Protocol

from luthier.errors import CallError
from luthier.runs.events import Evaluated, Event, StepDone
from luthier.runs.run import Run

# Module by name; each has `open_sink(run)`.
SINKS = {"tensorboard": "luthier.reports.tensorboard", "wandb": "luthier.reports.wandb"}
_OF_STEP = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_bytes")
_OF_EVALUATION = ("loss", "perplexity", "token_accuracy")


class EventSink(Protocol):
    """Somewhere that events are told to."""

    def log(self, event: Event) -> None:
        """Take one event; those that mean nothing to the sink are passed over."""

    def close(self) -> None:
        """Write out what is still held."""


class Sinks:
    """Several sinks as one; one that fails is dropped with a warning, because training must go on."""

    def __init__(self, sinks: dict[str, EventSink]) -> None:
        self._sinks = dict(sinks)
        self.failures: dict[str, str] = {}

    def log(self, event: Event) -> None:
        """Tell every sink that still works."""
        for name, sink in list(self._sinks.items()):
            try:
                sink.log(event)
            except Exception as error:  # somebody else's code and network: no failure of theirs is ours
                self._drop(name, error)

    def close(self) -> None:
        """Close them all."""
        for name, sink in list(self._sinks.items()):
            try:
                sink.close()
            except Exception as error:  # as above
                self._drop(name, error)
        self._sinks.clear()

    def _drop(self, name: str, error: Exception) -> None:
        sink = self._sinks.pop(name)
        self.failures[name] = f"{type(error).__name__}: {error}"
        with suppress(Exception):
            sink.close()


def open_sinks(names: Sequence[str], run: Run) -> Sinks:
    """The named sinks for a run; raises when a name is unknown or its package is missing."""
    unknown = [name for name in names if name not in SINKS]
    if unknown:
        raise CallError(f"no sink `{unknown[0]}`", hint=f"there are: {', '.join(SINKS)}")
    opened: dict[str, EventSink] = {}
    with ExitStack() as stack:
        for name in dict.fromkeys(names):
            opened[name] = import_module(SINKS[name]).open_sink(run)
            stack.callback(opened[name].close)
        stack.pop_all()
    return Sinks(opened)


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
