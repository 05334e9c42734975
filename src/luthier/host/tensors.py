"""Arrays as Tinker clients send and expect them: dense or by sparse rows, in protobuf or in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from luthier.errors import CallError
from luthier.host.protobuf import Message, write_bytes, write_int, write_packed

Ints = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

FLOAT32, INT64, INT32, BFLOAT16 = 1, 2, 3, 4
_DTYPES = {FLOAT32: "<f4", INT64: "<i8", INT32: "<i4", BFLOAT16: "<u2"}
_MOST_DIMENSIONS = 8
# A sparse tensor of a few bytes may name a huge shape; this many cells are made of one at most.
MOST_CELLS = 1 << 24


@dataclass(frozen=True)
class SparseRows:
    """A two-dimensional array of which only some cells are listed, row by row (CSR)."""

    values: Array
    rows: Ints
    """Where each row begins among the values, and the end of the last."""
    columns: Ints
    shape: tuple[int, int]

    def dense(self) -> Array:
        """The whole array; cells that are not listed are 0."""
        whole = np.zeros(self.shape, self.values.dtype)
        whole[np.repeat(np.arange(self.shape[0]), np.diff(self.rows)), self.columns] = self.values
        return whole

    def filled(self, values: Array) -> SparseRows:
        """The same cells with other values."""
        return SparseRows(values, self.rows, self.columns, self.shape)

    def cells(self, whole: Array) -> Array:
        """The listed cells of an array of this shape."""
        found: Array = whole[np.repeat(np.arange(self.shape[0]), np.diff(self.rows)), self.columns]
        return found


AnyTensor = Array | SparseRows


def read_tensor(message: Message) -> AnyTensor:
    """A tensor of protobuf: floats as float32, integers as int64."""
    where = message.where
    dtype, shape = message.unsigned(3), message.ints64(4)
    if message.last_of(1, 2) == 2:
        parts = message.message(2, "sparse_csr")
        values = read_array(parts.bytes(1), dtype, where)
        return _sparse(
            values, read_array(parts.bytes(2), INT64, where), read_array(parts.bytes(3), INT64, where), shape, where
        )
    return _shaped(read_array(message.bytes(1), dtype, where), shape, where)


def write_tensor(tensor: AnyTensor, *, int32: bool = False) -> bytes:
    """A tensor for protobuf, without its field number."""
    if isinstance(tensor, SparseRows):
        data = (tensor.values, tensor.rows, tensor.columns)
        csr = b"".join(write_bytes(place, array_bytes(part)) for place, part in enumerate(data, 1))
        return write_bytes(2, csr) + write_int(3, dtype_of(tensor.values)) + write_packed(4, tensor.shape)
    if int32:
        return write_bytes(1, tensor.astype("<i4").tobytes()) + write_int(3, INT32) + write_packed(4, tensor.shape)
    return write_bytes(1, array_bytes(tensor)) + write_int(3, dtype_of(tensor)) + write_packed(4, tensor.shape)


def read_tensor_json(facts: object, where: str) -> AnyTensor:
    """A tensor of a JSON request: `{data, dtype, shape?, sparse_crow_indices?, sparse_col_indices?}`."""
    if not isinstance(facts, Mapping):
        raise CallError(f"{where}: is not a tensor but {type(facts).__name__}", where=where)
    dtype = facts.get("dtype")
    if dtype not in ("int64", "float32"):
        raise CallError(f"{where}: has dtype {dtype!r}; expected 'int64' or 'float32'", where=f"{where}.dtype")
    values = read_numbers_json(facts.get("data"), f"{where}.data", is_float=dtype == "float32")
    shape = facts.get("shape")
    sizes = [] if shape is None else read_numbers_json(shape, f"{where}.shape").tolist()
    if facts.get("sparse_crow_indices") is None:
        return _shaped(values, sizes, where)
    rows = read_numbers_json(facts["sparse_crow_indices"], f"{where}.sparse_crow_indices")
    columns = read_numbers_json(facts.get("sparse_col_indices"), f"{where}.sparse_col_indices")
    return _sparse(values, rows, columns, sizes, where)


def read_numbers_json(found: object, where: str, *, is_float: bool = False) -> Array:
    """A flat list of numbers."""
    if not isinstance(found, list):
        raise CallError(f"{where}: is not a list of numbers but {type(found).__name__}", where=where)
    try:
        numbers = np.asarray(found)
    except (ValueError, OverflowError):
        numbers = np.empty(0, object)
    kinds = "iuf" if is_float else "iu"
    if found and (numbers.ndim != 1 or numbers.dtype.kind not in kinds or numbers.dtype == np.uint64):
        wanted = "numbers" if is_float else "whole numbers of 64 bits"
        raise CallError(f"{where}: is not a flat list of {wanted}", where=where)
    return numbers.astype(np.float32 if is_float else np.int64)


def tensor_json(tensor: AnyTensor) -> dict[str, object]:
    """A tensor as JSON shows it."""
    if isinstance(tensor, SparseRows):
        return {
            **_flat_json(tensor.values),
            "shape": list(tensor.shape),
            "sparse_crow_indices": tensor.rows.tolist(),
            "sparse_col_indices": tensor.columns.tolist(),
        }
    return {**_flat_json(tensor), "shape": list(tensor.shape)}


def read_array(data: memoryview, dtype: int, where: str) -> Array:
    """Raw numbers as float32 or int64."""
    if dtype not in _DTYPES:
        raise CallError(f"{where}: has a dtype of number {dtype}; expected one of {sorted(_DTYPES)}", where=where)
    kind = np.dtype(_DTYPES[dtype])
    if len(data) % kind.itemsize:
        raise CallError(f"{where}: has {len(data)} bytes, not a multiple of {kind.itemsize}", where=where)
    numbers = np.frombuffer(data, kind)
    if dtype == BFLOAT16:
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float32 if dtype == FLOAT32 else np.int64)


def dtype_of(array: Array) -> int:
    """The number that protobuf gives the array's type."""
    return FLOAT32 if array.dtype.kind == "f" else INT64


