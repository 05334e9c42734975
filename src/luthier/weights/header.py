"""The header of a safetensors file, held against the file: every byte belongs to exactly one tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from luthier.errors import MissingPathError, ModelError, UnsupportedError

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# Bytes of one element; a type that is not here is refused by name.
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
_MAX_HEADER_BYTES = 100 * 1024 * 1024


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its type as safetensors names it, its shape, and its bytes within the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    end: int = 0

    @property
    def size_bytes(self) -> int:
        """The bytes that the type and the shape take."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Header:
    """The tensors of a file by name, and what it says of itself."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a file; ModelError unless the file is whole and as its header says."""
    if not path.is_file():
        raise MissingPathError(f"no file at {path}")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise ModelError(f"{path}: a pointer of git-lfs, not the weights", hint="run: git lfs pull")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise broken(path, "its header is cut off")
        header = file.read(length)
    try:
        found = orjson.loads(header)
        metadata = {str(key): str(value) for key, value in (found.pop("__metadata__", None) or {}).items()}
        entries = {name: _entry(each, 8 + length) for name, each in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise broken(path, "its header is not one of safetensors") from None
    _check_layout(path, entries, 8 + length, size)
    return Header(entries, metadata)


def _entry(found: Any, base: int) -> TensorEntry:
    start, end = found["data_offsets"]
    shape = tuple(found["shape"])
    if not all(type(each) is int and each >= 0 for each in (*shape, start, end)):
        raise ValueError
    return TensorEntry(str(found["dtype"]), shape, base + start, base + end)


def _check_layout(path: Path, entries: dict[str, TensorEntry], start: int, size: int) -> None:
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.dtype not in ITEM_BYTES:
            raise UnsupportedError(f"{path}: `{name}` has the type {entry.dtype}, which is not known here")
        if entry.start != start or entry.end - entry.start != entry.size_bytes:
            raise broken(path, f"`{name}` does not lie where its header says")
        start = entry.end
    if start != size:
        raise broken(path, f"it has {size:,} bytes where its header says {start:,}")


def broken(path: Path, what: str) -> ModelError:
    """The error of a file that is not what its header says."""
    return ModelError(f"{path}: not a whole safetensors file: {what}", hint="fetch or write the file again")
