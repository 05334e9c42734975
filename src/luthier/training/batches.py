"""From prepared examples to micro-batches: one step's examples laid out, pairs with their prompt shared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from luthier.data.pack import lay_out_step
from luthier.data.prepared import Prepared
from luthier.engines.verbs import Batch

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Item:
    """One example as it is computed: its sequences, the places that are trained, and what the sequences share."""

    example: int
    sequences: tuple[Ints, ...]
    trained: tuple[Ints, ...]
    """Places of the trained tokens of each sequence; the first token of a sequence has nothing that predicts it."""

    @cached_property
    def shared(self) -> int:
        """Tokens that the second sequence of a pair need not compute again: the prompt."""
        if len(self.sequences) < 2:
            return 0
        first, second = self.sequences
        most = min(len(first), len(second)) - 1
        differ = np.flatnonzero(first[:most] != second[:most])
        return int(differ[0]) if len(differ) else most

    @property
    def tokens(self) -> int:
        """Tokens computed."""
        return sum(len(sequence) for sequence in self.sequences) - self.shared

    @property
    def trained_tokens(self) -> int:
        """Tokens trained."""
        return sum(len(places) for places in self.trained)


def read_item(prepared: Prepared, example: int) -> Item:
    """An example from the token cache."""
    numbers = prepared.sequences_of(example)
    sequences = tuple(prepared.tokens_of(number).astype(np.int64) for number in numbers)
    trained = (np.flatnonzero(prepared.trained_of(number)) for number in numbers)
    return Item(example, sequences, tuple(places[places > 0] for places in trained))


def lay_out(items: Sequence[Item], *, budget_tokens: int, micro_batch: int | None) -> list[list[Item]]:
    """The micro-batches of a step: so many examples each, or as many as the token budget holds."""
    if micro_batch is not None:
        return [list(items[start : start + micro_batch]) for start in range(0, len(items), micro_batch)]
    groups = lay_out_step([item.tokens for item in items], budget_tokens)
    return [[items[place] for place in group] for group in groups]


def build_batch(items: Sequence[Item], *, step: int = 0) -> Batch:
    """The micro-batch of some items."""
    tokens, segments, prefixes, sources, targets, counts, keys = [], [], [], [], [], [0], []
    end = 0
    for item in items:
        first_start = end
        for number, (sequence, trained) in enumerate(zip(item.sequences, item.trained, strict=True)):
            skipped = item.shared if number else 0
            tokens.append(sequence[skipped:])
            segments.append((end, end + len(sequence) - skipped))
            prefixes.append((first_start, first_start + skipped))
            before = trained - 1
            sources.append(np.where(before < skipped, first_start + before, end + before - skipped))
            targets.append(sequence[trained])
            counts.append(len(trained))
            keys.append(2 * item.example + number)
            end += len(sequence) - skipped
    return Batch(
        np.concatenate(tokens),
        np.array(segments, np.int64),
        np.array(prefixes, np.int64),
        np.concatenate(sources),
        np.concatenate(targets),
        np.cumsum(counts, dtype=np.int64),
        np.array(keys, np.int64),
        step,
    )


def share_out(items: Sequence[Item], rank: int, count: int) -> list[Item]:
    """The items of one process among `count`: long and short ones dealt out evenly, the same way everywhere."""
    if count == 1:
        return list(items)
    dealt = sorted(items, key=lambda item: (-item.tokens, item.example))
    rounds = (dealt[start : start + count] for start in range(0, len(dealt), count))
    turned = (hand if number % 2 == 0 else hand[::-1] for number, hand in enumerate(rounds))
    return [hand[rank] for hand in turned if rank < len(hand)]
