"""Load a base model by mlx_lm: weights, earlier adapters, a quantised base, new adapters; check that padding holds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import orjson

from luthier.engines.mlx.architectures import HELD, correct, find_window, text_settings, translate_settings
from luthier.engines.mlx.head import Arrays, Parts, part_model, place
from luthier.engines.mlx.lora import Dropout, LoraLinear, adapt
from luthier.engines.mlx.naming import parameters_of, path_of
from luthier.engines.mlx.quantised import (
    build_quantised,
    choose_quantisation,
    dequantise_by_name,
    dequantise_model,
    pass_model_through,
    quantise,
)
from luthier.errors import ModelError, UnsupportedError
from luthier.runs.lineage import base_hash
from luthier.runs.resolve import AdapterRef, ResolvedModel
from luthier.spec.method import AdapterKeys, QloraMethod
from luthier.spec.plan import RunPlan
from luthier.weights.mlx import name_from_mlx
from luthier.weights.peft import read_adapter
from luthier.weights.shards import Floats
from luthier.weights.tensors import TensorInfo, find_mlx_bits, is_named, read_config, read_shapes, unpack_shapes
from luthier.weights.text_files import copy_text_files

DTYPES = {"fp32": mx.float32, "bf16": mx.bfloat16, "fp16": mx.float16}
# How far two ways of one computation may part before it is a leak and not rounding, as a share of the largest logit.
_TOLERANCE = {"fp32": 1e-4, "bf16": 6e-2, "fp16": 1e-2}
_CACHE_SHARE = 0.1
_UNTOLD = (ValueError, TypeError, KeyError, IndexError, AttributeError, FileNotFoundError, RuntimeError)


@dataclass
class Loaded:
    """A model ready to train or to be asked."""

    model: Any
    parts: Parts
    precision: str
    vocabulary: int
    notes: tuple[str, ...] = ()
    window: int | None = None
    """Tokens beyond which a row would need a window of attention that mlx_lm's model does not have."""
    is_padded: bool = True
    """Whether rows share a forward pass, padded to one length."""
    adapters: dict[str, LoraLinear] = field(default_factory=dict)
    trained: Arrays = field(default_factory=dict)
    """What is trained, by path."""
    dropout: Dropout = field(default_factory=lambda: Dropout(0.0))
    files: Mapping[str, TensorInfo] = field(default_factory=dict)

    def check_length(self, tokens: int) -> None:
        """Refuse a row that mlx_lm would compute otherwise than transformers."""
        if self.window is not None and tokens > self.window:
            raise UnsupportedError(
                f"a row has {tokens:,} tokens; beyond {self.window:,} this model attends within windows, and mlx_lm's "
                "code for it has none",
                hint=f'set data.max_length = {self.window}, or engine.kind = "torch"',
            )


def choose_device(device: str) -> None:
    """Compute where the plan says; what is set here holds for the process."""
    if device == "metal":
        mx.set_default_device(mx.gpu)
        room = int(mx.device_info().get("max_recommended_working_set_size", 0))
        if room:
            mx.set_wired_limit(room)
            # Rows of many lengths leave buffers of many sizes behind: what is kept for later is bounded.
            mx.set_cache_limit(int(_CACHE_SHARE * room))
        return
    mx.set_default_device(mx.cpu)
    # On a CPU, compiled functions need a C++ compiler at run time and gain nothing.
    mx.disable_compile()


def find_device() -> str:
    """`metal` where this machine has it, else `cpu`."""
    return "metal" if sys.platform == "darwin" and mx.metal.is_available() else "cpu"


def keeps_packed() -> bool:
    """Whether quantised weights are computed with as they are.

    On a CPU that takes thirty times as long as with the same values in full width, which are held there instead.
    """
    return find_device() == "metal"


def load_for_training(plan: RunPlan, resolved: ResolvedModel, home: Path) -> Loaded:
    """The model of a plan, with what is trained and what is frozen decided."""
    spec, method = plan.spec, plan.spec.method
    precision = spec.compute.precision
    if isinstance(method, QloraMethod):
        loaded = _load_quantised(resolved, home, precision, method.bits, tuple(method.also_train))
    else:
        loaded = _load_plain(resolved, home, precision)
    loaded.files = _read_files(resolved.folder)
    loaded.model.freeze()
    if isinstance(method, AdapterKeys):
        loaded.adapters, loaded.dropout = adapt(loaded.model, method, spec.seed, loaded.files)
        for path, layer in loaded.adapters.items():
            loaded.trained |= {f"{path}.lora_A": layer.lora_A, f"{path}.lora_B": layer.lora_B}
        for wanted in method.also_train:
            loaded.trained |= _also_train(loaded, wanted)
    else:
        loaded.model.unfreeze()
        loaded.trained = parameters_of(loaded.model)
    loaded.parts = part_model(loaded.model)
    if spec.compute.recompute == "always":
        _recompute(loaded.model)
    return loaded


def load_for_sampling(resolved: ResolvedModel, home: Path, *, precision: str) -> Loaded:
    """A model to be measured as it stands, adapters added to its weights."""
    return _load_plain(resolved, home, precision)


