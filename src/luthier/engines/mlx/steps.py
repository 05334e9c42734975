"""The optimizer step: fp32 masters and moments for every trained weight, gradients gathered in fp32, steps refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from luthier.engines.mlx.head import Arrays
from luthier.engines.verbs import StepParams, StepTaken

_MOMENTS = ("exp_avg", "exp_avg_sq")
Update = Callable[..., tuple[Arrays, Arrays, Arrays]]


class Masters:
    """What is trained, by name: fp32 masters, and the gradients gathered for them."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = {name: array.astype(mx.float32) for name, array in arrays.items()}
        self.gradients: Arrays = {}
        mx.eval(self.arrays)

    def gather(self, gradients: Arrays) -> Arrays:
        """Add gradients to what is there; the caller evaluates what is returned."""
        before = self.gradients
        self.gradients = {name: before[name] + each if before else each for name, each in gradients.items()}
        return self.gradients

    def clear(self) -> None:
        """Forget the gradients."""
        self.gradients = {}

    def named(self) -> dict[str, np.ndarray[Any, Any]]:
        """Copies, which later steps do not change."""
        return {name: np.array(array) for name, array in self.arrays.items()}


class Stepper:
    """Takes one step at a time over the masters, or refuses to."""

    def __init__(self, kind: str, masters: Masters, *, compiles: bool) -> None:
        self._masters, self._moments, self._count = masters, {name: dict[str, mx.array]() for name in _MOMENTS}, 0
        update = partial(_update, decoupled=kind == "adamw")
        self._update: Update = mx.compile(update) if compiles else update
        self._norm: Callable[[Arrays], mx.array] = mx.compile(_norm) if compiles else _norm

    def step(self, params: StepParams) -> StepTaken:
        """One step by the gradients gathered; refused when they are not finite."""
        gradients = self._masters.gradients
        if not gradients:
            return StepTaken(True, 0.0)
        norm = float(self._norm(gradients).item())
        self._masters.clear()
        if not math.isfinite(norm):
            return StepTaken(False, norm)
        factor = 1.0
        if 0 < params.max_grad_norm < norm:
            factor = params.max_grad_norm / (norm + 1e-6)
        if not self._moments["exp_avg"]:
            zeros = {name: mx.zeros_like(array) for name, array in self._masters.arrays.items()}
            self._moments = {"exp_avg": zeros, "exp_avg_sq": dict(zeros)}
        self._count += 1
        first, second = (self._moments[name] for name in _MOMENTS)
        numbers = mx.array(_numbers(params, self._count, factor), mx.float32)
        masters, first, second = self._update(self._masters.arrays, gradients, first, second, numbers)
        mx.eval(masters, first, second)
        self._masters.arrays, self._moments = masters, {"exp_avg": first, "exp_avg_sq": second}
        return StepTaken(True, norm)

    def state(self) -> dict[str, np.ndarray[Any, Any]]:
        """The optimizer's tensors by name of the weight: `<part>/<name>`."""
        found: dict[str, np.ndarray[Any, Any]] = {"step": np.array([self._count], np.int64)}
        for part, arrays in self._moments.items():
            found |= {f"{part}/{name}": np.array(array) for name, array in arrays.items()}
        return found

    def load_state(self, tensors: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Go on from such tensors."""
        self._count = int(tensors["step"][0])
        self._moments = {
            part: {
                key.removeprefix(f"{part}/"): mx.array(each)
                for key, each in tensors.items()
                if key.startswith(f"{part}/")
            }
            for part in _MOMENTS
        }
        mx.eval(self._moments)


def _norm(gradients: Arrays) -> mx.array:
    return mx.sqrt(sum((mx.square(each).sum() for each in gradients.values()), mx.array(0.0)))


def _numbers(params: StepParams, count: int, factor: float) -> list[float]:
    """What changes from step to step, worked out in full width."""
    (beta1, beta2), rate = params.betas, params.learning_rate
    corrected = rate / (1 - beta1**count)
    return [factor, 1 - beta1, 1 - beta2, corrected, math.sqrt(1 - beta2**count), params.eps, rate, params.weight_decay]


def _update(
    masters: Arrays, gradients: Arrays, first: Arrays, second: Arrays, numbers: mx.array, *, decoupled: bool
) -> tuple[Arrays, Arrays, Arrays]:
    """Adam; AdamW where the decay is `decoupled` from the gradient."""
    factor, new1, new2, corrected, root, eps, rate, decay = (numbers[index] for index in range(8))
    found: tuple[Arrays, Arrays, Arrays] = ({}, {}, {})
    for name, master in masters.items():
        gradient = gradients[name] * factor
        if not decoupled:
            gradient = gradient + decay * master
        mean = first[name] + new1 * (gradient - first[name])
        square = second[name] + new2 * (mx.square(gradient) - second[name])
        kept = master * (1 - rate * decay) if decoupled else master
        stepped = kept - corrected * mean / (mx.sqrt(square) / root + eps)
        for results, result in zip(found, (stepped, mean, square), strict=True):
            results[name] = result
    return found
