"""Hold rows out for evaluation, by hashes of what they say, so that the split does not depend on their order."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from luthier.data.hashes import Hashes, mix
from luthier.errors import DataError

Mask = npt.NDArray[np.bool_]


def choose_valid(contents: Hashes, groups: Hashes | None, wanted: float | int, seed: int) -> Mask:
    """Which rows are held out: the share's (or count's) smallest seeded hashes; whole groups where groups are given.

    A share takes ceil(share * rows), so at least one row, but never the last one. Whole groups come within one group
    of the count.
    """
    count = _share(wanted, len(contents)) if isinstance(wanted, float) else wanted
    chosen = np.zeros(len(contents), bool)
    if count == 0 or not len(contents):
        return chosen
    if count >= len(contents):
        raise DataError(
            f"holding out {count:,} of {len(contents):,} usable rows leaves nothing to train",
            hint="lower `data.valid`, or give a file of held-out rows",
        )
    if groups is None:
        chosen[np.argsort(mix(contents, seed), kind="stable")[:count]] = True
        return chosen
    return _whole_groups(groups, count, seed)


def _share(wanted: float, rows: int) -> int:
    """Rounded before it is rounded up, or 0.1 of 30 rows would be 4."""
    return min(math.ceil(round(wanted * rows, 9)), max(0, rows - 1))


def _whole_groups(groups: Hashes, count: int, seed: int) -> Mask:
    names, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.argsort(mix(names, seed), kind="stable")
    reached = np.cumsum(sizes[order])
    taken = int(np.searchsorted(reached, count)) + 1
    if taken >= len(names):
        raise DataError(
            f"{len(names)} groups cannot be split so that about {count:,} rows are held out and some remain",
            hint="choose another `data.group_by`, or lower `data.valid`",
        )
    is_chosen = np.zeros(len(names), bool)
    is_chosen[order[:taken]] = True
    return np.asarray(is_chosen[members])
