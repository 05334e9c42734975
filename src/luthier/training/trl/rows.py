"""Micro-batches as TRL's trainers take them: rows padded on the right, the trained tokens marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from luthier.engines.verbs import Floats
from luthier.training.batches import Item

_IGNORED = -100
Ints = npt.NDArray[np.int64]


def count_padded(items: Sequence[Item]) -> int:
    """Tokens that some items take as rows of one length."""
    return sum(len(item.sequences) for item in items) * max((_longest(item) for item in items), default=0)


def _longest(item: Item) -> int:
    return max(len(sequence) for sequence in item.sequences)


def lay_out_rows(items: Sequence[Item], *, budget_tokens: int, micro_batch: int | None) -> list[list[Item]]:
    """The micro-batches of a step, like lengths together: so many items each, or as many as the budget holds padded."""
    groups: list[list[Item]] = []
    for item in sorted(items, key=lambda item: (-_longest(item), item.example)):
        fits = bool(groups) and (
            len(groups[-1]) < micro_batch if micro_batch else count_padded([*groups[-1], item]) <= budget_tokens
        )
        if fits:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def build_imitation(items: Sequence[Item]) -> dict[str, Tensor]:
    """What SFTTrainer computes a loss from."""
    rows = [(item.sequences[0], item.trained[0]) for item in items]
    tokens, attended = pad([tokens for tokens, _ in rows])
    labels = torch.full_like(tokens, _IGNORED)
    for number, (sequence, trained) in enumerate(rows):
        labels[number, trained] = torch.from_numpy(sequence[trained])
    return {"input_ids": tokens, "attention_mask": attended, "labels": labels}


def build_preference(items: Sequence[Item], references: Sequence[Floats]) -> dict[str, Tensor]:
    """What DPOTrainer computes a loss from: the chosen answers, then the rejected ones, and what the reference says."""
    order = [(item, side) for side in (0, 1) for item in items]
    tokens, attended = pad([item.sequences[side] for item, side in order])
    trained = torch.zeros_like(tokens)
    for number, (item, side) in enumerate(order):
        trained[number, item.trained[side]] = 1
    first = [len(item.trained[0]) for item in items]
    sums = [(each[:end].sum(), each[end:].sum()) for each, end in zip(references, first, strict=True)]
    chosen, rejected = torch.tensor(sums, dtype=torch.float32).T
    return {
        "input_ids": tokens,
        "attention_mask": attended,
        "completion_mask": trained,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }


def read_rows(rows: dict[str, Tensor]) -> Iterator[tuple[Ints, Ints]]:
    """The sequences of a micro-batch without their padding, and which of their tokens are trained."""
    trained = rows["labels"] != _IGNORED if "labels" in rows else rows["completion_mask"] == 1
    for tokens, attended, chosen in zip(rows["input_ids"], rows["attention_mask"], trained, strict=True):
        yield tokens[attended == 1].numpy(), torch.nonzero(chosen)[:, 0].numpy()


def gather_pairs(items: Sequence[Item], logprobs: Tensor) -> Floats:
    """Log-probabilities of such a micro-batch in the order of our losses: each item's chosen and rejected tokens."""
    found = logprobs.detach().double().cpu().numpy()
    count = len(items)
    return np.concatenate(
        [found[place + side * count, item.trained[side] - 1] for place, item in enumerate(items) for side in (0, 1)]
    )


def pad(sequences: Sequence[Ints]) -> tuple[Tensor, Tensor]:
    """Token ids as rows of one length, and which of them are there."""
    width = max(len(each) for each in sequences)
    tokens = torch.zeros(len(sequences), width, dtype=torch.long)
    attended = torch.zeros_like(tokens)
    for number, each in enumerate(sequences):
        tokens[number, : len(each)] = torch.from_numpy(np.ascontiguousarray(each))
        attended[number, : len(each)] = 1
    return tokens, attended
