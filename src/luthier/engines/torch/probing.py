"""A model read from disk again and asked for its logits, computed as training computed them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from luthier.engines.torch.head import ROUNDED, find_head
from luthier.engines.torch.loading import Loaded, load_as_start, run_base
from luthier.engines.torch.lora import Dropout, FrozenLinear, LoraLinear, replace_module
from luthier.engines.torch.sampling import few_threads, sample_tokens
from luthier.engines.verbs import Batch, Ints, Logits, SampleParams
from luthier.runs.resolve import AdapterRef, ResolvedModel
from luthier.weights.peft import read_adapter


def build_prober(
    resolved: ResolvedModel, home: Path, *, precision: str, device: str, over: AdapterRef | None = None
) -> TorchProber:
    """A model with its adapters in its weights, in the values that the adapter `over` it was trained on."""
    return TorchProber(load_as_start(resolved, home, precision=precision, device=device, over=over))


class TorchProber:
    """A loaded model that is asked at a few places."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded

    def adapt(self, folder: Path) -> list[str]:
        """Put an adapter over the weights, unmerged as training has it; returns its tensors that have no place."""
        config, tensors = read_adapter(folder)
        model = self._loaded.model
        modules = dict(model.named_modules())
        parameters = dict(model.named_parameters(remove_duplicate=False))
        left = []
        with torch.no_grad():
            for key, value in tensors.items():
                name, _, part = key.rpartition(".")
                if part == "lora_B":
                    continue
                if part == "lora_A":
                    base, up = modules.get(name), tensors[f"{name}.lora_B"]
                    is_fit = isinstance(base, nn.Linear | FrozenLinear) and base.weight.shape == (
                        up.shape[0],
                        value.shape[1],
                    )
                    if not is_fit:
                        left += [key, f"{name}.lora_B"]
                        continue
                    layer = LoraLinear(base, len(value), config.scale, Dropout(0.0, 0), 0)  # type: ignore[arg-type]
                    layer.lora_A.copy_(torch.from_numpy(value))
                    layer.lora_B.copy_(torch.from_numpy(up))
                    replace_module(model, name, layer)
                elif key in parameters and parameters[key].shape == value.shape:
                    parameters[key].copy_(torch.from_numpy(value))
                else:
                    left.append(key)
        self._loaded.head = find_head(model)
        return left

    @torch.no_grad()
    def logits(self, sequences: Sequence[Ints], places: int) -> list[Logits]:
        """Logits of every token behind the last `places` tokens of each sequence."""
        with few_threads(self._loaded.model):
            return [self._logits(np.asarray(sequence, np.int64), places) for sequence in sequences]

    def answer(self, prompts: Sequence[Ints], tokens: int) -> list[list[int]]:
        """The likeliest tokens behind each prompt."""
        return sample_tokens(self._loaded.model, [prompt.tolist() for prompt in prompts], SampleParams(tokens))

    def _logits(self, tokens: Ints, places: int) -> Logits:
        sources = np.arange(len(tokens))[-places:]
        whole, ends = np.array([[0, len(tokens)]]), np.array([0, len(sources)])
        batch = Batch(tokens, whole, np.zeros_like(whole), sources, tokens[sources], ends, np.zeros(1, np.int64))
        rounded = batch.rounded(ROUNDED) if self._loaded.is_packed else batch
        hidden = run_base(self._loaded, rounded)[torch.from_numpy(sources).to(self._loaded.device)]
        found: Logits = self._loaded.head.rate(hidden).cpu().numpy()
        return found
