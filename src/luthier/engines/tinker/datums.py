"""Micro-batches of packed tokens as the protocol's data, and the log-probabilities that come back for them.

A datum is one sequence whose every place has a target, so a place that asks for nothing gets the next token with
weight zero. A place that is asked for several targets makes its datum two-dimensional; such targets lie sparsely, and
very many of them are spread over several data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from luthier.engines.verbs import Batch, Floats, Ints

MOST_TARGETS = 4096
"""Targets of one place in one datum; more are spread over several."""


@dataclass(frozen=True)
class Asked:
    """One datum in plain arrays: tokens, and for some of its places the targets and where their results belong."""

    tokens: Ints
    rows: Ints
    """The place of each value that is asked for."""
    columns: Ints | None
    """Which of the several targets of that place it is; None where each place has one."""
    targets: Ints
    into: Ints
    """Where its log-probability belongs in the flat array of the batch."""

    @property
    def width(self) -> int:
        """Targets of each place."""
        return 0 if self.columns is None else int(self.columns.max()) + 1


def list_asked(batch: Batch) -> list[Asked]:
    """The data of a batch; sequences that ask for nothing have none."""
    found: list[Asked] = []
    flat = np.arange(batch.targets.size, dtype=np.int64).reshape(batch.targets.shape)
    for number, part in enumerate(batch.alone()):
        if not len(part.sources):
            continue
        into = flat[int(batch.offsets[number]) : int(batch.offsets[number + 1])]
        tokens = part.tokens[: int(part.sources.max()) + 1]
        if part.targets.ndim == 2:
            found += _spread(tokens, part.sources, part.targets, into)
        elif len(np.unique(part.sources)) == len(part.sources):
            found.append(Asked(tokens, part.sources, None, part.targets, into))
        else:
            found.append(Asked(tokens, part.sources, _count_up(part.sources), part.targets, into))
    return found


def _count_up(sources: Ints) -> Ints:
    """How many times each place was met before."""
    seen: dict[int, int] = {}
    found = np.zeros_like(sources)
    for number, source in enumerate(sources.tolist()):
        found[number] = seen.get(source, 0)
        seen[source] = int(found[number]) + 1
    return found


def _spread(tokens: Ints, sources: Ints, targets: Ints, into: Ints) -> list[Asked]:
    found = []
    for start in range(0, targets.shape[1], MOST_TARGETS):
        chosen = targets[:, start : start + MOST_TARGETS]
        width = chosen.shape[1]
        rows, columns = np.repeat(sources, width), np.tile(np.arange(width), len(sources))
        found.append(Asked(tokens, rows, columns, chosen.reshape(-1), into[:, start : start + width].reshape(-1)))
    return found


def build_data(asked: Sequence[Asked], weights: Floats | None) -> list[Any]:
    """The SDK's data; `weights` are those of the flat batch, none where only log-probabilities are wanted."""
    return [_build(each, weights) for each in asked]


def _build(asked: Asked, weights: Floats | None) -> Any:
    from tinker import types

    given = np.zeros(len(asked.into)) if weights is None else weights[asked.into]
    own = given.astype(np.float32)
    if asked.columns is None:
        targets = np.append(asked.tokens[1:], 0).astype(np.int64)
        spread = np.zeros(len(asked.tokens), np.float32)
        targets[asked.rows], spread[asked.rows] = asked.targets, own
        inputs = {"target_tokens": types.TensorData.from_numpy(targets), "weights": types.TensorData.from_numpy(spread)}
    else:
        inputs = {"target_tokens": _sparse(asked, asked.targets, np.ones(len(asked.into), bool), "int64")}
        if weights is not None:  # a service counts absent ones as one, which changes no log-probability
            inputs["weights"] = _sparse(asked, own, own != 0, "float32")
    return types.Datum(model_input=types.ModelInput.from_ints(asked.tokens.tolist()), loss_fn_inputs=inputs)


def _sparse(asked: Asked, values: npt.NDArray[Any], kept: npt.NDArray[np.bool_], dtype: Any) -> Any:
    """Compressed rows, in the order of places and of the targets of each."""
    from tinker import types

    assert asked.columns is not None
    rows, columns = asked.rows[kept], asked.columns[kept]
    order = np.lexsort((columns, rows))
    starts = np.searchsorted(rows[order], np.arange(len(asked.tokens) + 1))
    return types.TensorData(
        data=values[kept][order],
        dtype=dtype,
        shape=[len(asked.tokens), asked.width],
        sparse_crow_indices=starts.tolist(),
        sparse_col_indices=columns[order].tolist(),
    )


def read_logprobs(asked: Sequence[Asked], outputs: Sequence[Any], shape: tuple[int, ...]) -> Floats:
    """The log-probabilities of a batch, from the output records of its data."""
    found = np.zeros(int(np.prod(shape)), np.float64)
    if len(outputs) != len(asked):
        raise ValueError(f"{len(asked)} data were sent, and {len(outputs)} records came back")
    for each, output in zip(asked, outputs, strict=True):
        values = np.asarray(output["logprobs"].to_numpy(), np.float64)
        length = len(each.tokens)
        if each.columns is None:
            found[each.into] = values.reshape(-1)[:length][each.rows]
        else:
            found[each.into] = values.reshape(length, each.width)[each.rows, each.columns]
    return found.reshape(shape)
