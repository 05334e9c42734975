"""The course of a run, whoever takes its steps: what is due between them, their events, checkpoints and bad steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict, Unpack

import numpy as np

from luthier.data.order import step_examples
from luthier.data.prepared import Prepared
from luthier.engines.verbs import Floats, Ints, OutOfMemory, StepTaken, Trainee
from luthier.errors import ModelError, NonFiniteError, OutOfMemoryError
from luthier.runs import events
from luthier.runs.checkpoints import NEEDS, CheckpointStore, SavedCheckpoint
from luthier.spec.method import AdapterKeys
from luthier.spec.plan import RunPlan
from luthier.training.batches import Item, read_item
from luthier.training.evaluation import Scores, evaluate
from luthier.training.objectives import References, metric_names
from luthier.training.passes import Pass, Watch
from luthier.training.schedule import learning_rate
from luthier.training.signals import StopFlag

Hear = Callable[[int, Ints, Ints], None]
"""Told of a sequence of a step that is handed to an engine: its token ids, and the places of those that are trained."""

_SHOWN_ROWS = 8
_BLOCKED_SECONDS = 0.04


@dataclass
class Progress:
    """What the loop carries from step to step; saved with every checkpoint."""

    step: int = 0
    """Steps done, taken or skipped."""
    skipped: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    budget_tokens: int = 0
    micro_batch: int | None = None
    seconds: float = 0.0
    best_step: int | None = None
    best_value: float | None = None
    evaluated_step: int = -1
    evaluations_without_gain: int = 0
    last_loss: float | None = None
    last_scores: dict[str, Any] | None = None


@dataclass(frozen=True)
class Outcome:
    """How the loop ended: `finished`, `early_stop`, or the name of the signal that stopped it."""

    step: int
    reason: str

    @property
    def is_done(self) -> bool:
        """Whether the final weights can be made."""
        return self.reason in ("finished", "early_stop")


@dataclass
class _Saving:
    """How long a save in the background has kept training waiting."""

    blocked_seconds: float = 0.0
    waiting_since: float | None = None

    @property
    def total_seconds(self) -> float:
        """Up to this moment."""
        since = self.waiting_since
        return self.blocked_seconds + (0.0 if since is None else time.monotonic() - since)


@dataclass(frozen=True)
class Sums:
    """What the micro-batches of one step add up to, over all processes; the loss is the step's own."""

    loss: float
    metrics: dict[str, float]
    is_stopping: bool = False


class CourseOptions(TypedDict):
    """Who watches and who may stop a course, its share of each step, and what goes with every checkpoint."""

    watch: Watch
    stop: StopFlag
    share: NotRequired[tuple[int, int]]
    references: NotRequired[References | None]
    hear: NotRequired[Hear | None]
    facts: NotRequired[dict[str, Any]]


