"""What engines draw at random: an adapter's first values and dropout, as functions of seed, step, row and layer alone.

The numbers are the same on every engine and every device, and do not change with a library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from luthier.data.hashes import hash_bytes, mix

# Words of random numbers set aside for each token: eight inputs a word, for up to a million inputs.
TOKEN_STRIDE = 1 << 17

Words = npt.NDArray[np.uint64]


def site_of(name: str) -> int:
    """The number of a layer by its name, so that it does not depend on which others are adapted, or in which order."""
    return hash_bytes(name.encode())


def first_values(seed: int, name: str, rank: int, width: int) -> npt.NDArray[np.float32]:
    """The lora_A that training begins with: uniform within 1 / sqrt(width), as PEFT has it."""
    start = mix(np.array([site_of(name)], np.uint64), seed)[0]
    with np.errstate(over="ignore"):
        words = mix(start + np.arange(rank * width, dtype=np.uint64), 0)
    shares = (words >> np.uint64(40)).astype(np.float64) * 2.0**-24
    return ((2 * shares - 1) / math.sqrt(width)).astype(np.float32).reshape(rank, width)


def dropout_starts(rows: Sequence[tuple[int, int]], seed: int) -> Words:
    """Where the random numbers of each token begin; `rows` are (key of the row and step, tokens) in their order."""
    keys = mix(np.array([key for key, _ in rows], np.uint64), seed)
    lengths = [tokens for _, tokens in rows]
    places = np.concatenate([np.arange(tokens, dtype=np.uint64) for tokens in lengths])
    with np.errstate(over="ignore"):
        starts = np.repeat(keys, lengths) + places * np.uint64(TOKEN_STRIDE)
    return np.asarray(starts, np.uint64)


def dropped_below(share: float) -> int:
    """The byte below which an input is left out: the share is rounded to 1/256, and made up for exactly."""
    return min(255, round(share * 256))
