"""LoRA layers over mlx_lm's linear layers, plain or quantised, with the dropout that every engine draws."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from luthier.data.hashes import mix
from luthier.engines.drawing import dropped_below, first_values, site_of
from luthier.engines.mlx.naming import is_published
from luthier.errors import UnsupportedError
from luthier.spec.method import AdapterKeys
from luthier.weights.mlx import name_from_mlx
from luthier.weights.tensors import TensorInfo, is_adaptable, is_in_last_layers, is_named, is_of_experts, layer_number

_LINEAR = (nn.Linear, nn.QuantizedLinear)


@dataclass
class Dropout:
    """Which inputs are left out in the pass that is being traced; drawn on the device, by numbers alone."""

    share: float
    starts: mx.array | None = None
    """Where the random numbers of each token begin, in the shape of the tokens; None while nothing is dropped."""

    def apply(self, x: mx.array, site: int) -> mx.array:
        """The input with what this layer leaves out."""
        if self.starts is None or self.share == 0:
            return x
        width = x.shape[-1]
        words = self.starts[..., None] + mx.arange(-(-width // 8), dtype=mx.uint64)
        drawn = mix_on_device(words, site).view(mx.uint8)[..., :width]
        limit = dropped_below(self.share)
        return x * ((drawn >= limit).astype(x.dtype) * (256 / (256 - limit)))


def mix_on_device(words: mx.array, seed: int) -> mx.array:
    """`luthier.data.hashes.mix`, number for number."""

    def constant(value: int) -> mx.array:
        return mx.array(np.array(value, np.uint64))

    words = words + constant((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
    words = (words ^ (words >> constant(30))) * constant(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> constant(27))) * constant(0x94D049BB133111EB)
    return words ^ (words >> constant(31))


class LoraLinear(nn.Module):
    """A frozen linear layer and its trained low-rank update, in the place of the layer it wraps."""

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: Dropout, site: int) -> None:
        super().__init__()
        self.linear = linear
        self.freeze()
        outputs, inputs = linear_shape(linear)
        self.lora_A = mx.zeros((rank, inputs))
        self.lora_B = mx.zeros((outputs, rank))
        self._scale, self._dropout, self._site = scale, dropout, site

    def __call__(self, x: mx.array) -> mx.array:
        inner = self._dropout.apply(x, self._site) @ self.lora_A.astype(x.dtype).T
        update = inner @ self.lora_B.astype(x.dtype).T
        result: mx.array = self.linear(x)
        return result + (update * self._scale).astype(result.dtype)

    @property
    def weight(self) -> mx.array:
        """The weight with its update, for models that do not only call the layer."""
        base = whole_weight(self.linear)
        update = (self.lora_B @ self.lora_A) * self._scale
        return (base.astype(mx.float32) + update).astype(base.dtype)


def linear_shape(linear: Any) -> tuple[int, int]:
    """Outputs and inputs of a linear layer or an embedding, quantised or not."""
    outputs, inputs = linear.weight.shape
    bits = getattr(linear, "bits", None)
    return outputs, inputs if bits is None else inputs * 32 // bits


def whole_weight(module: Any) -> mx.array:
    """A weight in full width: of a quantised layer the values that it computes with."""
    if getattr(module, "bits", None) is None:
        return module.weight
    return mx.dequantize(
        module.weight, module.scales, module.get("biases"), module.group_size, module.bits, mode=module.mode
    )


def find_targets(model: nn.Module, method: AdapterKeys, files: Mapping[str, TensorInfo]) -> list[str]:
    """Paths of the linear layers that the method adapts; each name asked for must be found, and be linear."""
    wanted = method.targets
    linears = {path: module for path, module in model.named_modules() if isinstance(module, _LINEAR)}
    has_experts = any(is_of_experts(name) for name in files)
    named = {path: name_from_mlx(path) for path in linears}
    known = [path for path, name in named.items() if is_adaptable(name, has_experts=has_experts)]
    if isinstance(wanted, list):
        known += [path for path in linears if layer_number(path) is None]
        known = [path for path in known if any(is_named(named[path], target) for target in wanted)]
    layers = len(model.layers)
    chosen = [path for path in known if is_in_last_layers(named[path], method.last_layers, layers)]
    for name in wanted if isinstance(wanted, list) else []:
        if not any(is_named(named[path], name) for path in known):
            raise _not_linear(model, name)
    if not chosen:
        raise UnsupportedError(
            "no linear layer to adapt was found in this model",
            hint='name them in method.targets, or set method.kind = "full"',
        )
    for path in chosen:
        if not is_published(f"{path}.weight", linear_shape(linears[path]), files):
            raise UnsupportedError(
                f"mlx_lm holds `{named[path]}` otherwise than the model's files do, so its adapter would fit nowhere",
                hint='leave it out of method.targets, or set engine.kind = "torch"',
            )
    return sorted(chosen, key=lambda path: (layer_number(path) or 0, path))


def _not_linear(model: nn.Module, name: str) -> UnsupportedError:
    found = [type(module).__name__ for path, module in model.named_modules() if is_named(name_from_mlx(path), name)]
    what = f"is {found[0]}, not a linear layer" if found else "is no layer of this model"
    return UnsupportedError(
        f"method.targets: `{name}` {what}",
        hint='leave targets out, or set "auto": every linear layer but the head is found',
    )


def adapt(
    model: nn.Module, method: AdapterKeys, seed: int, files: Mapping[str, TensorInfo]
) -> tuple[dict[str, LoraLinear], Dropout]:
    """Put LoRA layers in the place of the targets, by path; everything else is frozen."""
    model.freeze()
    scale = method.alpha / (math.sqrt(method.rank) if method.rslora else method.rank)
    dropout = Dropout(method.dropout)
    layers: dict[str, LoraLinear] = {}
    modules = dict(model.named_modules())
    for path in find_targets(model, method, files):
        name = name_from_mlx(path)
        layer = LoraLinear(modules[path], method.rank, scale, dropout, site_of(name))
        layer.lora_A = mx.array(first_values(seed, name, *layer.lora_A.shape))
        layers[path] = layer
        replace_module(model, path, layer)
    return layers, dropout


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of another."""
    *parents, last = path.split(".")
    place: Any = model
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else getattr(place, name)
    setattr(place, last, module)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """The LoRA layers of a model by path."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, LoraLinear))


def row_keys(keys: np.ndarray[Any, Any], step: int) -> list[int]:
    """What tells the rows of a step apart for dropout."""
    found: list[int] = mix(keys.astype(np.uint64), step).tolist()
    return found