class Course:
    """One run's way from step to step."""

    def __init__(
        self,
        plan: RunPlan,
        prepared: Prepared,
        trainee: Trainee,
        store: CheckpointStore,
        **options: Unpack[CourseOptions],
    ) -> None:
        self.plan, self.spec, self.prepared = plan, plan.spec, prepared
        self.watch, self.stop, self.share = options["watch"], options["stop"], options.get("share", (0, 1))
        self.references, self.hear = options.get("references"), options.get("hear")
        self._trainee, self._store = trainee, store
        self._facts = options.get("facts") or {}
        self._saved_steps: set[int] = set()
        self._saving = _Saving()
        self._outcome: Outcome | None = None
        compute, optim = plan.spec.compute, plan.spec.optim
        self.progress = Progress(budget_tokens=compute.micro_batch_tokens or 0, micro_batch=optim.micro_batch)

    def next_step(self) -> int | None:
        """The step to take now, once what is due before it is done; None where the run ends.

        What is due at a step comes before the next one, so that a resumed run does what was left undone.
        """
        progress = self.progress
        if self._is_due(self.spec.evaluate.every_steps) and not self._evaluate():
            self.end_stopped()
            return None
        if self._is_stuck():
            self._end("early_stop")
            return None
        if self._is_due(self.spec.output.save_every_steps):
            self._save()
        if progress.step < self.plan.steps:
            return progress.step
        if self._evaluate():
            self._end("finished")
        else:
            self.end_stopped()
        return None

    def goes_straight_on(self, step: int) -> bool:
        """Whether this step follows the one before it with nothing to be done between them."""
        every = (self.spec.evaluate.every_steps, self.spec.output.save_every_steps)
        return step < self.plan.steps and not self.stop and not any(each and step % each == 0 for each in every)

    def close(self) -> Outcome:
        """How it ended, once everything that was saved is durable."""
        assert self._outcome is not None, "the course has not ended"
        if self._outcome.is_done and isinstance(self.spec.method, AdapterKeys):
            self._save()  # small, and whatever happens while the results are written loses nothing
        self._store.wait()
        return self._outcome

    @property
    def has_ended(self) -> bool:
        """Whether there is no step left to take."""
        return self._outcome is not None

    def _end(self, reason: str) -> None:
        self._outcome = Outcome(self.progress.step, reason)

    def _is_due(self, every_steps: int) -> bool:
        return every_steps > 0 and self.progress.step > 0 and self.progress.step % every_steps == 0

    @property
    def _has_valid(self) -> bool:
        return len(self.prepared.valid) > 0

    # -- one step ----------------------------------------------------------------------------------------------

    def read_items(self, step: int) -> list[Item]:
        """The examples of a step, in their order."""
        chosen = step_examples(
            step, self.plan.train_examples, self.spec.optim.batch, self.spec.seed, last=self.plan.stream_end
        )
        return [read_item(self.prepared, int(example)) for example in self.prepared.train[chosen]]

    def add_up(self, value: float, metrics: dict[str, float], units: int) -> Sums:
        """One process's sums put together with those of the others; one that was asked to stop stops them all."""
        names = metric_names(self.spec.objective)
        values = np.array([float(bool(self.stop)), value, *(metrics.get(name, 0.0) for name in names)])
        total: Floats = self._trainee.sum_over_processes(values)
        means = dict(zip(names, (total[2:] / units).tolist(), strict=True))
        return Sums(float(total[1]) / units, means, bool(total[0]))

    def halve(self, step: int, groups: list[list[Item]], tokens: int, error: OutOfMemory) -> None:
        """Half the micro-batch, twice as many of them: the same optimizer step, in less memory.

        `groups` are the micro-batches that were too large, the largest of them of so many tokens.
        """
        items = [item for group in groups for item in group]
        if all(len(group) == 1 for group in groups):
            longest = max(item.tokens for item in items)
            raise OutOfMemoryError(
                f"step {step + 1}: memory ran out with one row at once ({longest:,} tokens): {error}",
                hint='lower data.max_length, or set compute.recompute = "always"; `luthier plan` itemises the memory',
                details=self.plan.memory.as_dict(),
            )
        progress = self.progress
        if progress.micro_batch is not None:
            progress.micro_batch = max(1, min(progress.micro_batch, len(items)) // 2)
        else:
            progress.budget_tokens = max(1, min(progress.budget_tokens, tokens) // 2)
        self.watch(events.StepReplayed(step + 1, "out of memory", progress.budget_tokens))

    def finish_step(self, step: int, items: Sequence[Item], sums: Sums, taken: StepTaken, seconds: float) -> None:
        """The step was taken, or refused: tell of it and go on to the next."""
        self.progress.step = step + 1
        if taken.taken:
            self._report(step, items, sums, taken, seconds)
        else:
            self._skip(step, items, sums.loss, taken)

    def _report(
        self,
        step: int,
        items: Sequence[Item],
        sums: Sums,
        taken: StepTaken,
        seconds: float,
    ) -> None:
        progress = self.progress
        tokens, trained = sum(item.tokens for item in items), sum(item.trained_tokens for item in items)
        progress.tokens += tokens
        progress.trained_tokens += trained
        progress.seconds += seconds
        progress.last_loss = sums.loss
        self.watch(
            events.StepDone(
                step=step + 1,
                loss=sums.loss,
                learning_rate=learning_rate(step, self.plan.steps, self.spec.optim),
                grad_norm=taken.grad_norm,
                tokens=tokens,
                trained_tokens=trained,
                tokens_per_second=tokens / seconds if seconds else 0.0,
                seconds=seconds,
                memory_bytes=self._trainee.peak_memory_bytes() * (self.share[1] if self.plan.device == "cpu" else 1),
                metrics=sums.metrics,
            )
        )

    def _skip(self, step: int, items: Sequence[Item], loss: float, taken: StepTaken) -> None:
        """A step that was refused: within what may be skipped it is recorded, beyond that the run stops before it."""
        what = "loss" if not math.isfinite(loss) else "gradient"
        rows = ["{}:{}".format(*self.prepared.row_of(item.example)) for item in items]
        self.watch(events.StepSkipped(step + 1, f"non-finite {what}", rows))
        if self.progress.skipped < self.spec.optim.max_skipped_steps:
            self.progress.skipped += 1
            return
        self.progress.step = step
        if not self._trainee.facts.runs_ahead:  # there it has gone on from it, and the checkpoint before stands
            self._save(wait=True)
        more = f" and {len(rows) - _SHOWN_ROWS} more" if len(rows) > _SHOWN_ROWS else ""
        raise NonFiniteError(
            f"step {step + 1}: the {what} is not finite; its rows: {', '.join(rows[:_SHOWN_ROWS])}{more}",
            hint="look at those rows, lower optim.learning_rate, or allow some with optim.max_skipped_steps",
            details={"step": step + 1, "rows": rows, "loss": repr(loss), "grad_norm": repr(taken.grad_norm)},
        )

    # -- evaluation --------------------------------------------------------------------------------------------

    def _evaluate(self) -> bool:
        """Measure the held-out part, once at a step; False when asked to stop on the way."""
        if not self._has_valid or self.progress.evaluated_step == self.progress.step:
            return True
        budget = self.progress.budget_tokens or int(self.prepared.example_lengths.max())
        way = Pass("evaluation", budget, self.share, self.stop, self.watch)
        scores = evaluate(self._trainee, self.prepared, self.spec.objective, self.references, way)
        if scores is None:
            return False
        self._note(scores)
        return True

    def _note(self, scores: Scores) -> None:
        progress, spec = self.progress, self.spec
        value = scores.by_name(spec.evaluate.best_metric)
        best = math.inf if progress.best_value is None else progress.best_value
        is_best = math.isfinite(value) and value < best - spec.evaluate.min_improvement
        progress.evaluated_step = progress.step
        progress.last_scores = scores.as_dict()
        progress.evaluations_without_gain = 0 if is_best else progress.evaluations_without_gain + 1
        if is_best:
            progress.best_value, progress.best_step = value, progress.step
        self.watch(events.Evaluated(step=progress.step, is_best=is_best, **asdict(scores)))
        if is_best and spec.evaluate.keep == "best":
            self._save()

    def _is_stuck(self) -> bool:
        patience = self.spec.evaluate.early_stop_patience
        return patience is not None and self.progress.evaluations_without_gain >= patience

    # -- checkpoints -------------------------------------------------------------------------------------------

    def end_stopped(self) -> None:
        """Asked to stop: the state as it stands is saved, and the course ends here."""
        if self.progress.step > 0:
            self._save(wait=True)
        reason = self.stop.reason or "SIGTERM"
        self.watch(events.Stopped(self.progress.step, reason))
        self._end(reason)

    def _save(self, *, wait: bool = False) -> None:
        """Save the state as it stands; the copy is made here, the writing goes on beside training."""
        rank, _ = self.share
        step = self.progress.step
        started = time.monotonic()
        self._store.wait()
        if rank != 0 or step in self._saved_steps:
            return
        weights, state = self._trainee.save("weights"), self._trainee.save("state")
        best = self.progress.best_step if self.spec.evaluate.keep == "best" else None
        needs = [] if best is None else [best]
        facts = {**self._facts, "progress": asdict(self.progress), NEEDS: needs}
        saving = self._saving = _Saving(time.monotonic() - started)

        def write_weights(folder: Path) -> None:
            try:
                weights.write(folder)
            except ModelError as error:
                raise NonFiniteError(
                    f"after step {step} the weights cannot be saved: {error.message.partition(': ')[2]}",
                    hint="lower optim.learning_rate; the checkpoint before is untouched",
                ) from None

        def tell(saved: SavedCheckpoint) -> None:
            self.watch(events.CheckpointSaved(saved.step, saving.total_seconds, saved.seconds, saved.size_bytes))

        if wait or weights.is_live:
            saving.waiting_since = time.monotonic()
            tell(self._store.save(step, write_weights, state.write, facts))
        else:
            self._store.save_in_background(step, write_weights, state.write, facts, on_saved=tell)
        self._saved_steps.add(step)

    def let_save(self) -> None:
        """Before another step is done, give the save of the one before a moment to be durable.

        A kill costs the steps since the last durable checkpoint, so one that is nearly there is worth the moment.
        """
        saving = self._saving
        left = _BLOCKED_SECONDS - saving.blocked_seconds
        if left > 0 and self._store.is_saving:
            started = saving.waiting_since = time.monotonic()
            self._store.wait(left)
            saving.blocked_seconds, saving.waiting_since = saving.blocked_seconds + time.monotonic() - started, None

    def resume(self, step: int, progress: dict[str, Any]) -> None:
        """Go on after a checkpoint; the engine has its weights and state already."""
        asked, self.progress = self.progress, Progress(**progress)
        # What memory once refused stays refused; a plan that was made smaller since is followed.
        self.progress.budget_tokens = _least(self.progress.budget_tokens, asked.budget_tokens) or 0
        self.progress.micro_batch = _least(self.progress.micro_batch, asked.micro_batch)
        self._saved_steps.add(step)


def _least(*values: int | None) -> int | None:
    return min((value for value in values if value), default=None)