def array_bytes(array: Array) -> bytes:
    """Raw numbers as float32 or int64."""
    return array.astype(_DTYPES[dtype_of(array)]).tobytes()


def _flat_json(array: Array) -> dict[str, object]:
    name = "float32" if array.dtype.kind == "f" else "int64"
    return {"data": array.reshape(-1).astype(name).tolist(), "dtype": name}


def _shaped(values: Array, shape: list[int], where: str) -> Array:
    if not shape:
        return values
    size = 1
    for each in shape[: _MOST_DIMENSIONS + 1]:
        size *= each
    if len(shape) > _MOST_DIMENSIONS or min(shape) < 0 or size != values.size:
        raise CallError(f"{where}: has {values.size} values, and a shape of {shape[:_MOST_DIMENSIONS]}", where=where)
    try:
        return values.reshape(shape)
    except ValueError:  # some sizes are more than an array can have, though nothing is in it
        raise CallError(f"{where}: has a shape of {shape}", where=where) from None


def _sparse(values: Array, rows: Ints, columns: Ints, shape: list[int], where: str) -> SparseRows:
    def refuse(found: str) -> CallError:
        return CallError(f"{where}: is sparse, and {found}", where=where)

    if len(shape) != 2 or min(shape) < 0:
        raise refuse(f"has a shape of {shape[:_MOST_DIMENSIONS]}; expected two dimensions")
    if shape[0] * shape[1] > MOST_CELLS:
        raise refuse(f"its shape of {shape} has more than {MOST_CELLS:,} cells")
    if len(values) != len(columns):
        raise refuse(f"has {len(values)} values and {len(columns)} column indices")
    steps = np.diff(rows)
    if len(rows) != shape[0] + 1 or rows[0] != 0 or rows[-1] != len(values) or (steps < 0).any():
        raise refuse(f"its row pointers do not lead from 0 to {len(values)} in {shape[0]} steps")
    if len(columns) and (columns.min() < 0 or columns.max() >= shape[1]):
        raise refuse(f"names a column outside 0 to {shape[1] - 1}")
    row_of = np.repeat(np.arange(shape[0]), steps)
    if ((np.diff(row_of) == 0) & (np.diff(columns) <= 0)).any():
        raise refuse("the columns of a row are not in order, or one is there twice")
    return SparseRows(values, rows, columns, (shape[0], shape[1]))
