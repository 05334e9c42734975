"""Adapters in PEFT's file format, read and written without PEFT; what cannot be honoured is refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from luthier.errors import MissingPathError, ModelError, UnsupportedError
from luthier.weights.header import PICKLED, TensorEntry
from luthier.weights.shards import Floats, Piece, read_tensor_file, write_tensor_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MLX_WEIGHTS = "adapters.safetensors"
_PREFIX = "base_model.model."
_SIDES = {".lora_A.weight": ".lora_A", ".lora_B.weight": ".lora_B"}
# Keys that say nothing about what the adapter computes.
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
_OWN = {
    "ensure_weight_tying",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "r",
    "target_modules",
    "use_rslora",
}
# Ways to start that leave the base as it was; the others (PiSSA, OLoRA, LoftQ ...) are adapters to another base.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter computes besides its tensors: W + scale * B @ A on its targets."""

    base: str
    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    targets: tuple[str, ...] = ()  # the last parts of module names, or whole names
    layers: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    revision: str | None = None
    tied: bool = False  # embeddings and head were trained as one matrix; both tensors are in the file, and equal

    @property
    def scale(self) -> float:
        """What B @ A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def write_adapter(folder: Path, config: AdapterConfig, tensors: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Both files of an adapter; tensors as `<module>.lora_A`, `<module>.lora_B` and `<module>.weight` or `.bias`."""
    _check_tensors(folder, config, tensors)
    _check_targets(folder, config, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    shown = _render_config(replace(config, modules_to_save=_whole_modules(tensors)))
    (folder / CONFIG).write_bytes(orjson.dumps(shown, option=orjson.OPT_INDENT_2) + b"\n")
    named = {_PREFIX + (f"{name}.weight" if _is_lora(name) else name): name for name in tensors}
    layout = {key: TensorEntry("F32", tensors[name].shape) for key, name in named.items()}

    def content(key: str) -> Iterable[Piece]:
        yield np.ascontiguousarray(tensors[named[key]], "<f4").data

    write_tensor_file(folder / WEIGHTS, layout, content, {"format": "pt"})


def _render_config(config: AdapterConfig) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "base_model_name_or_path": config.base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None if config.layers is None else list(config.layers),
        "lora_alpha": int(config.alpha) if float(config.alpha).is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": list(config.modules_to_save) or None,
        "peft_type": "LORA",
        "r": config.rank,
        "revision": config.revision,
        "target_modules": list(config.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": config.rslora,
    }
    # Older readers do not know this key, so it stands only where it is needed.
    return {**shown, "ensure_weight_tying": True} if config.tied else shown


def read_adapter(folder: Path) -> tuple[AdapterConfig, dict[str, Floats]]:
    """An adapter of ours, of PEFT's or of mlx_lm's, every tensor as fp32 under our names."""
    if not (folder / WEIGHTS).is_file() and (folder / MLX_WEIGHTS).is_file():
        from luthier.weights.mlx import read_mlx_adapter

        return read_mlx_adapter(folder)
    raw = _read_config(folder)
    path = _find_weights(folder)
    _check_supported(folder / CONFIG, raw)
    file = read_tensor_file(path)
    modules = tuple(raw.get("modules_to_save") or ())
    names = {key: _own_name(path, key, modules) for key in file.entries}
    for module in modules:
        if not any(_is_within(name, module) for name in names.values()):
            raise ModelError(f"{folder}: modules_to_save names `{module}`, and the file has no tensor of it")
    tensors = {name: file.read_floats(key) for key, name in names.items()}
    config = _build_config(folder / CONFIG, raw, tensors)
    _check_tensors(folder, config, tensors)
    return config, tensors


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise MissingPathError(f"{folder}: not an adapter: no {CONFIG}", hint="name the folder of an adapter")
    try:
        found = orjson.loads(path.read_bytes())
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}", hint="fetch or write the adapter again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: not a table of settings", hint="fetch or write the adapter again")
    return found


def _find_weights(folder: Path) -> Path:
    path = folder / WEIGHTS
    if path.is_file():
        return path
    pickled = sorted(each.name for each in folder.iterdir() if each.suffix in PICKLED)
    if pickled:
        raise ModelError(
            f"{folder}: {pickled[0]} is a pickle, which can run code when it is opened; only {WEIGHTS} is read",
            hint="convert the adapter to safetensors",
        )
    raise MissingPathError(f"{folder}: no {WEIGHTS}", hint="fetch or write the adapter again")


def _check_supported(path: Path, raw: dict[str, Any]) -> None:
    """Refuse every setting that changes what the adapter computes and that we would not honour."""
    if raw.get("peft_type") != "LORA":
        raise UnsupportedError(f"{path}: peft_type is {raw.get('peft_type')!r}, and only LORA adapters are read")
    if raw.get("init_lora_weights") not in _PLAIN_STARTS:
        raise UnsupportedError(
            f"{path}: init_lora_weights = {raw['init_lora_weights']!r} changes the base weights themselves",
            hint="convert it with PEFT (save_pretrained with path_initial_model_for_weight_conversion)",
        )
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    neutral: dict[str, Any] = {"bias": "none", "init_lora_weights": raw.get("init_lora_weights")}
    for key, value in raw.items():
        if key in _IGNORED or key in _OWN or not value or neutral.get(key) == value:
            continue
        usual = {"rank_pattern": rank, "alpha_pattern": alpha}.get(key)
        if usual is not None and isinstance(value, dict) and set(value.values()) == {usual}:
            continue
        raise UnsupportedError(
            f"{path}: `{key}` is set ({str(value)[:60]}), which cannot be honoured here",
            hint="train without it, or merge this adapter with PEFT and start from the merged model",
        )


