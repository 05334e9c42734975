"""Rectangles of rows: every target is in one place, every row is whole, and shapes come in few sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("mlx.core")
from luthier.engines.mlx.layout import lay_out, rounded_up
from luthier.training.batches import build_batch
from tests.unit.engines.tiny import draw_items

lengths = st.lists(
    st.integers(2, 40) | st.tuples(st.integers(1, 20), st.integers(1, 15), st.integers(1, 15)), min_size=1, max_size=9
)


@given(lengths, st.booleans())
def test_every_target_is_predicted_once_by_the_token_before_it(rows: list, together: bool) -> None:
    items = draw_items(*rows)
    batch = build_batch(items)
    sequences = [sequence for item in items for sequence in item.sequences]
    seen = []
    for part in lay_out(batch, together=together):
        assert together or len(part.places) == 1
        tokens = batch.tokens[part.places]
        for row, column, target in zip(part.rows, part.columns, part.targets, strict=True):
            number = int(np.searchsorted(batch.offsets, target, side="right")) - 1
            whole = sequences[number]
            assert np.array_equal(tokens[row, : len(whole)], whole)
            assert whole[column + 1] == batch.targets[target]
            seen.append(int(target))
    assert sorted(seen) == list(range(len(batch.targets)))


@given(lengths)
def test_little_is_padding(rows: list) -> None:
    items = draw_items(*rows)
    for part in lay_out(build_batch(items)):
        rows_of = [int((part.places[row] != 0).sum()) + 1 for row in range(len(part.places))]
        assert min(rows_of) >= 0.7 * part.places.shape[1] - 2


def test_round_numbers_are_few_and_near() -> None:
    sizes = {rounded_up(count, 32, 4) for count in range(1, 4097)}
    assert len(sizes) <= 4 * 7 + 4
    assert all(count <= rounded_up(count, 32, 4) <= max(32, 1.25 * count + 32) for count in range(1, 4097))
    assert [rounded_up(count, 1, 2) for count in range(1, 14)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
