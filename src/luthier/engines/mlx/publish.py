"""A model trained in full, written as its base lies: the same files, names and types of text beside other weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import orjson

from luthier.engines.mlx.naming import path_of
from luthier.errors import UnsupportedError
from luthier.weights.header import TensorEntry
from luthier.weights.shards import (
    Floats,
    Piece,
    TensorFile,
    from_floats,
    read_model_files,
    write_tensor_file,
)
from luthier.weights.tensors import INDEX, WHOLE, read_config

_STORED = {"fp32": ("F32", "float32"), "bf16": ("BF16", "bfloat16"), "fp16": ("F16", "float16")}


def match_files(paths: Mapping[str, mx.array], base: Path) -> dict[str, str]:
    """For each trained parameter's path, its tensor in the base's files, whose values it must have been read from as
    they stand: UnsupportedError where mlx_lm holds it otherwise, since it could not be written back.
    """
    files = read_model_files(base)
    found: dict[str, str] = {}
    for file in files.values():
        for name, entry in file.entries.items():
            path = path_of(name, paths)
            if path is not None and path not in found and tuple(paths[path].shape) == entry.shape:
                found[path] = name
    for path in paths:
        if path not in found:
            raise UnsupportedError(
                f"mlx_lm holds `{path}` otherwise than the model's files do, so it could not be written back",
                hint='train an adapter (method.kind = "lora"), or set engine.kind = "torch"',
            )
    return found


def check_same(paths: Mapping[str, mx.array], names: Mapping[str, str], base: Path) -> None:
    """Whether every parameter has the values of its tensor, so that names alone say how to write it back."""
    owners = {name: file for file in read_model_files(base).values() for name in file.entries}
    for path, name in names.items():
        stored = mx.array(owners[name].read_floats(name)).astype(paths[path].dtype)
        if not mx.array_equal(stored, paths[path]).item():
            raise UnsupportedError(
                f"mlx_lm changes `{name}` while it loads it, so it could not be written back",
                hint='train an adapter (method.kind = "lora"), or set engine.kind = "torch"',
            )


def write_model(
    folder: Path, base: Path, names: Mapping[str, str], masters: Mapping[str, mx.array], precision: str
) -> None:
    """The weights, each file of the base anew under its name, and the configuration; a tied head is left out."""
    dtype, told = _STORED[precision]
    paths = {name: path for path, name in names.items()}
    places: dict[str, str] = {}
    size_bytes = 0
    for file, source in read_model_files(base).items():
        layout = {
            name: TensorEntry(dtype, entry.shape) if name in paths else entry
            for name, entry in source.entries.items()
            if name in paths or not _is_dropped(name)
        }
        write_tensor_file(folder / file, layout, _content(source, paths, masters, dtype), {"format": "pt"})
        places |= dict.fromkeys(layout, file)
        size_bytes += sum(entry.size_bytes for entry in layout.values())
    if set(places.values()) != {WHOLE}:
        index = {"metadata": {"total_size": size_bytes}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_bytes(orjson.dumps(index, option=orjson.OPT_INDENT_2) + b"\n")
    _write_config(folder, read_config(base), told)


def read_trained(folder: Path, names: Mapping[str, str]) -> dict[str, Floats]:
    """The trained parameters by path from a folder that `write_model` wrote; those that it lacks are not there."""
    owners = {name: file for file in read_model_files(folder).values() for name in file.entries}
    return {path: owners[name].read_floats(name) for path, name in names.items() if name in owners}


def _is_dropped(name: str) -> bool:
    """A copy of the embedding table, which is trained under the table's own name and would be the old one here."""
    return name.endswith("lm_head.weight")


def _content(source: TensorFile, paths: Mapping[str, str], masters: Mapping[str, mx.array], dtype: str) -> Any:
    def content(name: str) -> Iterable[Piece]:
        if name not in paths:
            yield from source.read_blocks(name)
            return
        yield np.ascontiguousarray(from_floats(np.array(masters[paths[name]]), dtype)).data

    return content


def _write_config(folder: Path, config: dict[str, Any], told: str) -> None:
    for part in (config, config.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part, dict) and key in part:
                part[key] = told
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = told
    (folder / "config.json").write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2) + b"\n")
