"""A model folder as one GGUF file, a few rows of a tensor at a time; names and quantisers are the `gguf` package's.

What was written is read back, and every number of it held against the model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from luthier.adapters.gguf_layout import (
    Placed,
    Value,
    build_metadata,
    model_name,
    place_tensors,
    read_settings,
    rotary_order,
)
from luthier.adapters.gguf_vocabulary import Vocabulary, read_vocabulary
from luthier.adapters.merge import Stopped
from luthier.adapters.turns import find_end_of_turn
from luthier.errors import CallError, ModelError, ProofError, UnsupportedError
from luthier.extras import import_extra
from luthier.runs.manifest import reserve_check
from luthier.weights.shards import FLOATS, Floats, TensorFile, read_model_files
from luthier.weights.tensors import read_config

# Our name of a type to the package's: of one tensor, and of a file whose matrices mostly have it.
KINDS = {"f32": ("F32", "ALL_F32"), "f16": ("F16", "MOSTLY_F16"), "bf16": ("BF16", "MOSTLY_BF16")} | {
    "q8_0": ("Q8_0", "MOSTLY_Q8_0")
}
_OWN = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_BLOCK_VALUES = 2 * 1024 * 1024
_Block = np.ndarray[Any, Any]


@dataclass(frozen=True)
class GgufFacts:
    """What was written: the type of the matrices, how many tensors of each type, bytes, and what to know of it."""

    kind: str
    types: dict[str, int]
    size_bytes: int
    notes: tuple[str, ...]
    largest_error: float
    """How far any number that was read back is from the model's; within the rounding of its type."""


@dataclass(frozen=True)
class _Stream:
    """A tensor as the package's writer takes an array: it asks how large it is, and has it put into the file."""

    nbytes: int
    blocks: Iterator[_Block]

    def tofile(self, file: IO[bytes]) -> None:
        """Put it there, a piece at a time."""
        written = sum(file.write(block.tobytes()) for block in self.blocks)
        if written != self.nbytes:
            raise AssertionError(f"a tensor came to {written} bytes, not {self.nbytes}")


