"""The training loop, written once over an engine's verbs: the steps of a course, cut into micro-batches."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

from luthier.data.prepared import Prepared
from luthier.engines.verbs import Computed, Engine, Handle, OutOfMemory, StepParams, StepTaken
from luthier.runs import events
from luthier.runs.checkpoints import CheckpointStore
from luthier.spec.plan import RunPlan
from luthier.training.batches import Item, build_batch, lay_out, share_out
from luthier.training.course import Course, CourseOptions, Outcome, Progress, Sums
from luthier.training.objectives import build_loss, count_units
from luthier.training.schedule import learning_rate


@dataclass(frozen=True)
class _Sent:
    """A step that an engine far away works on."""

    items: list[Item]
    handles: list[Handle[Computed]]
    taken: Handle[StepTaken]
    started: float


class Loop:
    """One run's training over an engine that is loaded."""

    def __init__(
        self,
        plan: RunPlan,
        prepared: Prepared,
        engine: Engine,
        store: CheckpointStore,
        **options: Unpack[CourseOptions],
    ) -> None:
        self._engine = engine
        self._course = Course(plan, prepared, engine, store, **options)
        self._sent: dict[int, _Sent] = {}
        self._read = 0.0

    @property
    def progress(self) -> Progress:
        """What is carried from step to step."""
        return self._course.progress

    def resume(self, step: int, progress: dict[str, Any]) -> None:
        """Go on after a checkpoint; the engine has its weights and state already."""
        self._course.resume(step, progress)

    def run(self) -> Outcome:
        """Train to the end, to an early stop, or until asked to stop; the state is saved in the last case."""
        course = self._course
        take = self._take_step_ahead if self._engine.facts.runs_ahead else self._take_step
        while (step := course.next_step()) is not None:
            if not take(step):
                course.end_stopped()
                break
        return course.close()

    def _take_step(self, step: int) -> bool:
        """Take the step, replaying it where it has to be; False when asked to stop before it was taken."""
        started = time.monotonic()
        course = self._course
        items = course.read_items(step)
        while True:
            sums = self._gather(step, items)
            if sums is None:
                continue
            if sums.is_stopping:
                self._engine.discard_gradients()
                return False
            taken = self._finish_step(step, sums.loss)
            if not taken.replay:
                break
            course.watch(events.StepReplayed(step + 1, "loss scale lowered", course.progress.budget_tokens))
        course.finish_step(step, items, sums, taken, time.monotonic() - started)
        return True

    def _gather(self, step: int, items: Sequence[Item]) -> Sums | None:
        """Loss and gradients of all micro-batches; None when memory ran out and they are to be made smaller."""
        course = self._course
        units = count_units(course.spec.objective, items)
        groups = self._lay_out(items)
        handles = []
        try:
            for group in groups:
                if course.stop:
                    break
                handles.append(self._send(step, group, units))
            return self._add_up(handles, units)
        except OutOfMemory as error:
            self._engine.discard_gradients()
            course.halve(step, groups, max(sum(item.tokens for item in group) for group in groups), error)
            return None

    def _lay_out(self, items: Sequence[Item]) -> list[list[Item]]:
        course, progress = self._course, self._course.progress
        return lay_out(
            share_out(items, *course.share),
            budget_tokens=progress.budget_tokens,
            micro_batch=progress.micro_batch,
        )

    def _send(self, step: int, group: list[Item], units: int) -> Handle[Computed]:
        """One micro-batch on its way."""
        course = self._course
        batch = build_batch(group, step=step)
        if course.hear:
            for part in batch.alone():
                course.hear(step, part.tokens, part.sources + 1)
        loss = build_loss(course.spec.objective, group, batch, scale=1.0 / units, references=course.references)
        return self._engine.forward_backward(batch, loss)

    def _add_up(self, handles: Sequence[Handle[Computed]], units: int) -> Sums:
        """What the micro-batches come to, once all are there."""
        value, metrics = 0.0, dict[str, float]()
        for handle in handles:
            computed = handle.result()
            value += computed.value
            for name, each in computed.metrics.items():
                metrics[name] = metrics.get(name, 0.0) + each
        return self._course.add_up(value, metrics, units)

    def _finish_step(self, step: int, loss: float) -> StepTaken:
        if not math.isfinite(loss):
            self._engine.discard_gradients()
            return StepTaken(False, math.nan)
        self._course.let_save()
        return self._engine.optim_step(self._params(step)).result()

    def _params(self, step: int) -> StepParams:
        course, optim = self._course, self._course.spec.optim
        rate = learning_rate(step, course.plan.steps, optim)
        return StepParams(rate, optim.weight_decay, optim.max_grad_norm)

    # -- an engine far away ------------------------------------------------------------------------------------

    def _take_step_ahead(self, step: int) -> bool:
        """Send the step after this one, where nothing lies between them, before the results of this one are read.

        A step that was sent is taken: only before that a stop keeps it from being.
        """
        course = self._course
        sent = self._sent.pop(step, None)
        if sent is None and course.stop:
            return False
        sent = sent or self._send_step(step)
        if course.goes_straight_on(step + 1):
            self._sent[step + 1] = self._send_step(step + 1)
        sums = self._add_up(sent.handles, count_units(course.spec.objective, sent.items))
        taken = sent.taken.result()
        if not math.isfinite(sums.loss):
            taken = StepTaken(False, taken.grad_norm)
        now = time.monotonic()
        seconds, self._read = now - max(sent.started, self._read), now
        course.finish_step(step, sent.items, sums, taken, seconds)
        return True

    def _send_step(self, step: int) -> _Sent:
        """A whole step on its way, the optimizer's part with it."""
        started = time.monotonic()
        items = self._course.read_items(step)
        units = count_units(self._course.spec.objective, items)
        handles = [self._send(step, group, units) for group in self._lay_out(items)]
        return _Sent(items, handles, self._engine.optim_step(self._params(step)), started)
