"""The split follows from what rows say: not from their order, never through a group, always the wanted number."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.hashes import mix
from luthier.data.split import choose_valid
from luthier.errors import DataError

hashes = st.lists(st.integers(0, 2**64 - 1), unique=True, min_size=2, max_size=80)
seeds = st.integers(0, 2**31)


def values(numbers: list[int]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Hashes as they come from rows."""
    return np.array(numbers, np.uint64)


@given(hashes, seeds, st.data())
def test_the_same_rows_are_held_out_in_any_order(numbers: list[int], seed: int, data: st.DataObject) -> None:
    wanted = data.draw(st.integers(0, len(numbers) - 1))
    turned = data.draw(st.permutations(numbers))
    held, held_turned = (values(each)[choose_valid(values(each), None, wanted, seed)] for each in (numbers, turned))
    assert set(held.tolist()) == set(held_turned.tolist())
    assert len(held) == wanted


@given(hashes, seeds, st.floats(0.001, 0.9))
def test_a_share_is_rounded_up_and_leaves_a_row_to_train(numbers: list[int], seed: int, share: float) -> None:
    expected = min(math.ceil(round(share * len(numbers), 9)), len(numbers) - 1)
    assert choose_valid(values(numbers), None, share, seed).sum() == expected >= 1


@pytest.mark.parametrize(
    ("rows", "share", "expected"),
    [
        (1, 0.5, 0),
        (3, 0.9, 2),
        (30, 0.1, 3),
        (100, 0.05, 5),
        (101, 0.05, 6),
        (10, 0.01, 1),
        (100, 0.07, 7),
        (1000, 0.29, 290),
    ],
)
def test_a_share_is_not_moved_by_rounding_errors(rows: int, share: float, expected: int) -> None:
    assert choose_valid(np.arange(rows, dtype=np.uint64), None, share, 0).sum() == expected


@pytest.mark.parametrize("wanted", [0, 0.0])
def test_nothing_wanted_is_nothing_held_out(wanted: float) -> None:
    assert not choose_valid(values([1, 2, 3]), None, wanted, 0).any()
    assert not choose_valid(values([1, 2, 3]), values([1, 1, 1]), wanted, 0).any()
    assert choose_valid(values([]), None, 5, 0).tolist() == []


@given(hashes, seeds)
def test_the_smallest_seeded_hashes_are_held_out(numbers: list[int], seed: int) -> None:
    wanted = len(numbers) // 2
    mixed = mix(values(numbers), seed)
    held = choose_valid(values(numbers), None, wanted, seed)
    assert sorted(mixed[held].tolist()) == sorted(mixed.tolist())[:wanted]


def test_a_row_more_moves_at_most_one_other() -> None:
    numbers = mix(np.arange(1000, dtype=np.uint64), 1)
    before = set(numbers[:-1][choose_valid(numbers[:-1], None, 50, 0)].tolist())
    after = set(numbers[choose_valid(numbers, None, 50, 0)].tolist())
    assert len(before - after) <= 1


def test_seeds_give_other_splits() -> None:
    numbers = np.arange(50, dtype=np.uint64)
    assert len({tuple(choose_valid(numbers, None, 10, seed)) for seed in range(20)}) == 20


@pytest.mark.parametrize("wanted", [3, 4])
def test_holding_out_everything_is_an_error(wanted: float) -> None:
    with pytest.raises(DataError, match="leaves nothing to train"):
        choose_valid(values([1, 2, 3]), None, wanted, 0)


# -- groups


@given(hashes, seeds, st.data())
def test_no_group_is_on_both_sides_and_the_count_is_within_one_group(
    numbers: list[int], seed: int, data: st.DataObject
) -> None:
    names = data.draw(st.lists(st.integers(0, 9), min_size=len(numbers), max_size=len(numbers)))
    wanted = data.draw(st.integers(1, len(numbers) - 1))
    groups = values(names)
    try:
        held = choose_valid(values(numbers), groups, wanted, seed)
    except DataError as error:
        largest = max(names.count(name) for name in names)
        assert "groups cannot be split" in error.message  # noqa: PT017
        assert wanted > len(numbers) - largest
        return
    assert not set(groups[held].tolist()) & set(groups[~held].tolist())
    largest = max(names.count(name) for name in set(groups[held].tolist()))
    assert wanted <= held.sum() < wanted + largest
    assert not held.all()


@given(hashes, seeds, st.data())
def test_groups_are_held_out_in_any_order(numbers: list[int], seed: int, data: st.DataObject) -> None:
    names = [number % 5 for number in numbers]
    order = data.draw(st.permutations(range(len(numbers))))
    try:
        held = choose_valid(values(numbers), values(names), 1, seed)
    except DataError:
        assert len(set(names)) == 1
        return
    turned = choose_valid(values([numbers[i] for i in order]), values([names[i] for i in order]), 1, seed)
    assert turned.tolist() == [held[i] for i in order]


def test_one_group_cannot_be_split() -> None:
    with pytest.raises(DataError, match="1 groups cannot be split") as caught:
        choose_valid(values([1, 2, 3, 4]), values([7, 7, 7, 7]), 1, 0)
    assert "data.group_by" in caught.value.hint
