"""The order of the examples: a pure function of seed, epoch and position, so that resuming is arithmetic.

The stream of a run is permutation(seed, 0), then permutation(seed, 1), and so on. Step k takes the examples at
positions k * batch to (k + 1) * batch of it; only the last step of a run may be smaller.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from luthier.data.hashes import mix

Indices = npt.NDArray[np.int64]


@lru_cache(maxsize=4)
def permutation(count: int, seed: int, epoch: int) -> Indices:
    """The examples 0 to count - 1 in the order of one epoch."""
    keys = mix(mix(np.arange(count, dtype=np.uint64), seed), epoch)
    order = np.argsort(keys, kind="stable")
    order.flags.writeable = False
    return order


def count_steps(count: int, batch: int, *, epochs: float, steps: int = 0) -> int:
    """Optimizer steps of a run; `steps` wins over `epochs` when it is not 0."""
    return steps if steps > 0 else max(1, math.ceil(round(count * epochs) / batch))


def step_examples(step: int, count: int, batch: int, seed: int, *, last: int | None = None) -> Indices:
    """The examples of step `step` (from 0); `last` is the position at which the stream ends."""
    start, stop = step * batch, (step + 1) * batch
    stop = stop if last is None else min(stop, last)
    parts = []
    while start < stop:
        epoch, offset = divmod(start, count)
        taken = permutation(count, seed, epoch)[offset : offset + stop - start]
        parts.append(taken)
        start += len(taken)
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def find_steps(example: int, count: int, batch: int, seed: int, *, epochs: int) -> list[int]:
    """The steps that train an example within the first `epochs` epochs."""
    places = (int(np.flatnonzero(permutation(count, seed, e) == example)[0]) + e * count for e in range(epochs))
    return [place // batch for place in places]
