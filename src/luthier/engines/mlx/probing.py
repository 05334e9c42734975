"""A model read from disk again and asked for its logits, computed as training computed them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from luthier.engines.mlx.head import Arrays, part_model, place
from luthier.engines.mlx.loading import Loaded, choose_device, find_device, load_as_start
from luthier.engines.mlx.lora import Dropout, LoraLinear, linear_shape, replace_module
from luthier.engines.mlx.naming import parameters_of, path_of
from luthier.engines.mlx.sampling import sample_tokens
from luthier.engines.verbs import Ints, Logits, SampleParams
from luthier.runs.resolve import AdapterRef, ResolvedModel
from luthier.weights.peft import read_adapter


def build_prober(
    resolved: ResolvedModel, home: Path, *, precision: str, device: str, over: AdapterRef | None = None
) -> MlxProber:
    """A model with its adapters in its weights, in the values that the adapter `over` it was trained on."""
    choose_device(find_device())
    return MlxProber(load_as_start(resolved, home, precision=precision, over=over))


class MlxProber:
    """A loaded model that is asked at a few places."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded

    def adapt(self, folder: Path) -> list[str]:
        """Put an adapter over the weights, unmerged as training has it; returns its tensors that have no place."""
        config, tensors = read_adapter(folder)
        model = self._loaded.model
        modules, paths = dict(model.named_modules()), parameters_of(model)
        left: list[str] = []
        whole: Arrays = {}
        for key, value in tensors.items():
            name, _, part = key.rpartition(".")
            if part == "lora_B":
                continue
            if part == "lora_A":
                path, up = path_of(name, modules), tensors[f"{name}.lora_B"]
                if path is None or not _fits(modules[path], value, up):
                    left += [key, f"{name}.lora_B"]
                    continue
                layer = LoraLinear(modules[path], len(value), config.scale, Dropout(0.0), 0)
                layer.lora_A, layer.lora_B = mx.array(value), mx.array(up)
                replace_module(model, path, layer)
                continue
            path = path_of(key, paths)
            if path is not None and tuple(paths[path].shape) == value.shape:
                whole[path] = mx.array(value).astype(paths[path].dtype)
            elif not _is_twin(key, tensors):
                left.append(key)
        place(model, whole)
        self._loaded.parts = part_model(model)
        return left

    def logits(self, sequences: Sequence[Ints], places: int) -> list[Logits]:
        """Logits of every token behind the last `places` tokens of each sequence."""
        return [self._logits(np.asarray(sequence, np.int64), places) for sequence in sequences]

    def answer(self, prompts: Sequence[Ints], tokens: int) -> list[list[int]]:
        """The likeliest tokens behind each prompt."""
        return sample_tokens(self._loaded, [prompt.tolist() for prompt in prompts], SampleParams(tokens))

    def _logits(self, tokens: Ints, places: int) -> Logits:
        hidden = self._loaded.parts.decoder(mx.array(tokens[None].astype(np.int32)))[0]
        found: Logits = np.array(self._loaded.parts.logits(hidden[-places:]))
        return found


def _fits(module: Any, down: np.ndarray[Any, Any], up: np.ndarray[Any, Any]) -> bool:
    has_weight = hasattr(module, "weight") and not isinstance(module, LoraLinear)
    return has_weight and linear_shape(module) == (up.shape[0], down.shape[1])


def _is_twin(key: str, tensors: Any) -> bool:
    """A head published beside the embedding table that it is one with."""
    return key == "lm_head.weight" and any(other.endswith("embed_tokens.weight") for other in tensors)
