"""Safetensors files tensor by tensor: nothing is ever held whole, and bfloat16 needs no package."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from luthier.errors import MissingPathError, ModelError, UnsupportedError
from luthier.weights.tensors import INDEX, list_weight_files

Floats = npt.NDArray[np.float32]
Piece = bytes | memoryview

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# Bytes of one element; a type that is not here is refused by name.
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
# The types that we compute with, and how numpy holds them.
FLOATS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_MAX_HEADER_BYTES = 100 * 1024 * 1024
_BLOCK_BYTES = 16 * 1024 * 1024


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
class TensorFile:
    """A safetensors file whose header was read and found to fit the file."""

    path: Path
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]

    def read_blocks(self, name: str) -> Iterator[bytes]:
        """The tensor's bytes as they lie in the file, a bounded piece at a time."""
        entry = self.entries[name]
        with self.path.open("rb") as file:
            file.seek(entry.start)
            left = entry.end - entry.start
            while left:
                piece = file.read(min(left, _BLOCK_BYTES))
                if not piece:
                    raise _broken(self.path, f"it became shorter while `{name}` was read")
                left -= len(piece)
                yield piece

    def read_floats(self, name: str, rows: slice | None = None) -> Floats:
        """The tensor, or some of its rows, as fp32; a type that is no plain float is refused."""
        return to_floats(self.read_numbers(name, rows), self.entries[name].dtype)

    def read_numbers(self, name: str, rows: slice | None = None) -> npt.NDArray[Any]:
        """The tensor, or some of its rows, as the file holds it: bf16 as uint16."""
        entry = self.entries[name]
        if entry.dtype not in FLOATS:
            raise UnsupportedError(
                f"{self.path.name}: `{name}` is {entry.dtype}, and only F32, F16 and BF16 weights can be computed with",
                hint="use a model that is not quantised",
            )
        first, last, _ = (rows or slice(None)).indices(entry.shape[0] if entry.shape else 1)
        row = math.prod(entry.shape[1:])
        kind = FLOATS[entry.dtype]
        offset = entry.start + first * row * kind.itemsize
        count = max(0, last - first) * row
        raw = np.fromfile(self.path, kind, count, offset=offset)
        if len(raw) != count:
            raise _broken(self.path, f"it became shorter while `{name}` was read")
        shape = (last - first, *entry.shape[1:]) if entry.shape else ()
        return raw.reshape(shape)


def to_floats(raw: npt.NDArray[Any], dtype: str) -> Floats:
    """Numbers as a file holds them, as fp32; exact for every type in FLOATS."""
    if dtype == "BF16":
        bits = raw.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return np.asarray(raw, np.float32)


def from_floats(values: Floats, dtype: str) -> npt.NDArray[Any]:
    """Numbers as a file of that type holds them: rounded to the nearest, ties to even; bf16 as uint16."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):  # beyond fp16 becomes infinite, which the caller checks
            return np.asarray(values, FLOATS[dtype])
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounding = bits >> 16
    rounding &= 1
    rounding += 0x7FFF
    rounding += bits
    rounding >>= 16
    rounded = rounding.astype(np.uint16)
    is_nan = np.isnan(values)
    if is_nan.any():
        rounded[is_nan] = 0x7FC0
    return rounded


def read_tensor_file(path: Path) -> TensorFile:
    """The header of a safetensors file, checked against the file: every byte belongs to exactly one tensor."""
    if not path.is_file():
        raise MissingPathError(f"no file at {path}")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise ModelError(f"{path}: a pointer of git-lfs, not the weights", hint="run: git lfs pull")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise _broken(path, "its header is cut off")
        header = file.read(length)
    try:
        found = orjson.loads(header)
        metadata = {str(key): str(value) for key, value in (found.pop("__metadata__", None) or {}).items()}
        entries = {name: _entry(each, 8 + length) for name, each in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _broken(path, "its header is not one of safetensors") from None
    _check_layout(path, entries, 8 + length, size)
    return TensorFile(path, entries, metadata)


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
            raise _broken(path, f"`{name}` does not lie where its header says")
        start = entry.end
    if start != size:
        raise _broken(path, f"it has {size:,} bytes where its header says {start:,}")


def _broken(path: Path, what: str) -> ModelError:
    return ModelError(f"{path}: not a whole safetensors file: {what}", hint="fetch or write the file again")


def write_tensor_file(
    path: Path,
    layout: Mapping[str, TensorEntry],
    content: Callable[[str], Iterable[Piece]],
    metadata: Mapping[str, str],
) -> None:
    """A safetensors file of the types and shapes of `layout`, in safetensors' own order; `content` gives the bytes."""
    names = sorted(layout, key=lambda name: (-ITEM_BYTES[layout[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        entry = layout[name]
        header[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.size_bytes],
        }
        end += entry.size_bytes
    encoded = orjson.dumps(header)
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            written = 0
            for block in content(name):
                written += file.write(block)
            if written != layout[name].size_bytes:
                raise AssertionError(f"`{name}` came to {written} bytes, not {layout[name].size_bytes}")
        file.flush()
        os.fsync(file.fileno())


def read_model_files(folder: Path) -> dict[str, TensorFile]:
    """The weight files of a model folder by name, found to have each tensor once."""
    if not folder.is_dir():
        raise MissingPathError(f"no folder at {folder}")
    files = {path.name: read_tensor_file(path) for path in list_weight_files(folder)}
    places: dict[str, str] = {}
    for name, file in files.items():
        for tensor in file.entries:
            if places.setdefault(tensor, name) != name:
                raise ModelError(f"{folder}: `{tensor}` is in {places[tensor]} and in {name}")
    index = folder / INDEX
    promised = orjson.loads(index.read_bytes())["weight_map"] if index.is_file() else {}
    for tensor, name in promised.items():
        if places.get(tensor) != name:
            raise ModelError(f"{folder}: `{tensor}` is not in {name}, where {INDEX} says", hint="fetch the model again")
    return files