def _own_name(path: Path, key: str, modules: tuple[str, ...]) -> str:
    name = key.removeprefix(_PREFIX)
    for ending, own in _SIDES.items():
        if key.startswith(_PREFIX) and name.endswith(ending):
            return name.removesuffix(ending) + own
    if "lora_embedding_" in key:
        raise UnsupportedError(f"{path}: `{key}` is a low-rank update of embeddings, which cannot be honoured here")
    if key.startswith(_PREFIX) and "lora_" not in name and any(_is_within(name, module) for module in modules):
        return name
    raise UnsupportedError(
        f"{path}: `{key}` belongs to no part of this adapter that is known here",
        hint=f"it is neither a lora_A or lora_B weight nor of modules_to_save in {CONFIG}",
    )


def _is_within(name: str, module: str) -> bool:
    """As PEFT chooses modules to save: by how their names end, even within a word."""
    return f"{module}." in name


def _build_config(path: Path, raw: dict[str, Any], tensors: Mapping[str, Floats]) -> AdapterConfig:
    targets, layers = raw.get("target_modules"), raw.get("layers_to_transform")
    if isinstance(targets, str):
        # A pattern over names that only the model knows; the tensors say what it matched, layer by layer.
        targets, layers = sorted(_adapted(tensors)), None
    try:
        config = AdapterConfig(
            base=str(raw.get("base_model_name_or_path") or ""),
            rank=raw["r"],
            alpha=float(raw["lora_alpha"]),
            dropout=float(raw.get("lora_dropout") or 0.0),
            rslora=bool(raw.get("use_rslora")),
            targets=tuple(targets or ()),
            layers=None if layers is None else (layers,) if isinstance(layers, int) else tuple(layers) or None,
            modules_to_save=_whole_modules(tensors),
            revision=raw.get("revision"),
            tied=bool(raw.get("ensure_weight_tying")),
        )
        valid = type(config.rank) is int and config.rank >= 1 and math.isfinite(config.alpha)
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise ModelError(f"{path}: `r` and `lora_alpha` must be numbers, `r` at least 1")
    return config


def _is_lora(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B"))


def _whole_modules(tensors: Iterable[str]) -> tuple[str, ...]:
    """Modules by their whole names: PEFT would take `norm` for `input_layernorm` too."""
    return tuple(sorted({name.rpartition(".")[0] for name in tensors if not _is_lora(name)}))


def _adapted(tensors: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in tensors if _is_lora(name)}


def _check_tensors(folder: Path, config: AdapterConfig, tensors: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Each module has both sides, of the rank that the config says, and every number is finite."""
    if not tensors:
        raise ModelError(f"{folder}: the adapter has no tensors")
    for module in sorted(_adapted(tensors)):
        sides = [tensors.get(f"{module}.lora_{side}") for side in "AB"]
        for side, found in zip("AB", sides, strict=True):
            if found is None:
                raise ModelError(f"{folder}: `{module}` has no lora_{side}")
        down, up = sides
        assert down is not None
        assert up is not None
        if down.ndim != 2 or up.ndim != 2 or {down.shape[0], up.shape[1]} != {config.rank}:
            raise ModelError(
                f"{folder}: `{module}` has lora_A {list(down.shape)} and lora_B {list(up.shape)}, which do not fit "
                f"rank {config.rank}"
            )
    for name, values in tensors.items():
        if not np.isfinite(values).all():
            raise ModelError(f"{folder}: `{name}` has numbers that are not finite")


def _check_targets(folder: Path, config: AdapterConfig, tensors: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """What a reader would adapt by the config is what the file has: a module that no target names would be lost."""
    modules = _adapted(tensors)
    for module in sorted(modules):
        if not any(_matches(module, target, config.layers) for target in config.targets):
            raise ModelError(f"{folder}: `{module}` is adapted, and no target names it")
    for target in config.targets:
        if not any(_matches(module, target, config.layers) for module in modules):
            raise ModelError(f"{folder}: the target `{target}` names no module that is adapted")
    whole = [name for name in tensors if not _is_lora(name)]
    for module in config.modules_to_save:
        if not any(f".{module}." in f".{name}" for name in whole):
            raise ModelError(f"{folder}: modules_to_save names `{module}`, and there is no tensor of it")
    for name in whole:
        if not any(f".{module}." in f".{name}" for module in config.modules_to_save):
            raise ModelError(f"{folder}: `{name}` was trained whole, and modules_to_save does not name it")
    if config.tied and not _has_twins(tensors):
        raise ModelError(f"{folder}: embeddings and head are one matrix, and the adapter lacks them as equal tensors")


def _matches(module: str, target: str, layers: tuple[int, ...] | None) -> bool:
    """As PEFT matches: a whole name, or its ending within the chosen layers."""
    if module == target:
        return True
    if not module.endswith(f".{target}"):
        return False
    layer = re.match(r".*?\.[^.]*\.(\d+)\.", module)
    return layers is None or (layer is not None and int(layer[1]) in layers)


def _has_twins(tensors: Mapping[str, np.ndarray[Any, Any]]) -> bool:
    whole = [values for name, values in tensors.items() if name.endswith(".weight")]
    return any(np.array_equal(one, other) for index, one in enumerate(whole) for other in whole[:index])
