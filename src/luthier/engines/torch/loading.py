"""Load a base model for training: weights, earlier adapters, 4-bit values, new adapters; check that packing holds."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from luthier.engines.torch import attention
from luthier.engines.torch.head import Head, find_head
from luthier.engines.torch.lora import Dropout, LoraLinear, adapt, find_targets, lora_layers
from luthier.engines.torch.nf4 import quantise_model
from luthier.engines.verbs import Batch
from luthier.errors import ModelError, UnsupportedError
from luthier.runs.lineage import base_hash
from luthier.runs.resolve import ResolvedModel
from luthier.spec.method import AdapterKeys, LoraMethod, QloraMethod
from luthier.spec.plan import RunPlan
from luthier.weights.peft import read_adapter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# How far two ways of one computation may part before it is a leak and not rounding, as a share of the largest logit.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


@dataclass
class Loaded:
    """A model ready to train."""

    model: Any
    head: Head
    device: torch.device
    dtype: torch.dtype
    is_packed: bool = True
    adapters: dict[str, LoraLinear] = field(default_factory=dict)
    whole: dict[str, nn.Parameter] = field(default_factory=dict)
    """Parameters trained whole, by name."""
    twins: tuple[str, ...] = ()
    """Names of the embedding table and of the head, where they are one."""
    dropout: Dropout = field(default_factory=lambda: Dropout(0.0, 0))


def load_for_training(plan: RunPlan, resolved: ResolvedModel, home: Path) -> Loaded:
    """The model of a plan on its device, with what is trained and what is frozen decided."""
    spec = plan.spec
    dtype, device = DTYPES[spec.compute.precision], torch.device(plan.device)
    model = read_model(resolved.folder, dtype, device)
    loaded = Loaded(model, find_head(model), device, dtype)
    for ref in resolved.adapters:
        if ref.quantised:
            _quantise(loaded, QloraMethod(kind="qlora"), plan, resolved, home, kept=True)
        _apply_adapter(model, ref.path)
    loaded.is_packed = holds_when_packed(loaded)
    method = spec.method
    if isinstance(method, AdapterKeys):
        if isinstance(method, QloraMethod):
            _quantise(loaded, method, plan, resolved, home, kept=plan.keeps_dequantised)
        _adapt(loaded, method, spec.seed)
    else:
        model.requires_grad_(True)
        loaded.whole = dict(model.named_parameters())
    _prepare_modules(loaded, recompute=spec.compute.recompute == "always")
    return loaded


def read_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' model with our attention, from safetensors alone and without any code of the model's own."""
    os.environ.setdefault("USE_HUB_KERNELS", "0")
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    attention.register()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation=attention.NAME,
            )
        except (OSError, ValueError, KeyError) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"{folder}: transformers cannot load this model: {said}",
                hint="`luthier doctor` shows its version; the folder needs config.json and .safetensors files",
            ) from None
    model.config.use_cache = False
    return model.to(device)


def _apply_adapter(model: Any, folder: Path) -> None:
    """Add an earlier run's adapter to the weights, which is what this run starts from."""
    config, tensors = read_adapter(folder)
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for key, value in tensors.items():
            name, _, part = key.rpartition(".")
            if part == "lora_B":
                continue
            if part == "lora_A":
                weight = modules[name].weight
                update = torch.from_numpy(tensors[f"{name}.lora_B"]) @ torch.from_numpy(value)
                weight.copy_((weight.float() + config.scale * update.to(weight.device)).to(weight.dtype))
            else:
                parameters[key].copy_(torch.from_numpy(value))


def _quantise(
    loaded: Loaded, method: QloraMethod, plan: RunPlan, resolved: ResolvedModel, home: Path, *, kept: bool
) -> None:
    every = find_targets(loaded.model, LoraMethod(kind="lora"))
    layers = {name: loaded.model.get_submodule(name) for name in every}
    key = "|".join([base_hash(resolved.folder), *(base_hash(ref.path) for ref in resolved.adapters)])
    quantise_model(loaded.model, layers, double=method.double_quant, keep_dequantised=kept, home=home, base_key=key)


