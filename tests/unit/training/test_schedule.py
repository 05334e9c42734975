"""The learning rate of each step, by its equations."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.spec.optim import Optim
from luthier.training.schedule import learning_rate

KINDS = ("cosine", "linear", "constant")


def make(schedule: str, warmup: int = 0, rate: float = 1.0) -> Optim:
    return Optim.model_validate({"schedule": schedule, "warmup_steps": warmup, "learning_rate": rate})


def test_cosine_linear_and_constant() -> None:
    for step in range(10):
        assert learning_rate(step, 10, make("cosine")) == pytest.approx((1 + math.cos(math.pi * step / 10)) / 2)
        assert learning_rate(step, 10, make("linear")) == pytest.approx(1 - step / 10)
        assert learning_rate(step, 10, make("constant")) == 1.0


def test_the_warm_up_rises_in_equal_steps_to_the_peak() -> None:
    for kind in KINDS:
        rates = [learning_rate(step, 20, make(kind, 4, 2e-4)) for step in range(20)]
        assert rates[:5] == pytest.approx([0.5e-4, 1e-4, 1.5e-4, 2e-4, 2e-4])
        assert max(rates) == pytest.approx(2e-4)


@given(st.sampled_from(KINDS), st.integers(1, 300), st.integers(0, 40), st.floats(1e-7, 1))
def test_every_step_moves_and_none_beyond_the_peak(kind: str, steps: int, warmup: int, rate: float) -> None:
    warmup = min(warmup, steps)
    rates = [learning_rate(step, steps, make(kind, warmup, rate)) for step in range(steps)]
    assert all(0 < each <= rate * (1 + 1e-12) for each in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_all_steps_may_be_warm_up() -> None:
    assert learning_rate(2, 3, make("cosine", 3)) == 1.0
