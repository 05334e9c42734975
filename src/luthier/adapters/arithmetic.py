"""Whether every number of a merged model is the base's with the adapters added, worked out again from the files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from luthier.adapters.merge import HEADS, find_embeddings, find_place
from luthier.adapters.start import Start
from luthier.errors import ProofError
from luthier.weights.header import TensorEntry
from luthier.weights.peft import read_adapter
from luthier.weights.shards import FLOATS, Floats, TensorFile, from_floats, read_model_files, to_floats

MOST_DIFFERING = 5e-3
"""The largest share of a changed tensor that may lie on the other side of a rounding."""
_SLACK = {"F32": 2.0**-20, "BF16": 2.0**-7, "F16": 2.0**-10}
_BLOCK_VALUES = 2 * 1024 * 1024


@dataclass
class Sums:
    """What came of it, by tensor name."""

    tensors: int = 0
    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    homeless: list[str] = field(default_factory=list)
    """Tensors of the adapters that have no place in the base."""
    not_finite: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    values: int = 0
    differing: int = 0
    """Numbers in wrong tensors that are not what they should be."""


@dataclass
class _Change:
    whole: Floats | None = None
    updates: list[tuple[float, Floats, Floats]] = field(default_factory=list)


def check_sums(merged: Path, start: Start) -> Sums:
    """Go through every tensor, a few rows at a time."""
    base, found = _by_name(start.folder), _by_name(merged)
    sums = Sums(tensors=len(found))
    changes = _read_changes(start, {name: entry for name, (_, entry) in base.items()}, sums)
    table = find_embeddings(base)
    wanted = set(base) | {name for name in changes if not _is_shared_head(name, table, changes, found)}
    sums.missing = sorted(wanted - found.keys())
    sums.left_over = sorted(name for name in found.keys() - wanted if not (name.endswith(HEADS) and table))
    for name in sorted(found):
        source = name if name in base else table
        if source is None or name in sums.left_over:
            continue
        if found[name][1].shape != base[source][1].shape:
            sums.misshapen.append(name)
            continue
        _compare(name, found[name], (source, *base[source]), _Job(start, changes.get(name) or _Change(), sums))
    return sums


def check_merged(merged: Path, start: Start) -> None:
    """Raise ProofError unless the merged model is the base with the adapters added, number by number."""
    sums = check_sums(merged, start)
    faults = (
        ("is missing", [*sums.missing, *sums.homeless]),
        ("is left over", sums.left_over),
        ("has another shape", sums.misshapen),
        ("is not finite", sums.not_finite),
        ("is not the base's plus scale * B @ A", sums.wrong),
    )
    for what, names in faults:
        if names:
            raise ProofError(
                f"the merged model is not base + adapter: `{names[0]}` {what}",
                hint="report it, with what `luthier verify RUN` says",
                details={"tensors": names},
            )


def find_broken(folder: Path) -> list[str]:
    """Tensors of a model with numbers that are not finite."""
    broken = []
    for name, (file, entry) in _by_name(folder).items():
        if entry.dtype in FLOATS:
            blocks = (file.read_floats(name, part) for part in _parts(entry))
            if not all(np.isfinite(block).all() for block in blocks):
                broken.append(name)
    return broken


@dataclass(frozen=True)
class _Job:
    start: Start
    change: _Change
    sums: Sums


_Tensor = tuple[TensorFile, TensorEntry]


def _by_name(folder: Path) -> dict[str, _Tensor]:
    return {name: (file, entry) for file in read_model_files(folder).values() for name, entry in file.entries.items()}


def _read_changes(start: Start, entries: dict[str, TensorEntry], sums: Sums) -> dict[str, _Change]:
    changes: dict[str, _Change] = {}
    for folder in start.adapters:
        config, tensors = read_adapter(folder)
        for key, values in tensors.items():
            module, _, side = key.rpartition(".")
            if side == "lora_B":
                continue
            name = find_place(f"{module}.weight" if side == "lora_A" else key, entries)
            if name is None:
                sums.homeless.append(key)
                continue
            change = changes.setdefault(name, _Change())
            if side == "lora_A":
                change.updates.append((config.scale, values, tensors[f"{module}.lora_B"]))
            else:
                change.whole, change.updates = values, []
    return changes


def _is_shared_head(name: str, table: str | None, changes: dict[str, _Change], found: dict[str, _Tensor]) -> bool:
    """A head that was trained as one matrix with the embeddings, and so needs no tensor of its own."""
    if name in found or table is None or not name.endswith(HEADS):
        return False
    one, other = changes[name], changes.get(table)
    if other is None or one.whole is None or other.whole is None or one.updates or other.updates:
        return False
    return np.array_equal(one.whole, other.whole)


def _parts(entry: TensorEntry) -> Iterator[slice]:
    rows = entry.shape[0] if entry.shape else 1
    step = max(1, _BLOCK_VALUES // max(1, math.prod(entry.shape[1:])))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _compare(name: str, found: _Tensor, source: tuple[str, TensorFile, TensorEntry], job: _Job) -> None:
    """Count the numbers of one tensor that are not what they should be."""
    (file, entry), (start, origin, before), change, sums = found, source, job.change, job.sums
    if before.dtype not in FLOATS or entry.dtype not in FLOATS:
        is_same = entry.dtype == before.dtype and list(file.read_blocks(name)) == list(origin.read_blocks(start))
        sums.wrong += [] if is_same else [name]
        return
    whole = change.whole
    if whole is None and job.start.dequantise and len(before.shape) == 2:
        whole = job.start.dequantise(start, origin.read_floats(start))
    differing = beyond = 0
    is_finite = True
    for part in _parts(entry):
        base = np.atleast_1d(origin.read_floats(start, part) if whole is None else whole[part])
        got = np.atleast_1d(file.read_floats(name, part))
        is_finite = is_finite and bool(np.isfinite(got).all())
        exact = base
        for scale, down, up in change.updates:
            exact = exact + scale * (up[part] @ down)
        expected = to_floats(from_floats(exact, entry.dtype), entry.dtype)
        off = ~(got == expected)
        differing += int(np.count_nonzero(off))
        # What another order of additions may change: the last digits, of the sum or of what was added.
        size = np.maximum(np.abs(exact), np.abs(exact - base).max(initial=0.0))
        beyond += int(np.count_nonzero(~(np.abs(got - expected) <= _SLACK[entry.dtype] * size)))
    count = math.prod(entry.shape)
    sums.values += count
    is_rounding = bool(change.updates) and (entry.dtype == "F32" or differing <= max(1, MOST_DIFFERING * count))
    if beyond or (differing and not is_rounding):
        sums.wrong.append(name)
        sums.differing += max(differing, beyond)
    if not is_finite:
        sums.not_finite.append(name)
