"""The training loop, written once over an engine's verbs: the steps of a course, cut into micro-batches."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Unpack

from luthier.data.prepared import Prepared
from luthier.engines.verbs import Engine, OutOfMemory, StepParams, StepTaken
from luthier.runs import events
from luthier.runs.checkpoints import CheckpointStore
from luthier.spec.plan import RunPlan
from luthier.training.batches import Item, build_batch, lay_out, share_out
from luthier.training.course import Course, CourseOptions, Outcome, Progress, Sums
from luthier.training.objectives import build_loss, count_units
from luthier.training.schedule import learning_rate


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
        while (step := course.next_step()) is not None:
            if not self._take_step(step):
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
        objective, progress = course.spec.objective, course.progress
        units = count_units(objective, items)
        groups = lay_out(
            share_out(items, *course.share),
            budget_tokens=progress.budget_tokens,
            micro_batch=progress.micro_batch,
        )
        value, metrics, handles = 0.0, dict[str, float](), []
        try:
            for group in groups:
                if course.stop:
                    break
                batch = build_batch(group, step=step)
                if course.hear:
                    for part in batch.alone():
                        course.hear(step, part.tokens, part.sources + 1)
                loss = build_loss(objective, group, batch, scale=1.0 / units, references=course.references)
                handles.append(self._engine.forward_backward(batch, loss))
            for handle in handles:
                computed = handle.result()
                value += computed.value
                for name, each in computed.metrics.items():
                    metrics[name] = metrics.get(name, 0.0) + each
        except OutOfMemory as error:
            self._engine.discard_gradients()
            course.halve(step, groups, max(sum(item.tokens for item in group) for group in groups), error)
            return None
        return course.add_up(value, metrics, units)

    def _finish_step(self, step: int, loss: float) -> StepTaken:
        course = self._course
        if not math.isfinite(loss):
            self._engine.discard_gradients()
            return StepTaken(False, math.nan)
        optim = course.spec.optim
        rate = learning_rate(step, course.plan.steps, optim)
        params = StepParams(rate, optim.weight_decay, optim.max_grad_norm)
        course.let_save()
        return self._engine.optim_step(params).result()
