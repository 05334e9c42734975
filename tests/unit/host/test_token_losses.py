"""The losses of Tinker requests: their formulas, their slopes by finite differences, and how data are laid out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.engines.verbs import Floats
from luthier.host.datums import Datum, LossRequest
from luthier.host.tensors import Array
from luthier.host.token_losses import batch_of_datums, build_loss, outputs_of

RANDOM = np.random.default_rng(0)
CONFIG: dict[str, dict[str, float | str]] = {
    "ppo": {"clip_low_threshold": 0.7, "clip_high_threshold": 1.1},
    "dro": {"beta": 0.3},
}


def a_datum(length: int, targets: int | None = None, *, is_policy: bool = False) -> Datum:
    shape = (length,) if targets is None else (length, targets)
    inputs: dict[str, Array] = {"target_tokens": RANDOM.integers(0, 9, shape)}
    if is_policy:
        inputs["logprobs"] = RANDOM.normal(-2, 1, shape).astype(np.float32)
        inputs["advantages"] = RANDOM.normal(0, 1, shape).astype(np.float32)
    else:
        inputs["weights"] = RANDOM.normal(0, 1, shape).astype(np.float32)
    return Datum(RANDOM.integers(0, 9, length), inputs)


def a_request(loss: str) -> LossRequest:
    data = tuple(a_datum(length, is_policy=loss != "cross_entropy") for length in (3, 1, 5))
    return LossRequest("m", 1, data, loss, CONFIG.get(loss, {}))


def expected(loss: str, p: Floats, q: Floats, a: Floats) -> float:
    ratio = np.exp(p - q)
    if loss == "importance_sampling":
        return float(-(ratio * a).sum())
    if loss == "ppo":
        return float(-np.minimum(ratio * a, np.clip(ratio, 0.7, 1.1) * a).sum())
    if loss == "cispo":
        return float(-(np.clip(ratio, 0.8, 1.2) * p * a).sum())
    return float(-(p * a - 0.15 * (p - q) ** 2).sum())


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "dro"])
def test_policy_losses_are_their_formulas_summed_over_all_data(loss: str) -> None:
    request = a_request(loss)
    q, a = (np.concatenate([each.inputs[name] for each in request.data]) for name in ("logprobs", "advantages"))
    p = q + RANDOM.normal(0, 0.5, len(q))
    found = build_loss(request).compute(p)
    assert found.value == pytest.approx(expected(loss, p, q.astype(float), a.astype(float)))
    assert found.metrics["loss:sum"] == found.value
    assert found.metrics["tokens:sum"] == len(q)
    assert ("clipped_tokens:sum" in found.metrics) == (loss in ("ppo", "cispo"))
    assert all(":" in name for name in found.metrics)
    assert build_loss(request).weights is None


@pytest.mark.parametrize("loss", ["cross_entropy", "importance_sampling", "ppo", "dro"])
def test_slopes_are_finite_differences(loss: str) -> None:
    compute = build_loss(a_request(loss)).compute
    p = RANDOM.normal(-2, 1, 9)
    found = [(compute(p + step).value - compute(p - step).value) / 2e-6 for step in 1e-6 * np.eye(len(p))]
    np.testing.assert_allclose(compute(p).slope, found, atol=1e-6)


def test_the_default_clip_is_a_fifth_to_either_side() -> None:
    data = Datum(
        np.array([1, 1, 1]),
        {
            "target_tokens": np.array([1, 1, 1]),
            "logprobs": np.zeros(3, np.float32),
            "advantages": np.ones(3, np.float32),
        },
    )
    p = np.log([0.5, 1.0, 1.5])
    assert build_loss(LossRequest("m", 1, (data,), "ppo")).compute(p).value == pytest.approx(-(0.5 + 1.0 + 1.2))
    cispo = build_loss(LossRequest("m", 1, (data,), "cispo")).compute(p)
    np.testing.assert_allclose(cispo.slope, [-0.8, -1.0, -1.2])
    assert cispo.metrics["clipped_tokens:sum"] == 2


def test_a_ratio_that_overflows_is_told_by_the_value() -> None:
    request = a_request("importance_sampling")
    assert not np.isfinite(build_loss(request).compute(np.full(9, 1e6)).value)


@given(st.lists(st.tuples(st.integers(1, 4), st.none() | st.integers(1, 3)), min_size=1, max_size=4))
def test_data_of_any_widths_share_a_batch_and_get_their_own_back(shapes: list[tuple[int, int | None]]) -> None:
    data = [a_datum(length, targets) for length, targets in shapes]
    batch = batch_of_datums(data)
    total = sum(length for length, _ in shapes)
    width = max((targets for _, targets in shapes if targets is not None), default=None)
    assert batch.targets.shape == ((total,) if width is None else (total, width))
    assert batch.offsets[-1] == len(batch.sources) == len(batch.tokens) == total
    loss = build_loss(LossRequest("m", 1, tuple(data), "cross_entropy"))
    logprobs = RANDOM.normal(-2, 1, batch.targets.shape).astype(np.float32)
    outputs = outputs_of(data, logprobs)
    alone = 0.0
    for datum, output in zip(data, outputs, strict=True):
        assert output["logprobs"].shape == datum.inputs["target_tokens"].shape
        alone -= float((datum.inputs["weights"].astype(float) * output["logprobs"]).sum())
    found = loss.compute(logprobs)
    assert found.value == pytest.approx(alone, abs=1e-9)
    assert loss.weights is not None
    np.testing.assert_array_equal(found.slope, -loss.weights)
    if len(data) > 1:
        again = np.concatenate([each.tokens for each in batch.alone()])
        np.testing.assert_array_equal(again, batch.tokens)


def test_absent_weights_are_ones() -> None:
    datum = Datum(np.array([1, 2]), {"target_tokens": np.array([2, 3])})
    found = build_loss(LossRequest("m", 1, (datum,), "cross_entropy")).compute(np.array([-1.0, -2.0]))
    assert (found.value, found.metrics["tokens:sum"]) == (3.0, 2.0)
