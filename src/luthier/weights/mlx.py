"""Adapters in mlx_lm's file format, read and written without MLX: other names, sides transposed, layers counted."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from luthier.errors import MissingPathError, ModelError, UnsupportedError
from luthier.weights.header import TensorEntry
from luthier.weights.peft import AdapterConfig
from luthier.weights.shards import Floats, Piece, read_tensor_file, write_tensor_file
from luthier.weights.tensors import layer_number

CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"
# A model of text and pictures, as transformers names its text part and as mlx_lm does.
_NESTED = (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."))
_SIDES = {".lora_A": ".lora_a", ".lora_B": ".lora_b"}
_LAYER = re.compile(r"^(?:.*\.)?layers\.\d+\.")


def name_for_mlx(name: str, *, nested: bool) -> str:
    """Our name of a tensor as mlx_lm has it; `nested` for a model of text and pictures."""
    for start, other in _NESTED if nested else ():
        if name.startswith(start):
            name = other + name.removeprefix(start)
            break
    for ours, theirs in _SIDES.items():
        if name.endswith(ours):
            return name.removesuffix(ours) + theirs
    return name


def name_from_mlx(name: str) -> str:
    """mlx_lm's name of a tensor as we have it."""
    for other, start in _NESTED:
        if name.startswith(start):
            name = other + name.removeprefix(start)
            break
    for ours, theirs in _SIDES.items():
        if name.endswith(theirs):
            return name.removesuffix(theirs) + ours
    return name


def write_mlx_adapter(
    folder: Path, config: AdapterConfig, tensors: Mapping[str, np.ndarray[Any, Any]], *, layers: int
) -> None:
    """Both files of an adapter for mlx_lm, to a base of that many layers."""
    nested = any(name.startswith("model.language_model.") for name in tensors)
    named = {name_for_mlx(name, nested=nested): name for name in tensors}
    modules = sorted(key.removesuffix(".lora_a") for key in named if key.endswith(".lora_a"))
    if not modules:
        raise ModelError("the adapter has no low-rank updates, and mlx_lm reads no other", hint="export it as merged")
    found = {layer_number(module) for module in modules} - {None}
    numbers = [number for number in found if number is not None]
    if numbers and max(numbers) >= layers:
        raise ModelError(f"the adapter changes layer {max(numbers)}, and the base has {layers}")
    # Counted from the last; a layer in between that the adapter leaves alone gets an update of zeros from mlx_lm.
    shown = {
        "fine_tune_type": "lora",
        "model": config.base,
        "num_layers": layers - min(numbers) if numbers else 1,
        "lora_parameters": {
            "rank": config.rank,
            "scale": config.scale,
            "dropout": config.dropout,
            "keys": sorted({_LAYER.sub("", module) for module in modules}),
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_bytes(orjson.dumps(shown, option=orjson.OPT_INDENT_2) + b"\n")
    layout = {key: TensorEntry("F32", _turned(tensors[name], key).shape) for key, name in named.items()}

    def content(key: str) -> Iterable[Piece]:
        yield np.ascontiguousarray(_turned(tensors[named[key]], key), "<f4").data

    write_tensor_file(folder / WEIGHTS, layout, content, {"format": "mlx"})


def _turned(values: np.ndarray[Any, Any], key: str) -> np.ndarray[Any, Any]:
    """mlx_lm multiplies from the left, x @ A @ B, so that both sides are transposed."""
    return values.T if key.endswith(tuple(_SIDES.values())) else values


def read_mlx_adapter(folder: Path) -> tuple[AdapterConfig, dict[str, Floats]]:
    """An adapter of mlx_lm's under our names and in our shapes, every tensor as fp32."""
    path = folder / CONFIG
    if not path.is_file() or not (folder / WEIGHTS).is_file():
        raise MissingPathError(f"{folder}: not an adapter of mlx_lm: it needs {CONFIG} and {WEIGHTS}")
    try:
        raw = orjson.loads(path.read_bytes())
        kind = raw.get("fine_tune_type", "lora")
        parameters = raw["lora_parameters"] if kind == "lora" else {}
        rank, scale = (parameters.get("rank"), float(parameters.get("scale", "nan")))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{path}: not the settings of an adapter") from None
    if kind != "lora":
        raise UnsupportedError(f"{path}: fine_tune_type is {kind!r}, and only lora adapters are read")
    if type(rank) is not int or rank < 1 or not math.isfinite(scale):
        raise ModelError(f"{path}: `rank` and `scale` must be numbers, `rank` at least 1")
    file = read_tensor_file(folder / WEIGHTS)
    tensors: dict[str, Floats] = {}
    for key in file.entries:
        values = file.read_floats(key)
        tensors[name_from_mlx(key)] = np.ascontiguousarray(_turned(values, key))
    targets = _check(folder, tensors, rank)
    whole = sorted({name.rpartition(".")[0] for name in tensors if not name.endswith((".lora_A", ".lora_B"))})
    config = AdapterConfig(
        base=str(raw.get("model") or ""),
        rank=rank,
        alpha=scale * rank,
        dropout=float(parameters.get("dropout") or 0.0),
        targets=tuple(targets),
        modules_to_save=tuple(whole),
    )
    return config, tensors


def _check(folder: Path, tensors: Mapping[str, Floats], rank: int) -> list[str]:
    """The modules with both sides of this rank; one without is an error."""
    modules = sorted({name.rpartition(".")[0] for name in tensors if name.endswith((".lora_A", ".lora_B"))})
    if not modules:
        raise ModelError(f"{folder}: no lora_a or lora_b in {WEIGHTS}")
    for module in modules:
        down, up = (tensors.get(f"{module}.lora_{side}") for side in "AB")
        if down is None or up is None:
            raise ModelError(f"{folder}: `{module}` has only one of lora_a and lora_b")
        if down.ndim != 2 or up.ndim != 2 or {down.shape[0], up.shape[1]} != {rank}:
            raise ModelError(
                f"{folder}: `{module}` has lora_a {list(down.T.shape)} and lora_b {list(up.T.shape)}, "
                f"which do not fit rank {rank}"
            )
    return modules