def write_gguf(
    model: Path,
    path: Path,
    kind: str = "own",
    *,
    chat_template: Path | None = None,
    name: str = "",
    should_stop: Callable[[], bool] | None = None,
) -> GgufFacts:
    """Write the model folder as the file `path`; `kind` is f32, f16, bf16, q8_0, or the model's `own` type."""
    gguf = import_extra("gguf", "gguf")
    if kind not in (*KINDS, "own"):
        raise CallError(f"no such type of GGUF: {kind}", hint=f"one of: own, {', '.join(KINDS)}")
    files = read_model_files(model)
    settings = read_settings(read_config(model))
    kind = _own_kind(files) if kind == "own" else kind
    metadata, notes = build_metadata(settings)
    vocabulary = read_vocabulary(model, settings.number("vocab_size"), chat_template=chat_template)
    placed, more = place_tensors(files, settings)
    types = {each.name: _type_of(gguf, each, kind) for each in placed}
    if kind == "q8_0" and (left := sum(types[each.name].name == "F16" for each in placed)):
        more.append(f"{left} matrices have rows that are no multiple of 32 and are f16, not q8_0")
    sizes = {each.name: _size_bytes(gguf, each, types[each.name]) for each in placed}
    reserve_check(path.parent, sum(sizes.values()))
    writer = gguf.GGUFWriter(path, settings.architecture.name)
    try:
        writer.add_type("model")
        writer.add_name(model_name(model, name))
        writer.add_file_type(gguf.LlamaFileType[KINDS[kind][1]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in metadata.items():
            _add(writer, key, value)
        _add_vocabulary(writer, vocabulary)
        for each in placed:
            writer.add_tensor_info(
                each.name, each.shape, np.dtype(np.float32), sizes[each.name], raw_dtype=types[each.name]
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for each in placed:
            blocks = _render(gguf, each, types[each.name], should_stop or (lambda: False))
            writer.write_tensor_data(_Stream(sizes[each.name], blocks))
    finally:
        writer.close()
    largest_error = _check_written(gguf, path, placed, types, should_stop or (lambda: False))
    counts = [type_.name.lower() for type_ in types.values()]
    return GgufFacts(
        kind,
        {each: counts.count(each) for each in sorted(set(counts))},
        path.stat().st_size,
        (*notes, *more, *vocabulary.notes),
        largest_error,
    )


def _own_kind(files: dict[str, TensorFile]) -> str:
    """The type of most numbers of the model."""
    sizes = dict.fromkeys(_OWN, 0)
    for file in files.values():
        for entry in file.entries.values():
            if entry.dtype in FLOATS:
                sizes[entry.dtype] += math.prod(entry.shape)
    return _OWN[max(sizes, key=lambda dtype: sizes[dtype])]


def _type_of(gguf: Any, placed: Placed, kind: str) -> Any:
    """Vectors stay fp32; a matrix whose rows the quantiser cannot divide is f16."""
    types = gguf.GGMLQuantizationType
    if len(placed.shape) < 2:
        return types.F32
    wanted = types[KINDS[kind][0]]
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if placed.shape[-1] % block == 0 else types.F16


def _size_bytes(gguf: Any, placed: Placed, type_: Any) -> int:
    block, size = gguf.GGML_QUANT_SIZES[type_]
    return math.prod(placed.shape) // int(block) * int(size)


def _add(writer: Any, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for key, number in vocabulary.ids.items():
        getattr(writer, f"add_{key}_token_id")(number)
    end = _find_end_id(vocabulary)
    if end is not None and end != vocabulary.ids.get("eos"):
        writer.add_eot_token_id(end)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if vocabulary.adds_space is not None:
        writer.add_add_space_prefix(vocabulary.adds_space)
    if vocabulary.text.template_source:
        writer.add_chat_template(vocabulary.text.template_source)


def _find_end_id(vocabulary: Vocabulary) -> int | None:
    """The token that ends the model's turn, where the chat template shows it."""
    template = vocabulary.text.build_template()
    token = None
    with suppress(UnsupportedError):
        token = find_end_of_turn(template, vocabulary.text.control_tokens) if template else None
    return vocabulary.find_id(token) if token else None


# -- numbers ---------------------------------------------------------------------------------------------------------


def _render(gguf: Any, placed: Placed, type_: Any, should_stop: Callable[[], bool]) -> Iterator[_Block]:
    """The tensor's bytes, some rows at a time; whole heads where their rows change places."""
    for _, values in _list_values(placed, should_stop):
        with np.errstate(over="ignore"):  # beyond fp16 becomes infinite, which the next lines refuse
            block: _Block = gguf.quants.quantize(values, type_)
        if type_.name == "F16" and not np.isfinite(block).all():
            raise ModelError(f"`{placed.source}` has numbers that f16 cannot hold", hint="export it as bf16 or q8_0")
        yield block


def _list_values(placed: Placed, should_stop: Callable[[], bool]) -> Iterator[tuple[slice, Floats]]:
    """The tensor's numbers as they go into the file, before they are rounded: some rows, and which."""
    rows = placed.shape[0]
    step = max(1, _BLOCK_VALUES // max(1, math.prod(placed.shape[1:])))
    if placed.head_dim:
        step = max(1, step // placed.head_dim) * placed.head_dim
    for first in range(0, rows, step):
        if should_stop():
            raise Stopped
        part = slice(first, min(first + step, rows))
        values = _read(placed, part)
        if placed.head_dim:
            values = values[rotary_order(len(values), placed.head_dim)]
        yield part, values + np.float32(placed.offset) if placed.offset else values


def _read(placed: Placed, rows: slice) -> Floats:
    if placed.values is not None:
        return placed.values[rows]
    assert placed.file is not None
    values = placed.file.read_floats(placed.source, rows)
    if not np.isfinite(values).all():
        raise ModelError(f"`{placed.source}` has numbers that are not finite")
    return values


# -- read back -------------------------------------------------------------------------------------------------------


def _check_written(
    gguf: Any, path: Path, placed: list[Placed], types: dict[str, Any], should_stop: Callable[[], bool]
) -> float:
    """Read the file back and hold every number against the model's; the largest distance, or a ProofError."""
    found = {each.name: each for each in gguf.GGUFReader(path).tensors}
    if found.keys() != types.keys():
        other = sorted(found.keys() ^ types.keys())
        raise _not_written(path, f"`{other[0]}` is {'left over' if other[0] in found else 'missing'}")
    largest = 0.0
    for each in placed:
        tensor, type_ = found[each.name], types[each.name]
        if tensor.tensor_type != type_ or tuple(reversed(tensor.shape.tolist())) != each.shape:
            raise _not_written(path, f"`{each.name}` has another type or shape")
        for rows, values in _list_values(each, should_stop):
            written = gguf.quants.dequantize(tensor.data[rows], type_).reshape(values.shape)
            errors = np.abs(written - values)
            beyond = errors > _allowed_error(values, type_.name)
            if beyond.any() or not np.isfinite(written).all():
                raise _not_written(path, f"{int(beyond.sum()):,} numbers of `{each.name}` are not the model's")
            largest = max(largest, float(errors.max(initial=0.0)))
    return largest


def _allowed_error(values: Floats, kind: str) -> Floats:
    """What rounding to a type may take from each number."""
    sizes = np.abs(values)
    if kind == "Q8_0":
        # Half a step of the block's scale; the scale is itself rounded to f16, and 127 steps may lie on it.
        blocks = sizes.reshape(-1, 32).max(1, keepdims=True)
        allowed = blocks * (0.501 / 127 + 2.0**-11) + np.float32(127 * 2.0**-25)
        return np.asarray(np.broadcast_to(allowed, (len(allowed), 32)).reshape(values.shape), np.float32)
    share, least = {"F32": (0.0, 0.0), "F16": (2.0**-11, 2.0**-25), "BF16": (2.0**-8, 2.0**-134)}[kind]
    return np.asarray(sizes * np.float32(share) + np.float32(least), np.float32)


def _not_written(path: Path, what: str) -> ProofError:
    return ProofError(
        f"{path.name} does not hold the model that was written into it: {what}",
        hint="the disk or the memory may be faulty: export again, elsewhere",
        where=str(path),
    )
