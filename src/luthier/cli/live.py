"""What a person sees while a run trains: one live line, and a line for each thing worth keeping."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import singledispatchmethod
from typing import TYPE_CHECKING, Any

from luthier.cli.ending import exit_code, print_end, print_evidence, span, write_evidence
from luthier.cli.output import (
    SILENT_SECONDS,
    Heartbeat,
    LiveLine,
    heartbeat,
    paint,
    print_json,
    say,
    tell_in_handler,
    warn,
)
from luthier.errors import LuthierError, ProcessDiedError
from luthier.runs import events
from luthier.runs.run import Run
from luthier.training.signals import EXIT_CODES, StopFlag

if TYPE_CHECKING:
    from luthier.workflow import Ready

_GIB = 1 << 30


class Live:
    """Follows the events of a run on stderr; elsewhere than on a terminal with a plain line every few seconds.

    Warnings are shown also where it is `quiet`.
    """

    def __init__(self, steps: int, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.steps, self._quiet = steps, quiet
        self._on_screen = LiveLine(plain_seconds=SILENT_SECONDS, clock=clock)
        self.heart = Heartbeat(self._on_screen, clock=clock)
        self._first_step: int | None = None
        self._seconds = 0.0

    def __enter__(self) -> Live:
        if not self._quiet:
            self.heart.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.heart.__exit__()

    def __call__(self, event: events.Event) -> None:
        self._show(event)

    @singledispatchmethod
    def _show(self, event: events.Event) -> None:
        pass

    @_show.register
    def _(self, event: events.DataReady) -> None:
        self._line("loading the model", keep=False)
        self.heart.doing("loading the model")

    @_show.register
    def _(self, event: events.EngineLoaded) -> None:
        self._line(f"model loaded in {event.seconds:.1f} s: {event.trainable:,} parameters to train, {event.dtype}")
        self.heart.doing("the first step")

    @_show.register
    def _(self, event: events.Working) -> None:
        self._line(f"{event.what}: {event.done:,} of {event.count:,}", keep=event.done == event.count)
        self.heart.doing(event.what)

    @_show.register
    def _(self, event: events.Waiting) -> None:
        state = f" ({event.state}{': ' if event.reason else ''}{event.reason})" if event.state else ""
        self._line(f"waiting for {event.what}, {event.seconds:.0f} s{state}", keep=False)
        self.heart.doing(f"waiting for {event.what}{state}")

    @_show.register
    def _(self, event: events.SavedOnService) -> None:
        self._line(f"saved on the service: {', '.join(event.paths.values())}")

    @_show.register
    def _(self, event: events.Resumed) -> None:
        self._line(f"resumed after step {event.step}" if event.step else "no checkpoint yet: from the first step on")

    @_show.register
    def _(self, event: events.StepDone) -> None:
        if self._first_step is None:
            self._first_step = event.step
        self._seconds += event.seconds
        done = event.step - self._first_step + 1
        left = self._seconds / done * (self.steps - event.step)
        memory = f"  {event.memory_bytes / _GIB:.2f} GiB" if event.memory_bytes else ""
        more = "".join(f"  {name.removeprefix('reward_')} {value:.3g}" for name, value in _worth(event.metrics))
        self._line(
            f"step {event.step}/{self.steps}  loss {event.loss:.4f}{more}  lr {event.learning_rate:.2e}"
            f"  {event.tokens_per_second:,.0f} tok/s  {span(left)} left{memory}",
            keep=event.step in (1, self.steps),
        )
        is_last = event.step == self.steps
        self.heart.doing("writing the results" if is_last else f"after step {event.step}/{self.steps}")

    @_show.register
    def _(self, event: events.Evaluated) -> None:
        more = "".join(f"  {name.removeprefix('reward_')} {value:.3g}" for name, value in _worth(event.metrics))
        best = f"  {paint('best so far', '32')}" if event.is_best else ""
        accuracy = f"  token accuracy {event.token_accuracy:.1%}" if math.isfinite(event.token_accuracy) else ""
        self._line(
            f"step {event.step}: held-out loss {event.loss:.4f}  perplexity {event.perplexity:.3f}"
            f"{accuracy}{more}{best}"
        )

    @_show.register
    def _(self, event: events.StepSkipped) -> None:
        self._clear()
        warn(f"step {event.step} skipped: {event.reason}; rows {', '.join(event.rows[:3])}")

    @_show.register
    def _(self, event: events.StepReplayed) -> None:
        self._clear()
        warn(f"step {event.step} is computed again in smaller parts: {event.reason}")

    @_show.register
    def _(self, event: events.CheckpointBroken) -> None:
        self._clear()
        warn(f"checkpoint passed over: {event.reason}")

    @_show.register
    def _(self, event: events.Warned) -> None:
        self._clear()
        warn(event.message)

    def _line(self, text: str, *, keep: bool = True) -> None:
        if not self._quiet:
            self._on_screen.show(text, keep=keep)

    def _clear(self) -> None:
        self._on_screen.clear()


def _worth(metrics: Any) -> list[tuple[str, float]]:
    return [(name, metrics[name]) for name in ("reward_margin", "reward_accuracy") if name in metrics]


def train_and_tell(
    run: Run, ready: Ready | None = None, *, resume: bool = False, allow_changed: bool = False, as_json: bool = False
) -> int:
    """Train the run, in several processes where its plan says so, and say how it ended; returns the exit code."""
    from luthier.training.launch import run_processes

    processes = run.spec.compute.processes
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        flags = [
            flag for flag, on in (("--resume", resume), ("--allow-changed", allow_changed), ("--json", as_json)) if on
        ]
        try:
            return run_processes(["-m", "luthier.cli.rank", str(run.folder), *flags], processes, run.folder)
        except ProcessDiedError as error:
            error.hint = f"go on from the last checkpoint: luthier resume {run.folder}"
            raise
    return _train_here(run, ready, resume=resume, allow_changed=allow_changed, as_json=as_json)


def _train_here(run: Run, ready: Ready | None, *, resume: bool, allow_changed: bool, as_json: bool) -> int:
    from luthier.workflow import is_complete, reopen, train_run

    if ready is None:
        with heartbeat("planning and looking at the base model", quiet=as_json):
            ready = reopen(run)
    leads = os.environ.get("RANK", "0") == "0"
    stop = StopFlag(_say_stopping if leads else None)
    with _stopped_at_once(run), Live(ready.plan.steps, quiet=as_json or not leads) as live:
        trained = train_run(run, ready, watch=live, stop=stop, resume=resume, allow_changed=allow_changed)
    if leads:
        print_end(run, trained, as_json=as_json)
    if not trained.outcome.is_done:
        return EXIT_CODES[stop.reason or "SIGTERM"]
    if not leads:
        return 0
    return EXIT_CODES[stop.reason] if stop.reason and not is_complete(run) else exit_code(run)


def complete_and_tell(run: Run, *, as_json: bool = False) -> int:
    """Merge and certify a run that is finished, where that was stopped; returns the exit code."""
    from luthier.workflow import complete_run, is_complete

    stop = StopFlag(_say_stopping)
    with _stopped_at_once(run), run.lock(), stop, Live(0, quiet=as_json) as live:
        merged = complete_run(run, watch=live, stop=stop)
    if as_json:
        facts = {"run": run.id, "folder": str(run.folder), "merged": str(merged) if merged else None}
        print_json(facts | write_evidence(run))
    else:
        if merged:
            say(f"  merged   {merged}")
        print_evidence(run)
    return EXIT_CODES[stop.reason] if stop.reason and not is_complete(run) else exit_code(run)


def _say_stopping(name: str) -> None:
    again = "; Ctrl-C again stops at once" if name == "SIGINT" else ""
    tell_in_handler(f"{name}: stopping after this micro-batch, with the state saved{again}")


@contextmanager
def _stopped_at_once(run: Run) -> Iterator[None]:
    """A second Ctrl-C, which waits for nothing."""
    try:
        yield
    except KeyboardInterrupt:
        error = LuthierError(
            "stopped at once: what was done since the last checkpoint is lost",
            hint=f"go on: luthier resume {run.folder}",
        )
        error.exit_code = EXIT_CODES["SIGINT"]
        raise error from None
