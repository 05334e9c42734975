"""A whole job by a trainer of TRL: it is fed the steps of a course, and what it does is looked at on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from luthier.data.hashes import mix
from luthier.data.prepared import Prepared
from luthier.engines.torch.memory import memory_errors
from luthier.engines.verbs import OutOfMemory, StepTaken
from luthier.runs.checkpoints import CheckpointStore
from luthier.spec.plan import RunPlan
from luthier.training.batches import Item, build_batch, share_out
from luthier.training.course import Course, CourseOptions, Outcome, Progress, Sums
from luthier.training.objectives import build_loss, count_units, is_paired
from luthier.training.trl.engine import TrlEngine
from luthier.training.trl.rows import (
    build_imitation,
    build_preference,
    count_padded,
    gather_pairs,
    lay_out_rows,
    read_rows,
)
from luthier.training.trl.trainers import quiet


class _Stopped(Exception):
    """Asked to stop within a step, which is not taken."""


class _Taking:
    """The step that is being taken."""

    def __init__(self, step: int, items: list[Item], sums: Sums, started: float) -> None:
        self.step, self.items, self.sums, self.started = step, items, sums, started
        self.taken = StepTaken(False, math.nan)


class Job:
    """One run's training by TRL, with the same course as the loop's."""

    def __init__(
        self,
        plan: RunPlan,
        prepared: Prepared,
        engine: TrlEngine,
        store: CheckpointStore,
        **options: Unpack[CourseOptions],
    ) -> None:
        self._engine, self._trainer = engine, engine.trainer
        self._course = Course(plan, prepared, engine, store, **options)
        self._taking: _Taking | None = None
        self._said: Tensor | None = None

    @property
    def progress(self) -> Progress:
        """What is carried from step to step."""
        return self._course.progress

    def resume(self, step: int, progress: dict[str, Any]) -> None:
        """Go on after a checkpoint; the engine has its weights and state already."""
        self._course.resume(step, progress)

    def run(self) -> Outcome:
        """Train to the end, to an early stop, or until asked to stop; the state is saved in the last case."""
        course, trainer = self._course, self._trainer
        left = course.plan.steps - course.progress.step
        trainer.steps, trainer.first_step, trainer.args.max_steps = self, course.progress.step, left
        hook = trainer.model.register_forward_hook(self._listen)
        try:
            if left > 0:
                with quiet():
                    trainer.train()
            if not course.has_ended:
                assert course.next_step() is None, "TRL has left a step out"
        except _Stopped:
            course.end_stopped()
        finally:
            hook.remove()
        return course.close()

    def _listen(self, model: Any, arguments: Any, said: Any) -> None:
        """Keep the log-probabilities of the last pass, for what is reported of pairs."""
        if is_paired(self._course.spec.objective):
            self._said = said.log_probs.detach()

    # -- steps, as the trainer asks for them -------------------------------------------------------------------

    def list_steps(self) -> _Feed:
        """The steps that are left, made one by one as they are asked for."""
        return _Feed(self._course)

    def take(self, model: Any, inputs: Any) -> Tensor:
        """Loss and gradients of a step, over all micro-batches and processes."""
        step, started = inputs["step"], time.monotonic()
        items = self._course.read_items(step)
        sums = self._gather(model, step, items)
        while sums is None:
            sums = self._gather(model, step, items)
        if sums.is_stopping:
            self._engine.discard_gradients()
            raise _Stopped
        self._taking = _Taking(step, items, sums, started)
        if math.isfinite(sums.loss):
            self._engine.sum_gradients()
        else:
            self._engine.discard_gradients()
        return torch.tensor(sums.loss, device=self._trainer.args.device)

    def check(self, grad_norm: float) -> float:
        """Refuse a step whose loss or gradient is not finite: without gradients the optimizer moves nothing."""
        taking = self._taking
        assert taking is not None
        if math.isfinite(taking.sums.loss):
            taking.taken = StepTaken(math.isfinite(grad_norm), grad_norm)
        if taking.taken.taken:
            self._course.let_save()
        else:
            self._engine.discard_gradients()
        return grad_norm

    def finish(self) -> None:
        """The optimizer has moved, or was kept from it."""
        taking = self._taking
        assert taking is not None
        self._taking = None
        seconds = time.monotonic() - taking.started
        self._course.finish_step(taking.step, taking.items, taking.sums, taking.taken, seconds)

    def _gather(self, model: Any, step: int, items: Sequence[Item]) -> Sums | None:
        """Loss and gradients of all micro-batches; None when memory ran out and they are to be made smaller."""
        course, progress = self._course, self._course.progress
        groups = lay_out_rows(
            share_out(items, *course.share), budget_tokens=progress.budget_tokens, micro_batch=progress.micro_batch
        )
        units = count_units(course.spec.objective, items)
        value, metrics = 0.0, dict[str, float]()
        # Dropout is drawn from here, so that a step is what it is, wherever the run was resumed.
        torch.manual_seed(_seed(course.spec.seed, step, course.share[0]))
        try:
            for group in groups:
                if course.stop:
                    break
                rows = self._build(group)
                if course.hear:
                    for tokens, places in read_rows(rows):
                        course.hear(step, tokens, places)
                with memory_errors():
                    value += units * self._trainer.add_gradients(model, rows, units)
                for name, each in self._measure(group).items():
                    metrics[name] = metrics.get(name, 0.0) + each
        except OutOfMemory as error:
            self._engine.discard_gradients()
            course.halve(step, groups, max(count_padded(group) for group in groups), error)
            return None
        return course.add_up(value, metrics, units)

    def _build(self, group: list[Item]) -> dict[str, Tensor]:
        if not is_paired(self._course.spec.objective):
            return build_imitation(group)
        references = self._course.references
        assert references is not None
        return build_preference(group, [references(item) for item in group])

    def _measure(self, group: list[Item]) -> dict[str, float]:
        """What is reported of pairs besides their loss, as every engine reports it."""
        objective, said = self._course.spec.objective, self._said
        if said is None:
            return {}
        loss = build_loss(objective, group, build_batch(group), scale=1.0, references=self._course.references)
        return loss.compute(gather_pairs(group, said)).metrics


class _Feed:
    """The steps of a course, as many as are left of its plan; a course may end before."""

    def __init__(self, course: Course) -> None:
        self._course = course

    def __len__(self) -> int:
        return self._course.plan.steps - self._course.progress.step

    def __iter__(self) -> Iterator[dict[str, int]]:
        while (step := self._course.next_step()) is not None:
            yield {"step": step}


def _seed(seed: int, step: int, rank: int) -> int:
    mixed = mix(mix(np.array([step], np.uint64), seed), rank)
    return int(mixed[0] >> np.uint64(1))
