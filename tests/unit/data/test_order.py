"""The order of examples is arithmetic: each epoch whole, each step the next piece of the stream, never changing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.order import count_steps, find_steps, permutation, step_examples

counts = st.integers(1, 60)
batches = st.integers(1, 25)
seeds = st.integers(0, 2**63 - 1)


@given(st.integers(0, 500), seeds, st.integers(0, 9))
def test_each_epoch_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(count, seed, epoch).tolist()) == list(range(count))


@given(counts, batches, seeds, st.integers(1, 4))
def test_steps_of_any_batch_partition_the_stream(count: int, batch: int, seed: int, epochs: int) -> None:
    stream = np.concatenate([permutation(count, seed, epoch) for epoch in range(epochs)])
    steps = count_steps(count, batch, epochs=epochs)
    found = [step_examples(step, count, batch, seed, last=len(stream)) for step in range(steps)]
    assert np.concatenate(found).tolist() == stream.tolist()
    assert all(len(each) == batch for each in found[:-1])
    assert 1 <= len(found[-1]) <= batch
    assert len(step_examples(steps, count, batch, seed, last=len(stream))) == 0


@given(counts, batches, seeds, st.integers(1, 3), st.data())
def test_find_steps_agrees_with_the_steps(count: int, batch: int, seed: int, epochs: int, data: st.DataObject) -> None:
    example = data.draw(st.integers(0, count - 1))
    steps = count_steps(count, batch, epochs=epochs)
    found = [
        step
        for step in range(steps)
        for each in step_examples(step, count, batch, seed, last=count * epochs)
        if each == example
    ]
    assert find_steps(example, count, batch, seed, epochs=epochs) == found


@given(counts, batches, seeds, st.integers(0, 50))
def test_a_step_does_not_depend_on_the_steps_before(count: int, batch: int, seed: int, step: int) -> None:
    whole = np.concatenate([step_examples(each, count, batch, seed) for each in range(step + 1)])
    assert step_examples(step, count, batch, seed).tolist() == whole[step * batch :].tolist()


def test_a_batch_larger_than_the_data_goes_on_into_the_next_epochs() -> None:
    found = step_examples(0, 3, 8, 0).tolist()
    assert found == [*permutation(3, 0, 0), *permutation(3, 0, 1), *permutation(3, 0, 2)[:2]]


def test_seeds_and_epochs_give_other_orders() -> None:
    orders = {tuple(permutation(50, seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


def test_each_place_is_as_likely_as_any_other() -> None:
    places = np.array([int(np.flatnonzero(permutation(10, seed, 0) == 0)[0]) for seed in range(2000)])
    counted = np.bincount(places, minlength=10)
    assert counted.min() > 150
    assert counted.max() < 250


@pytest.mark.parametrize(
    ("count", "batch", "epochs", "steps", "expected"),
    [
        (100, 16, 1.0, 0, 7),
        (96, 16, 1.0, 0, 6),
        (100, 16, 2.0, 0, 13),
        (100, 16, 0.5, 0, 4),
        (3, 16, 0.01, 0, 1),
        (100, 16, 1.0, 3, 3),
        (100, 1, 0.29, 0, 29),
    ],
)
def test_how_many_steps(count: int, batch: int, epochs: float, steps: int, expected: int) -> None:
    assert count_steps(count, batch, epochs=epochs, steps=steps) == expected


def test_the_order_never_changes() -> None:
    assert permutation(100, 0, 0)[:10].tolist() == [45, 29, 48, 71, 40, 25, 83, 19, 51, 95]
    assert permutation(100, 7, 3)[:10].tolist() == [4, 15, 25, 2, 67, 41, 84, 42, 29, 60]
    assert not permutation(100, 0, 0).flags.writeable