def load_as_start(resolved: ResolvedModel, home: Path, *, precision: str, over: AdapterRef | None = None) -> Loaded:
    """A model as training starts from it: earlier adapters in its weights, quantised where `over` was trained so."""
    if over is not None and over.quantised:
        _check_own(over)
        return _load_quantised(resolved, home, precision, over.bits, read_adapter(over.path)[0].modules_to_save)
    return _load_plain(resolved, home, precision)


def _load_plain(resolved: ResolvedModel, home: Path, precision: str) -> Loaded:
    model, config = _read_with_adapters(resolved, precision)
    return _finish(model, config, precision)


def _load_quantised(resolved: ResolvedModel, home: Path, precision: str, bits: int, whole: tuple[str, ...]) -> Loaded:
    """The base quantised once; modules that are trained whole stay as they are."""
    if find_mlx_bits(read_config(resolved.folder)) is not None and not resolved.adapters:
        if whole:
            raise UnsupportedError(
                f"method.also_train: the base is quantised already, so `{whole[0]}` cannot be trained whole",
                hint="name the original model: what is trained whole then stays in full width",
            )
        return _read_packed(resolved.folder, precision)
    facts = {
        "base": base_hash(resolved.folder),
        "adapters": [[base_hash(ref.path), ref.quantised, ref.bits] for ref in resolved.adapters],
        "precision": precision,
    }
    kept: frozenset[str] = frozenset()
    if whole:
        model, _ = read_model(resolved.folder, precision, lazy=True)
        kept = frozenset(path for name in whole for path in _find_modules(model, name))
    folder = build_quantised(home, facts, lambda: _read_with_adapters(resolved, precision), bits, kept)
    return _read_packed(folder, precision)


def _read_packed(folder: Path, precision: str) -> Loaded:
    model, config = read_model(folder, precision)
    return _finish(model if keeps_packed() else dequantise_model(model), config, precision)


def _finish(model: Any, config: dict[str, Any], precision: str) -> Loaded:
    loaded = Loaded(model, part_model(model), precision, int(text_settings(config).get("vocab_size") or 0))
    loaded.window = find_window(model, config)
    kind = str(config.get("model_type"))
    if kind not in HELD:
        loaded.notes = (f"mlx_lm's `{kind}` is not among those that Luthier's tests hold against transformers",)
    loaded.is_padded = _holds_when_padded(loaded)
    return loaded


def read_model(folder: Path, precision: str | None, *, lazy: bool = False) -> tuple[Any, dict[str, Any]]:
    """mlx_lm's model from safetensors alone, without any code of the model's own, and its configuration.

    A `lazy` one reads a weight when it is first asked for. Without a precision it stays in its own.
    """
    from mlx_lm.utils import load_model

    config = read_config(folder)
    try:
        model, found = load_model(folder, lazy=True, model_config=translate_settings(config), trust_remote_code=False)
    except UnsupportedError:
        raise
    except _UNTOLD as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{folder}: mlx_lm cannot load this model: {said}",
            hint='`luthier doctor` shows its version; engine.kind = "torch" knows more architectures',
        ) from None
    if precision is not None:
        model.set_dtype(DTYPES[precision])
        correct(model, found, precision)
    model.eval()
    if not lazy:
        mx.eval(model.parameters())
    return model, found


def _read_with_adapters(resolved: ResolvedModel, precision: str) -> tuple[Any, dict[str, Any]]:
    """The model with adapters added in order, each to the values it was trained over."""
    model, config = read_model(resolved.folder, precision)
    is_stored = "quantization" in config
    if resolved.adapters and is_stored:
        model = dequantise_model(model)
        config = {key: value for key, value in config.items() if not key.startswith("quantization")}
    for ref in resolved.adapters:
        if ref.quantised and not is_stored:
            _check_own(ref)
            pass_model_through(model, ref.bits)
        is_stored = False
        _apply_adapter(model, ref.path)
    return model, config


def _check_own(ref: AdapterRef) -> None:
    if ref.engine != "mlx":
        raise UnsupportedError(
            f"{ref.path}: was trained over NF4 values, which engine `mlx` does not have",
            hint="`luthier merge` it with --nf4, and name the merged model as the base",
        )


def build_dequantise(folder: Path, *, precision: str, bits: int) -> Callable[[str, Floats], Floats | None]:
    """Weights of a model folder through the quantiser and back, by tensor name; None for those that stay."""
    choose_device(find_device())
    model, _ = read_model(folder, precision, lazy=True)
    return dequantise_by_name(model, bits, DTYPES[precision])


