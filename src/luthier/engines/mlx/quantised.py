"""A base held in 4 or 8 bits by mlx_lm's own quantiser, made once and cached as a model that mlx_lm reads itself."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from luthier.data.cache import build_once, cache_key
from luthier.engines.mlx.naming import path_of
from luthier.errors import UnsupportedError
from luthier.weights.shards import Floats

CACHE = "mlx"
_GROUPS = (64, 32)


@dataclass(frozen=True)
class Quantisation:
    """How weights are held: so many bits each, and a scale and an offset for every so many of them."""

    bits: int
    group: int


def choose_quantisation(model: nn.Module, bits: int) -> Quantisation:
    """The largest groups that every layer that can be quantised has room for; mlx_lm's own 64 where it can be."""
    widths = [module.weight.shape[-1] for _, module in model.named_modules() if _can_quantise(module)]
    for group in _GROUPS:
        if widths and all(width % group == 0 for width in widths):
            return Quantisation(bits, group)
    if any(width % _GROUPS[-1] == 0 for width in widths):
        return Quantisation(bits, _GROUPS[-1])  # the others stay as they are, as mlx_lm has it
    raise UnsupportedError(
        f"no weight of this model can be quantised: mlx_lm wants widths that {_GROUPS[-1]} divides",
        hint='set method.kind = "lora"',
    )


def _can_quantise(module: Any) -> bool:
    return hasattr(module, "to_quantized") and getattr(module, "weight", None) is not None


def is_quantised_here(module: Any, how: Quantisation) -> bool:
    """Whether mlx_lm's quantiser takes this module."""
    return _can_quantise(module) and module.weight.shape[-1] % how.group == 0


def quantise(model: nn.Module, config: dict[str, Any], how: Quantisation, kept: frozenset[str]) -> dict[str, Any]:
    """Quantise in place but for the modules `kept` as they are; returns the configuration that says so."""
    from mlx_lm.utils import quantize_model

    own = getattr(model, "quant_predicate", None)

    def predicate(path: str, module: nn.Module) -> Any:
        return path not in kept and (own is None or own(path, module))

    with contextlib.redirect_stdout(io.StringIO()):
        _, found = quantize_model(model, config, how.group, how.bits, quant_predicate=predicate)
    settings: dict[str, Any] = found
    return settings


def build_quantised(
    home: Path,
    facts: dict[str, Any],
    make: Callable[[], tuple[nn.Module, dict[str, Any]]],
    bits: int,
    kept: frozenset[str],
) -> Path:
    """The folder of the quantised model, made from what `make` loads if it is not there; `facts` name its content."""
    import mlx_lm
    from mlx_lm.utils import save_config, save_model

    key = cache_key({**facts, "bits": bits, "kept": sorted(kept), "mlx": mx.__version__, "mlx_lm": mlx_lm.__version__})

    def build(draft: Path) -> None:
        model, config = make()
        settings = quantise(model, config, choose_quantisation(model, bits), kept)
        save_model(draft, model)
        save_config(settings, draft / "config.json")

    return build_once(home / CACHE / key, build)


def pass_through(weights: mx.array, how: Quantisation) -> mx.array:
    """The values that weights have once they were quantised, in the weights' own type."""
    return mx.dequantize(*mx.quantize(weights, how.group, how.bits), how.group, how.bits)


def pass_model_through(model: nn.Module, bits: int, kept: frozenset[str] = frozenset()) -> None:
    """Give every weight that would be quantised the value it would have, in full width."""
    how = choose_quantisation(model, bits)
    for path, module in model.named_modules():
        if path not in kept and is_quantised_here(module, how):
            module.weight = pass_through(module.weight, how)
            mx.eval(module.weight)


def dequantise_by_name(model: nn.Module, bits: int, dtype: mx.Dtype) -> Callable[[str, Floats], Floats | None]:
    """Weights by their name in the files through the quantiser and back; None for those that stay as they are."""
    how = choose_quantisation(model, bits)
    taken = {f"{path}.weight": module for path, module in model.named_modules() if is_quantised_here(module, how)}

    def dequantise(name: str, weights: Floats) -> Floats | None:
        path = path_of(name, taken)
        if path is None or tuple(taken[path].weight.shape) != weights.shape:
            return None
        found: Floats = np.array(pass_through(mx.array(weights).astype(dtype), how).astype(mx.float32))
        return found

    return dequantise


def dequantise_model(model: nn.Module) -> nn.Module:
    """Every quantised layer in full width, with the values that it computes with."""
    from mlx_lm.utils import dequantize_model

    found: nn.Module = dequantize_model(model)
    return found
