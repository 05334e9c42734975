"""A base held in 4-bit NF4, quantised once and cached: bitsandbytes' quantise and dequantise functions, nothing else.

Its own layers are left alone: on a CPU they repack their weights at the first evaluation, and the training forward is
another one from then on.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from luthier.data.cache import build_once, cache_key
from luthier.engines.torch.lora import FrozenLinear, replace_module
from luthier.extras import import_extra
from luthier.weights.shards import Floats
from luthier.weights.tensors import read_model_shape

_BLOCK = 64
_MARK = "::"


class Nf4Weight:
    """A weight in 4 bits, given back dequantised each time it is asked for."""

    def __init__(self, packed: Tensor, state: Any) -> None:
        self.packed, self.state = packed, state

    def __call__(self) -> Tensor:
        weight: Tensor = quantiser().dequantize_4bit(self.packed, self.state)
        return weight


def quantiser() -> ModuleType:
    """bitsandbytes' functions, imported without letting it fetch code from the hub, and without its line about that."""
    if "bitsandbytes" not in sys.modules:
        with _without_hub_kernels():
            import_extra("bitsandbytes", "torch")
    return import_extra("bitsandbytes.functional", "torch")


@contextmanager
def _without_hub_kernels() -> Iterator[None]:
    """Hide the `kernels` package, which bitsandbytes would ask for code from the hub while it is imported."""
    hidden = sys.modules.get("kernels")
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    sys.modules["kernels"] = None  # type: ignore[assignment]
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if hidden is not None:
            sys.modules["kernels"] = hidden


def quantise_model(
    model: nn.Module, layers: dict[str, nn.Linear], *, double: bool, keep_dequantised: bool, home: Path, base_key: str
) -> None:
    """Hold the layers in NF4; with `keep_dequantised` their values are those of NF4 and lie in full width."""
    weights = read_weights(layers, double, home, base_key)
    for name, layer in layers.items():
        weight = weights[name]
        if keep_dequantised:
            layer.weight = nn.Parameter(weight(), requires_grad=False)
        else:
            replace_module(model, name, FrozenLinear(layer, weight))


def build_dequantise(
    folder: Path, *, precision: str, double: bool, device: str
) -> Callable[[str, Floats], Floats | None]:
    """Weights of a model folder through NF4 and back, by tensor name; None for those that stay as they are."""
    linears = read_model_shape(folder).linears
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def dequantise(name: str, weights: Floats) -> Floats | None:
        if name.removesuffix(".weight") not in linears:
            return None
        packed, state = quantiser().quantize_4bit(
            torch.from_numpy(weights).to(device, dtype).contiguous(),
            blocksize=_BLOCK,
            compress_statistics=double,
            quant_type="nf4",
        )
        found: Floats = quantiser().dequantize_4bit(packed, state).float().cpu().numpy()
        return found

    return dequantise


def read_weights(layers: dict[str, nn.Linear], double: bool, home: Path, base_key: str) -> dict[str, Nf4Weight]:
    """The layers' weights in NF4, from the cache where they are there."""
    from safetensors.torch import load_file, save_file

    dtype = str(next(iter(layers.values())).weight.dtype)
    bitsandbytes = quantiser()
    version = sys.modules["bitsandbytes"].__version__
    facts = {"base": base_key, "double": double, "dtype": dtype, "bitsandbytes": version, "layers": sorted(layers)}

    def build(draft: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for name, layer in layers.items():
            packed, state = bitsandbytes.quantize_4bit(
                layer.weight.detach().contiguous(), blocksize=_BLOCK, compress_statistics=double, quant_type="nf4"
            )
            tensors[f"{name}{_MARK}packed"] = packed.cpu()
            for key, value in state.as_dict(packed=True).items():
                tensors[f"{name}{_MARK}{key}"] = value.cpu().contiguous()
        save_file(tensors, str(draft / "weights.safetensors"))

    folder = build_once(home / "nf4" / cache_key(facts), build)
    found = load_file(str(folder / "weights.safetensors"))
    device = next(iter(layers.values())).weight.device
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in found.items():
        name, _, part = key.partition(_MARK)
        parts.setdefault(name, {})[part] = tensor
    return {name: _restored(each, bitsandbytes, device) for name, each in parts.items()}


def _restored(parts: dict[str, Tensor], bitsandbytes: ModuleType, device: torch.device) -> Nf4Weight:
    packed = parts.pop("packed").to(device)
    return Nf4Weight(packed, bitsandbytes.QuantState.from_dict(parts, device=device))