def _read_files(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of the base's files in full width."""
    config, shapes = read_config(folder), read_shapes(folder)
    return shapes if find_mlx_bits(config) is None else unpack_shapes(shapes, config)


def write_dequantised(folder: Path, out: Path) -> None:
    """A model that mlx_lm has quantised, as a whole model in full width: the values that it computes with."""
    from mlx_lm.utils import save_model

    choose_device(find_device())
    model, _ = read_model(folder, None, lazy=True)
    save_model(out, dequantise_model(model))
    kept = {key: value for key, value in read_config(folder).items() if not key.startswith("quantization")}
    (out / "config.json").write_bytes(orjson.dumps(kept, option=orjson.OPT_INDENT_2) + b"\n")
    copy_text_files(folder, out)


def write_quantised(folder: Path, out: Path, bits: int) -> None:
    """A whole model through mlx_lm's quantiser, as a folder that mlx_lm reads."""
    from mlx_lm.utils import save_config, save_model

    choose_device(find_device())
    model, config = read_model(folder, None, lazy=True)
    settings = quantise(model, config, choose_quantisation(model, bits), frozenset())
    save_model(out, model)
    save_config(settings, out / "config.json")
    copy_text_files(folder, out)


def _apply_adapter(model: Any, folder: Path) -> None:
    """Add an earlier run's adapter to the weights, which is what this run starts from."""
    config, tensors = read_adapter(folder)
    left = merge_into(model, tensors, config.scale)
    if left:
        raise ModelError(
            f"{folder}: `{left[0]}` has no place in mlx_lm's model", hint='engine.kind = "torch" may know it'
        )


def merge_into(model: Any, tensors: Mapping[str, Any], scale: float) -> list[str]:
    """Add low-rank updates to weights in full width, and put whole tensors in; returns what has no place."""
    paths, left = parameters_of(model), []
    changed: Arrays = {}
    for key, value in tensors.items():
        name, _, part = key.rpartition(".")
        if part == "lora_B":
            continue
        path = path_of(f"{name}.weight" if part == "lora_A" else key, paths)
        if path is None:
            if not _is_twin(key, tensors, paths):
                left.append(key)
            continue
        before = changed.get(path, paths[path])
        exact = mx.array(value)
        if part == "lora_A":
            exact = before.astype(mx.float32) + scale * (mx.array(tensors[f"{name}.lora_B"]) @ exact)
        changed[path] = exact.astype(before.dtype)
    mx.eval(changed)
    place(model, changed)
    return left


def _is_twin(key: str, tensors: Mapping[str, Any], paths: Mapping[str, Any]) -> bool:
    """A head published beside the embedding table that it is one with."""
    has_head = any(path.endswith("lm_head.weight") for path in paths)
    has_table = any(other.endswith("embed_tokens.weight") for other in tensors)
    return key.endswith("lm_head.weight") and has_table and not has_head


def _also_train(loaded: Loaded, wanted: str) -> Arrays:
    modules = _find_modules(loaded.model, wanted)
    if any(isinstance(module, LoraLinear) for module in modules.values()):
        raise UnsupportedError(
            f"method.also_train: `{wanted}` has an adapter already, and cannot be trained whole as well",
            hint="leave it out of method.targets, or out of method.also_train",
        )
    found: Arrays = {}
    for path, module in modules.items():
        own = {name: value for name, value in module.items() if isinstance(value, mx.array)}
        found |= {f"{path}.{name}": value for name, value in own.items()}
        module.unfreeze(recurse=False)
    if not found:
        raise UnsupportedError(
            f"method.also_train: `{wanted}` is no module with weights in mlx_lm's model",
            hint="`luthier plan` lists what the model has",
        )
    return found


def _find_modules(model: Any, wanted: str) -> dict[str, Any]:
    """The modules of a name; the head of a model that has none is its embedding table."""
    modules = {path: module for path, module in model.named_modules() if path}
    found = {path: module for path, module in modules.items() if is_named(name_from_mlx(path), wanted)}
    if not found and wanted == "lm_head":
        found = {path: module for path, module in modules.items() if path.endswith("embed_tokens")}
    return found


def _recompute(model: Any) -> None:
    """Compute each layer again in the backward pass; only these layers, and not every one of their class."""
    for layer in model.layers:
        layer.__class__ = _recomputed(type(layer))


def _recomputed(kind: Any) -> type:
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        if any(each is not None for each in (*arguments[2:], named.get("cache"))):
            return kind.__call__(self, *arguments, **named)  # an answer goes on from its cache, which is changed there

        def inner(parameters: Any, *arguments: Any, **named: Any) -> Any:
            self.update(parameters)
            return kind.__call__(self, *arguments, **named)

        return mx.checkpoint(inner)(self.trainable_parameters(), *arguments, **named)

    return type(f"Recomputed{kind.__name__}", (kind,), {"__call__": call})


def _holds_when_padded(loaded: Loaded) -> bool:
    """Whether a short row beside a longer one gives what it gives alone."""
    count = min(512, loaded.vocabulary or 512)
    tokens = [(index * 37 + 11) % count for index in range(13)]
    rows = mx.array([tokens, tokens[:9] + [0] * 4])
    parts = loaded.parts
    together = parts.logits(parts.decoder(rows)[1:, :9])
    alone = parts.logits(parts.decoder(rows[1:, :9]))
    largest = mx.maximum(mx.abs(alone).max(), 1.0)
    return bool((mx.abs(together - alone).max() <= _TOLERANCE[loaded.precision] * largest).item())
