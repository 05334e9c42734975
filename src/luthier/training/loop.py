"""The training loop, written once over an engine's verbs: order, evaluation, checkpoints, signals, bad steps."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from luthier.data.order import step_examples
from luthier.data.prepared import Prepared
from luthier.engines.verbs import Engine, Floats, OutOfMemory, StepParams, StepTaken
from luthier.errors import ModelError, NonFiniteError, OutOfMemoryError
from luthier.runs import events
from luthier.runs.checkpoints import NEEDS, CheckpointStore, SavedCheckpoint
from luthier.spec.method import AdapterKeys
from luthier.spec.plan import RunPlan
from luthier.training.batches import Item, build_batch, lay_out, read_item, share_out
from luthier.training.evaluation import Scores, evaluate
from luthier.training.objectives import References, build_loss, count_units, metric_names
from luthier.training.passes import Pass, Watch
from luthier.training.schedule import learning_rate
from luthier.training.signals import StopFlag

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


@dataclass
class _Sums:
    """What the micro-batches of one step add up to."""

    value: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    stopping: bool = False


class Loop:
    """One run's training over an engine that is loaded."""

    def __init__(
        self,
        plan: RunPlan,
        prepared: Prepared,
        engine: Engine,
        store: CheckpointStore,
        *,
        watch: Watch,
        stop: StopFlag,
        share: tuple[int, int] = (0, 1),
        references: References | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        self._plan, self._spec, self._prepared, self._engine = plan, plan.spec, prepared, engine
        self._store, self._watch, self._stop, self._share = store, watch, stop, share
        self._references = references
        self._facts = facts or {}
        self._saved_steps: set[int] = set()
        self._saving = _Saving()
        compute, optim = plan.spec.compute, plan.spec.optim
        self.progress = Progress(budget_tokens=compute.micro_batch_tokens or 0, micro_batch=optim.micro_batch)

    def run(self) -> Outcome:
        """Train to the end, to an early stop, or until asked to stop; the state is saved in the last case."""
        outcome = self._run()
        if outcome.is_done and isinstance(self._spec.method, AdapterKeys):
            self._save()  # small, and whatever happens while the results are written loses nothing
        self._store.wait()
        return outcome

    def _run(self) -> Outcome:
        progress = self.progress
        # What is due at a step comes before the next one, so that a resumed run does what was left undone.
        while True:
            if self._is_due(self._spec.evaluate.every_steps) and not self._evaluate():
                return self._stopped()
            if self._is_stuck():
                return Outcome(progress.step, "early_stop")
            if self._is_due(self._spec.output.save_every_steps):
                self._save()
            if progress.step >= self._plan.steps:
                break
            if not self._take_step(progress.step):
                return self._stopped()
        if not self._evaluate():
            return self._stopped()
        return Outcome(progress.step, "finished")

    def _is_due(self, every_steps: int) -> bool:
        return every_steps > 0 and self.progress.step > 0 and self.progress.step % every_steps == 0

    @property
    def _has_valid(self) -> bool:
        return len(self._prepared.valid) > 0

    # -- one step ----------------------------------------------------------------------------------------------

    def _take_step(self, step: int) -> bool:
        """Take the step, replaying it where it has to be; False when asked to stop before it was taken."""
        started = time.monotonic()
        examples = self._examples(step)
        items = [read_item(self._prepared, example) for example in examples]
        while True:
            sums = self._gather(step, items)
            if sums is None:
                continue
            if sums.stopping:
                self._engine.discard_gradients()
                return False
            units = count_units(self._spec.objective, items)
            loss = sums.value / units
            taken = self._finish_step(step, loss)
            if taken.replay:
                self._watch(events.StepReplayed(step + 1, "loss scale lowered", self.progress.budget_tokens))
                continue
            break
        self.progress.step = step + 1
        if taken.taken:
            metrics = {name: total / units for name, total in sums.metrics.items()}
            self._report(step, items, loss, taken, metrics, time.monotonic() - started)
        else:
            self._skip(step, examples, loss, taken)
        return True

    def _examples(self, step: int) -> list[int]:
        chosen = step_examples(
            step, self._plan.train_examples, self._spec.optim.batch, self._spec.seed, last=self._plan.stream_end
        )
        return [int(example) for example in self._prepared.train[chosen]]

    def _gather(self, step: int, items: Sequence[Item]) -> _Sums | None:
        """Loss and gradients of all micro-batches; None when memory ran out and they are to be made smaller."""
        scale = 1.0 / count_units(self._spec.objective, items)
        mine = share_out(items, *self._share)
        sums, handles = _Sums(), []
        try:
            for group in self._lay_out(mine):
                if self._stop:
                    break
                batch = build_batch(group, step=step)
                loss = build_loss(self._spec.objective, group, batch, scale=scale, references=self._references)
                handles.append(self._engine.forward_backward(batch, loss))
            for handle in handles:
                computed = handle.result()
                sums.value += computed.value
                for name, value in computed.metrics.items():
                    sums.metrics[name] = sums.metrics.get(name, 0.0) + value
        except OutOfMemory as error:
            self._engine.discard_gradients()
            self._halve(step, mine, error)
            return None
        return self._summed(sums)

    def _lay_out(self, items: Sequence[Item]) -> list[list[Item]]:
        return lay_out(items, budget_tokens=self.progress.budget_tokens, micro_batch=self.progress.micro_batch)

    def _summed(self, sums: _Sums) -> _Sums:
        """Over all processes; one that was asked to stop stops them all."""
        names = metric_names(self._spec.objective)
        values = np.array([float(bool(self._stop)), sums.value, *(sums.metrics.get(name, 0.0) for name in names)])
        total: Floats = self._engine.sum_over_processes(values)
        return _Sums(float(total[1]), dict(zip(names, total[2:].tolist(), strict=True)), bool(total[0]))

    def _halve(self, step: int, items: Sequence[Item], error: OutOfMemory) -> None:
        """Half the micro-batch, twice as many of them: the same optimizer step, in less memory."""
        groups = self._lay_out(items)
        if all(len(group) == 1 for group in groups):
            longest = max(item.tokens for item in items)
            raise OutOfMemoryError(
                f"step {step + 1}: memory ran out with one row at once ({longest:,} tokens): {error}",
                hint='lower data.max_length, or set compute.recompute = "always"; `luthier plan` itemises the memory',
                details=self._plan.memory.as_dict(),
            )
        progress = self.progress
        if progress.micro_batch is not None:
            progress.micro_batch = max(1, min(progress.micro_batch, len(items)) // 2)
        else:
            largest = max(sum(item.tokens for item in group) for group in groups)
            progress.budget_tokens = max(1, min(progress.budget_tokens, largest) // 2)
        self._watch(events.StepReplayed(step + 1, "out of memory", progress.budget_tokens))

    def _finish_step(self, step: int, loss: float) -> StepTaken:
        if not math.isfinite(loss):
            self._engine.discard_gradients()
            return StepTaken(False, math.nan)
        optim = self._spec.optim
        rate = learning_rate(step, self._plan.steps, optim)
        params = StepParams(rate, optim.weight_decay, optim.max_grad_norm)
        self._let_save()
        return self._engine.optim_step(params).result()

    def _report(
        self,
        step: int,
        items: Sequence[Item],
        loss: float,
        taken: StepTaken,
        metrics: dict[str, float],
        seconds: float,
    ) -> None:
        progress = self.progress
        tokens, trained = sum(item.tokens for item in items), sum(item.trained_tokens for item in items)
        progress.tokens += tokens
        progress.trained_tokens += trained
        progress.seconds += seconds
        progress.last_loss = loss
        self._watch(
            events.StepDone(
                step=step + 1,
                loss=loss,
                learning_rate=learning_rate(step, self._plan.steps, self._spec.optim),
                grad_norm=taken.grad_norm,
                tokens=tokens,
                trained_tokens=trained,
                tokens_per_second=tokens / seconds if seconds else 0.0,
                seconds=seconds,
                memory_bytes=self._engine.peak_memory_bytes() * (self._share[1] if self._plan.device == "cpu" else 1),
                metrics=metrics,
            )
        )

    def _skip(self, step: int, examples: Sequence[int], loss: float, taken: StepTaken) -> None:
        """A step that was refused: within what may be skipped it is recorded, beyond that the run stops before it."""
        what = "loss" if not math.isfinite(loss) else "gradient"
        rows = ["{}:{}".format(*self._prepared.row_of(example)) for example in examples]
        self._watch(events.StepSkipped(step + 1, f"non-finite {what}", rows))
        if self.progress.skipped < self._spec.optim.max_skipped_steps:
            self.progress.skipped += 1
            return
        self.progress.step = step
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
        budget = self.progress.budget_tokens or int(self._prepared.example_lengths.max())
        way = Pass("evaluation", budget, self._share, self._stop, self._watch)
        scores = evaluate(self._engine, self._prepared, self._spec.objective, self._references, way)
        if scores is None:
            return False
        self._note(scores)
        return True

    def _note(self, scores: Scores) -> None:
        progress, spec = self.progress, self._spec
        value = scores.by_name(spec.evaluate.best_metric)
        best = math.inf if progress.best_value is None else progress.best_value
        is_best = math.isfinite(value) and value < best - spec.evaluate.min_improvement
        progress.evaluated_step = progress.step
        progress.last_scores = scores.as_dict()
        progress.evaluations_without_gain = 0 if is_best else progress.evaluations_without_gain + 1
        if is_best:
            progress.best_value, progress.best_step = value, progress.step
        self._watch(events.Evaluated(step=progress.step, is_best=is_best, **asdict(scores)))
        if is_best and spec.evaluate.keep == "best":
            self._save()

    def _is_stuck(self) -> bool:
        patience = self._spec.evaluate.early_stop_patience
        return patience is not None and self.progress.evaluations_without_gain >= patience

    # -- checkpoints -------------------------------------------------------------------------------------------

    def _stopped(self) -> Outcome:
        if self.progress.step > 0:
            self._save(wait=True)
        reason = self._stop.reason or "SIGTERM"
        self._watch(events.Stopped(self.progress.step, reason))
        return Outcome(self.progress.step, reason)

    def _save(self, *, wait: bool = False) -> None:
        """Save the state as it stands; the copy is made here, the writing goes on beside training."""
        rank, _ = self._share
        step = self.progress.step
        started = time.monotonic()
        self._store.wait()
        if rank != 0 or step in self._saved_steps:
            return
        weights, state = self._engine.save("weights"), self._engine.save("state")
        best = self.progress.best_step if self._spec.evaluate.keep == "best" else None
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
            self._watch(events.CheckpointSaved(saved.step, saving.total_seconds, saved.seconds, saved.size_bytes))

        if wait or weights.is_live:
            saving.waiting_since = time.monotonic()
            tell(self._store.save(step, write_weights, state.write, facts))
        else:
            self._store.save_in_background(step, write_weights, state.write, facts, on_saved=tell)
        self._saved_steps.add(step)

    def _let_save(self) -> None:
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