def _adapt(loaded: Loaded, method: AdapterKeys, seed: int) -> None:
    loaded.adapters = adapt(loaded.model, method, seed)
    layers = list(lora_layers(loaded.model))
    if layers:
        loaded.dropout = layers[0].dropout
    loaded.twins = _find_twins(loaded.model)
    for wanted in method.also_train:
        known = {id(parameter) for parameter in loaded.whole.values()}
        found = _also_train(loaded.model, wanted)
        loaded.whole |= {name: parameter for name, parameter in found.items() if id(parameter) not in known}


def _find_twins(model: Any) -> tuple[str, ...]:
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if table.weight is not getattr(head, "weight", None):
        return ()
    return tuple(f"{name}.weight" for name, module in model.named_modules() if module in (table, head))


def _also_train(model: Any, wanted: str) -> dict[str, nn.Parameter]:
    found = {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if path == wanted or path.endswith(f".{wanted}")
        for name, parameter in module.named_parameters(recurse=False)
    }
    if not found:
        raise UnsupportedError(
            f"method.also_train: `{wanted}` is no module with weights in this model",
            hint="`luthier plan` lists what the model has",
        )
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def _prepare_modules(loaded: Loaded, *, recompute: bool) -> None:
    """No randomness but ours, and recomputation where it was planned."""
    for module in loaded.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    loaded.model.eval()
    if recompute:
        loaded.model.train()
        _recompute(loaded.model)


def _recompute(model: Any) -> None:
    # transformers renamed it; the old name still works there, but warns.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UnsupportedError(
            f"this model cannot recompute activations: {str(error).splitlines()[0]}",
            hint='set compute.recompute = "never", and compute.micro_batch_tokens lower if memory is short',
        ) from None


def run_base(loaded: Loaded, batch: Batch) -> Tensor:
    """Hidden states after the last layer for every token of a batch: (tokens, width)."""
    device = loaded.device
    arguments: dict[str, Any] = {attention.LAYOUT: attention.lay_out(batch, device)}
    output = loaded.model.get_decoder()(
        input_ids=torch.from_numpy(batch.tokens).to(device)[None],
        position_ids=torch.from_numpy(batch.positions).to(device)[None],
        use_cache=False,
        **arguments,
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


@torch.no_grad()
def holds_when_packed(loaded: Loaded) -> bool:
    """Whether two short segments in one forward give what each gives alone; and our head gives the model's own logits.

    Some hybrid models carry state from one segment to the next without a word. The reference is the model's own
    forward with its own attention.
    """
    count = min(512, int(loaded.head.weight.shape[0]))
    tokens = (np.arange(22) * 37 + 11) % count
    batch = _probe_batch(tokens, [(0, 9), (9, 22)])
    alone = [_own_logits(loaded, tokens[start:stop]) for start, stop in ((0, 9), (9, 22))]
    largest = max(float(logits.abs().max()) for logits in alone)
    allowed = _TOLERANCE[loaded.dtype] * max(largest, 1.0)
    single = _probe_batch(tokens[:9], [(0, 9)])
    if not _differ(_our_logits(loaded, single), alone[0]) <= allowed:
        raise ModelError(
            "this model gives other logits through packed attention than through its own",
            hint='report its architecture, and use engine.kind = "trl" for it meanwhile',
        )
    return _differ(_our_logits(loaded, batch), torch.cat(alone)) <= allowed


def _probe_batch(tokens: Any, segments: list[tuple[int, int]]) -> Batch:
    empty = np.zeros(0, np.int64)
    places = np.array(segments, np.int64)
    return Batch(tokens.astype(np.int64), places, np.zeros_like(places), empty, empty, empty, empty)


def _our_logits(loaded: Loaded, batch: Batch) -> Tensor:
    return loaded.head._logits(run_base(loaded, batch), loaded.head.weight).float()


def _own_logits(loaded: Loaded, tokens: Any) -> Tensor:
    with own_attention(loaded.model):
        logits: Tensor = loaded.model(torch.from_numpy(tokens).to(loaded.device)[None], use_cache=False).logits[0]
    return logits.float()


def _differ(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


class own_attention:  # noqa: N801 (read as a statement: with own_attention(model))
    """The model with the attention transformers would give it, for reference passes and for sampling with padding."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __enter__(self) -> None:
        name = "sdpa" if getattr(self._model, "_supports_sdpa", False) else "eager"
        self._model.set_attn_implementation(name)

    def __exit__(self, *_: object) -> None:
        self._model.set_attn_implementation(attention.NAME)
