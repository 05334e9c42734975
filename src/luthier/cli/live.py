"""What a person sees while a run trains: one live line, and a line for each thing worth keeping."""

from __future__ import annotations

import os
from functools import singledispatchmethod
from typing import TYPE_CHECKING, Any

from luthier.cli.output import LiveLine, paint, print_json, say, warn
from luthier.runs import events
from luthier.runs.run import Run

if TYPE_CHECKING:
    from luthier.training.session import Trained
    from luthier.workflow import Ready

_GIB = 1 << 30
_PLAIN_SECONDS = 5.0


class Live:
    """Follows the events of a run on stderr; elsewhere than on a terminal with a plain line every few seconds."""

    def __init__(self, steps: int, *, quiet: bool = False) -> None:
        self._steps, self._quiet = steps, quiet
        self._on_screen = LiveLine(plain_seconds=_PLAIN_SECONDS)
        self._first_step: int | None = None
        self._seconds = 0.0

    def __call__(self, event: events.Event) -> None:
        if not self._quiet:
            self._show(event)

    @singledispatchmethod
    def _show(self, event: events.Event) -> None:
        pass

    @_show.register
    def _(self, event: events.DataReady) -> None:
        self._line("loading the model", keep=False)

    @_show.register
    def _(self, event: events.EngineLoaded) -> None:
        self._line(f"model loaded in {event.seconds:.1f} s: {event.trainable:,} parameters to train, {event.dtype}")

    @_show.register
    def _(self, event: events.Working) -> None:
        self._line(f"{event.what}: {event.done:,} of {event.count:,}", keep=event.done == event.count)

    @_show.register
    def _(self, event: events.Resumed) -> None:
        self._line(f"resumed after step {event.step}")

    @_show.register
    def _(self, event: events.StepDone) -> None:
        if self._first_step is None:
            self._first_step = event.step
        self._seconds += event.seconds
        done = event.step - self._first_step + 1
        left = self._seconds / done * (self._steps - event.step)
        more = "".join(f"  {name.removeprefix('reward_')} {value:.3g}" for name, value in _worth(event.metrics))
        self._line(
            f"step {event.step}/{self._steps}  loss {event.loss:.4f}{more}  lr {event.learning_rate:.2e}"
            f"  {event.tokens_per_second:,.0f} tok/s  {_span(left)} left  {event.memory_bytes / _GIB:.2f} GiB",
            keep=event.step in (1, self._steps),
        )

    @_show.register
    def _(self, event: events.Evaluated) -> None:
        more = "".join(f"  {name.removeprefix('reward_')} {value:.3g}" for name, value in _worth(event.metrics))
        best = f"  {paint('best so far', '32')}" if event.is_best else ""
        self._line(
            f"step {event.step}: held-out loss {event.loss:.4f}  perplexity {event.perplexity:.3f}"
            f"  token accuracy {event.token_accuracy:.1%}{more}{best}"
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
        self._on_screen.show(text, keep=keep)

    def _clear(self) -> None:
        self._on_screen.clear()

    def close(self) -> None:
        """Leave the terminal as it was found."""
        self._clear()


def _worth(metrics: Any) -> list[tuple[str, float]]:
    return [(name, metrics[name]) for name in ("reward_margin", "reward_accuracy") if name in metrics]


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


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
        return run_processes(["-m", "luthier.cli.rank", str(run.folder), *flags], processes, run.folder)
    return _train_here(run, ready, resume=resume, allow_changed=allow_changed, as_json=as_json)


def _train_here(run: Run, ready: Ready | None, *, resume: bool, allow_changed: bool, as_json: bool) -> int:
    from luthier.training.signals import EXIT_CODES, StopFlag
    from luthier.workflow import reopen, train_run

    ready = ready or reopen(run)
    leads = os.environ.get("RANK", "0") == "0"
    live = Live(ready.plan.steps, quiet=as_json or not leads)
    try:
        trained = train_run(run, ready, watch=live, stop=StopFlag(), resume=resume, allow_changed=allow_changed)
    finally:
        live.close()
    if leads:
        _print_end(run, trained, as_json=as_json)
    return 0 if trained.outcome.is_done else EXIT_CODES[trained.outcome.reason]


def _print_end(run: Run, trained: Trained, *, as_json: bool) -> None:
    progress, outcome = trained.progress, trained.outcome
    if as_json:
        print_json(
            {
                "run": run.id,
                "folder": str(run.folder),
                "model": run.model_id,
                "state": outcome.reason,
                "step": outcome.step,
                "loss": progress.last_loss,
                "valid": progress.last_scores,
                "tokens": progress.tokens,
                "seconds": progress.seconds,
                "final": str(trained.final) if trained.final else None,
                "merged": str(trained.merged) if trained.merged else None,
            }
        )
        return
    if not outcome.is_done:
        say(f"stopped by {outcome.reason} at step {outcome.step}; the state is saved")
        say(f"go on:  luthier resume {run.folder}")
        return
    why = "" if outcome.reason == "finished" else " (stopped early: the held-out part no longer got better)"
    speed = progress.tokens / progress.seconds if progress.seconds else 0.0
    say(f"{paint('done', '32')} after {outcome.step} steps{why}")
    say(f"  weights  {trained.final}")
    if trained.merged:
        say(f"  merged   {trained.merged}")
    say(f"  model    {run.model_id}")
    say(f"  cost     {_span(progress.seconds)} of training, {progress.tokens:,} tokens, {speed:,.0f} tokens/s")
    say(f"next:  luthier evaluate {run.folder} --data FILE")
