"""What a merge starts from: the base as it is, or exactly the 4-bit values that an adapter was trained against."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from luthier.adapters.merge import DTYPES, Dequantise, merge_adapter
from luthier.engines.registry import load_dequantise, load_mlx_writer
from luthier.machine import find_machine
from luthier.runs.resolve import AdapterRef, ResolvedModel
from luthier.weights.shards import read_model_files
from luthier.weights.tensors import find_mlx_bits, read_config

_NAMES = {stored: name for name, (stored, _) in DTYPES.items()}


@dataclass(frozen=True)
class Start:
    """A base folder, the adapters to add to it in order, and what its weights are put through first."""

    folder: Path
    adapters: tuple[Path, ...]
    dequantise: Dequantise | None = None
    dtype: str | None = None
    """The precision of the base itself, where the folder is in another."""


@contextmanager
def open_start(
    resolved: ResolvedModel,
    *,
    nf4: bool,
    precision: str,
    beside: Path,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[Start]:
    """The start of a merge. With `nf4`, earlier adapters are merged in turn, as training has them, in a folder `beside`
    that goes away again; `precision` is the one that training computed in.

    A base that mlx_lm has quantised is written in full width first, with the values that it computes with: fused into
    4 bits, most of an adapter would be rounded away.
    """
    if find_mlx_bits(read_config(resolved.folder)) is not None:
        with tempfile.TemporaryDirectory(prefix=".start-", dir=beside) as place:
            whole = Path(place) / "dequantised"
            load_mlx_writer("write_dequantised")(resolved.folder, whole)
            below = replace(resolved, folder=whole, adapters=_stored(resolved.adapters))
            with open_start(below, nf4=nf4, precision=precision, beside=beside, should_stop=should_stop) as start:
                yield start
        return
    if not nf4 or not any(ref.quantised for ref in resolved.adapters):
        yield Start(resolved.folder, tuple(ref.path for ref in resolved.adapters))
        return
    own = read_precision(resolved.folder)
    through = partial(_through_nf4, precision=precision)
    with tempfile.TemporaryDirectory(prefix=".start-", dir=beside) as place:
        folder, last = resolved.folder, resolved.adapters[-1]
        for number, ref in enumerate(resolved.adapters[:-1]):
            out = Path(place) / str(number)
            merge_adapter(
                folder, [ref.path], out, dtype=precision, dequantise=through(ref, folder), should_stop=should_stop
            )
            if number:
                shutil.rmtree(folder)
            folder = out
        yield Start(folder, (last.path,), through(last, folder), own)


def _stored(refs: tuple[AdapterRef, ...]) -> tuple[AdapterRef, ...]:
    """Adapters over a base that was quantised when they came: its values are the first one's already."""
    return tuple(replace(ref, quantised=ref.quantised and number > 0) for number, ref in enumerate(refs))


def read_precision(folder: Path) -> str | None:
    """The precision that most numbers of a model are in."""
    sizes: dict[str, int] = {}
    for file in read_model_files(folder).values():
        for entry in file.entries.values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.size_bytes
    return _NAMES.get(max(sizes, key=lambda name: sizes[name])) if sizes else None


def _through_nf4(ref: AdapterRef, folder: Path, *, precision: str) -> Dequantise | None:
    if not ref.quantised:
        return None
    return load_dequantise(folder, ref, precision=precision, device=find_machine().device)
