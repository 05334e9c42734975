"""However a step is cut up, each example is computed once, and each token is predicted from what is before it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.engines.verbs import Batch
from luthier.spec.objective import (
    DpoObjective,
    Objective,
    OrpoObjective,
    PretrainObjective,
    SftObjective,
    SimpoObjective,
)
from luthier.training.batches import Item, build_batch, lay_out, share_out
from luthier.training.objectives import REWARDS, build_loss, count_units, is_paired, metric_names

tokens = st.lists(st.integers(0, 9), min_size=2, max_size=14)


@st.composite
def item(draw: st.DrawFn, example: int, *, is_pair: bool) -> Item:
    """Sequences, which begin alike where they are a pair, and places of trained tokens; never the first token."""
    start = draw(tokens) if is_pair else []
    sequences = [np.array(start + draw(tokens), np.int64) for _ in range(1 + is_pair)]
    trained = [
        np.array(sorted(draw(st.sets(st.integers(1, len(each) - 1), min_size=1))), np.int64) for each in sequences
    ]
    return Item(example, tuple(sequences), tuple(trained))


@st.composite
def items(draw: st.DrawFn, *, is_pair: bool, most: int = 9) -> list[Item]:
    return [draw(item(example, is_pair=is_pair)) for example in range(draw(st.integers(1, most)))]


either = st.booleans().flatmap(lambda is_pair: items(is_pair=is_pair))


@given(either, st.integers(1, 60), st.none() | st.integers(1, 10))
def test_every_example_is_in_one_micro_batch(found: list[Item], budget: int, micro_batch: int | None) -> None:
    groups = lay_out(found, budget_tokens=budget, micro_batch=micro_batch)
    assert sorted(each.example for group in groups for each in group) == list(range(len(found)))
    for group in groups:
        assert group
        if micro_batch is not None:
            assert len(group) <= micro_batch
        else:
            assert len(group) == 1 or sum(each.tokens for each in group) <= budget


@given(either, st.integers(1, 5))
def test_processes_share_a_step_without_rest_or_overlap(found: list[Item], count: int) -> None:
    shares = [share_out(found, rank, count) for rank in range(count)]
    assert sorted(each.example for share in shares for each in share) == list(range(len(found)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    again = [share_out(found[::-1], rank, count) for rank in range(count)]
    assert [{each.example for each in share} for share in again] == [
        {each.example for each in share} for share in shares
    ]


@given(st.lists(st.integers(1, 100), min_size=4, max_size=40), st.integers(2, 4))
def test_the_work_is_shared_evenly(lengths: list[int], count: int) -> None:
    found = [Item(number, (np.zeros(each, np.int64),), (np.zeros(0, np.int64),)) for number, each in enumerate(lengths)]
    work = [sum(each.tokens for each in share_out(found, rank, count)) for rank in range(count)]
    assert max(work) - min(work) <= 2 * max(lengths)


@given(either, st.integers(0, 5))
def test_a_batch_holds_each_sequence_with_what_is_before_it(found: list[Item], step: int) -> None:
    batch = build_batch(found, step=step)
    alone = batch.alone()
    sequences = [sequence for each in found for sequence in each.sequences]
    trained = [places for each in found for places in each.trained]
    assert len(alone) == len(sequences)
    for part, sequence, places in zip(alone, sequences, trained, strict=True):
        assert part.tokens.tolist() == sequence.tolist()
        assert part.positions.tolist() == list(range(len(sequence)))
        assert part.sources.tolist() == (places - 1).tolist()
        assert part.targets.tolist() == sequence[places].tolist()
    assert len(batch.tokens) == sum(each.tokens for each in found)
    assert len(batch.targets) == sum(each.trained_tokens for each in found)
    assert batch.step == step
    assert len(set(batch.keys.tolist())) == len(sequences)
    check_sources(batch)


def check_sources(batch: Batch) -> None:
    """The token at a source, and its position, are those right before the target."""
    for number in range(len(batch.offsets) - 1):
        chosen = slice(int(batch.offsets[number]), int(batch.offsets[number + 1]))
        (start, stop), (first, last) = batch.segments[number].tolist(), batch.prefixes[number].tolist()
        for source in batch.sources[chosen].tolist():
            assert start <= source < stop or first <= source < last


def test_a_pair_shares_its_prompt_and_one_token_is_always_its_own() -> None:
    prompt = [1, 2, 3]
    pair = Item(7, (np.array([*prompt, 4, 5]), np.array([*prompt, 4, 6, 7])), (np.array([3, 4]), np.array([3, 4, 5])))
    assert pair.shared == 4
    assert pair.tokens == 5 + 2
    batch = build_batch([pair])
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert batch.segments.tolist() == [[0, 5], [5, 7]]
    assert batch.prefixes.tolist() == [[0, 0], [0, 4]]
    assert batch.sources.tolist() == [2, 3, 2, 3, 5]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 4, 5]
    same = Item(8, (np.array(prompt), np.array(prompt)), (np.array([2]), np.array([2])))
    assert same.shared == 2


OBJECTIVES: tuple[Objective, ...] = (
    SftObjective(),
    PretrainObjective(kind="pretrain"),
    DpoObjective(kind="dpo", label_smoothing=0.1),
    DpoObjective(kind="dpo", loss="ipo"),
    DpoObjective(kind="dpo", length_normalised=True),
    SimpoObjective(kind="simpo"),
    OrpoObjective(kind="orpo"),
)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda each: each.kind)
@given(data=st.data())
def test_the_loss_of_a_step_does_not_know_how_it_was_cut(objective: Objective, data: st.DataObject) -> None:
    found = data.draw(items(is_pair=is_paired(objective)))
    cut = data.draw(st.integers(1, len(found)))
    chance = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    said = {each.example: -3 * chance.random(each.trained_tokens) - 0.01 for each in found}
    base = {each.example: -3 * chance.random(each.trained_tokens) - 0.01 for each in found}
    scale = 1 / count_units(objective, found)

    def compute(group: list[Item]) -> tuple[float, dict[int, Any], dict[str, float]]:
        loss = build_loss(objective, group, build_batch(group), scale=scale, references=lambda item: base[item.example])
        result = loss.compute(np.concatenate([said[each.example] for each in group]))
        if loss.weights is not None:
            assert (result.slope == -loss.weights).all()
        ends = np.cumsum([each.trained_tokens for each in group])[:-1]
        slopes = dict(zip([each.example for each in group], np.split(result.slope * loss.scale, ends), strict=True))
        return result.value * loss.scale, slopes, result.metrics

    value, slopes, metrics = compute(found)
    parts = [compute(found[start : start + cut]) for start in range(0, len(found), cut)]
    assert sum(part[0] for part in parts) == pytest.approx(value)
    for example, slope in slopes.items():
        np.testing.assert_allclose(next(part[1][example] for part in parts if example in part[1]), slope, rtol=1e-9)
    assert tuple(sorted(metrics)) == metric_names(objective) == (REWARDS if is_paired(objective) else ())
    for name, total in metrics.items():
        assert sum(part[2][name] for part in parts) == pytest.approx(total)


def test_units_are_tokens_or_pairs() -> None:
    one = Item(0, (np.arange(5), np.arange(4)), (np.array([2, 3]), np.array([2])))
    assert count_units(SftObjective(), [one, one]) == 6
    assert count_units(OrpoObjective(kind="orpo"), [one, one]) == 2
