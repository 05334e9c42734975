"""Every loss's slope is the derivative of its value, and known values come out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.training.losses import CONSTANT_SLOPE, LOSSES, LossResult, cross_entropy, dpo, ppo, simpo

TOKENS = 9
OFFSETS = np.array([0, 2, 5, 6, 9])
Loss = Callable[[np.ndarray, np.random.Generator], LossResult]

CASES: dict[str, Loss] = {
    "cross_entropy": lambda p, r: LOSSES["cross_entropy"](p, r.normal(size=TOKENS)),
    "importance_sampling": lambda p, r: LOSSES["importance_sampling"](
        p, p + r.normal(size=TOKENS), r.normal(size=TOKENS)
    ),
    "ppo": lambda p, r: LOSSES["ppo"](p, -r.exponential(size=TOKENS), r.normal(size=TOKENS)),
    "cispo": lambda p, r: LOSSES["cispo"](p, -r.exponential(size=TOKENS), r.normal(size=TOKENS)),
    "dro": lambda p, r: LOSSES["dro"](p, -r.exponential(size=TOKENS), r.normal(size=TOKENS), beta=0.3),
    "dpo": lambda p, r: dpo(p, OFFSETS, -r.exponential(size=TOKENS), beta=0.5),
    "dpo ipo": lambda p, r: dpo(p, OFFSETS, -r.exponential(size=TOKENS), beta=0.5, loss="ipo"),
    "dpo smoothed": lambda p, r: dpo(p, OFFSETS, -r.exponential(size=TOKENS), label_smoothing=0.2),
    "dpo by length": lambda p, r: dpo(p, OFFSETS, -r.exponential(size=TOKENS), beta=2.0, length_normalised=True),
    "simpo": lambda p, r: simpo(p, OFFSETS),
    "orpo": lambda p, r: LOSSES["orpo"](p, OFFSETS, beta=0.7),
}


def test_every_loss_has_a_case() -> None:
    assert len(LOSSES) == 8
    assert {name.split()[0] for name in CASES} == set(LOSSES)


# Importance sampling draws its reference around p: it must stand still while p is moved.
def frozen(name: str, at: np.ndarray, seed: int) -> Callable[[np.ndarray], LossResult]:
    if name == "importance_sampling":
        dice = np.random.default_rng(seed)
        sampled, advantages = at + dice.normal(size=TOKENS), dice.normal(size=TOKENS)
        return lambda p: LOSSES[name](p, sampled, advantages)
    return lambda p: CASES[name](p, np.random.default_rng(seed))


@pytest.mark.parametrize("name", CASES)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_slope_is_the_derivative_of_the_value(name: str, seed: int) -> None:
    at = -np.random.default_rng(seed + 1).exponential(size=TOKENS) - 0.05
    loss = frozen(name, at, seed)
    slope = loss(at).slope
    step = 1e-6
    for index in range(TOKENS):
        moved = np.zeros(TOKENS)
        moved[index] = step
        if name == "cispo":
            # Its weight is held still by definition: the derivative is that of the log-probability alone.
            weight = -loss(at).slope[index]
            assert slope[index] == pytest.approx(-weight)
            continue
        measured = (loss(at + moved).value - loss(at - moved).value) / (2 * step)
        assert slope[index] == pytest.approx(measured, rel=1e-4, abs=1e-5)


def test_losses_that_say_their_slope_is_constant_are_right() -> None:
    for name in CASES:
        if name == "importance_sampling":
            continue
        levels = np.linspace(0.1, 1, TOKENS), np.linspace(2, 0.2, TOKENS)
        slopes = [CASES[name](-level, np.random.default_rng(5)).slope for level in levels]
        assert np.array_equal(*slopes) == (name in CONSTANT_SLOPE)


def test_cross_entropy_of_soft_targets() -> None:
    """K targets a token: the cross-entropy with a distribution."""
    logprobs, target = np.log([[0.5, 0.5], [0.9, 0.1]]), np.array([[1.0, 0.0], [0.5, 0.5]])
    result = cross_entropy(logprobs, target)
    assert result.value == pytest.approx(np.log(2) - 0.5 * np.log(0.09))
    assert np.array_equal(result.slope, -target)


def test_dpo_starts_at_log_two_with_the_policy_at_its_reference() -> None:
    logprobs = -np.arange(1.0, TOKENS + 1)
    result = dpo(logprobs, OFFSETS, logprobs)
    assert result.value == pytest.approx(2 * np.log(2))
    assert result.metrics["reward_margin"] == 0
    assert (result.slope[:2] < 0).all()
    assert (result.slope[2:5] > 0).all()


def test_ppo_gives_no_slope_beyond_its_bounds() -> None:
    sampled = np.zeros(4)
    logprobs = np.log([1.5, 1.1, 0.5, 0.9])
    result = ppo(logprobs, sampled, [1.0, 1.0, -1.0, -1.0])
    assert result.slope.tolist() == [0.0, pytest.approx(-1.1), 0.0, pytest.approx(0.9)]
    assert result.metrics == {"clipped_tokens": 2.0}


@given(st.floats(-400, -1e-9), st.floats(-400, -1e-9))
def test_preference_losses_stay_finite_at_the_edges(chosen: float, rejected: float) -> None:
    logprobs, offsets = np.array([chosen, rejected]), np.array([0, 1, 2])
    for result in (dpo(logprobs, offsets, [-1.0, -1.0]), simpo(logprobs, offsets), LOSSES["orpo"](logprobs, offsets)):
        assert np.isfinite(result.value)
        assert np.isfinite(result.slope).all()


@pytest.mark.parametrize("offsets", [[0, 2], [0, 2, 4], [0, 0, 9], [0, 4, 8]])
def test_pairs_that_do_not_fit_are_refused(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="pairs need"):
        simpo(-np.ones(TOKENS), np.array(offsets))
