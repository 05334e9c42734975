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
from luthier.weights.header import ITEM_BYTES, TensorEntry, broken, read_header
from luthier.weights.tensors import INDEX, list_weight_files

Floats = npt.NDArray[np.float32]
Piece = bytes | memoryview

# The types that we compute with, and how numpy holds them.
FLOATS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_BLOCK_BYTES = 16 * 1024 * 1024


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
                    raise broken(self.path, f"it became shorter while `{name}` was read")
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
            raise broken(self.path, f"it became shorter while `{name}` was read")
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
    """A safetensors file whose header was read and held against it."""
    header = read_header(path)
    return TensorFile(path, header.entries, header.metadata)


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
