"""The model that TRL trains: transformers' own layers and attention, bitsandbytes' layers, what PEFT is to adapt."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from luthier.engines.drawing import first_values
from luthier.engines.torch.head import find_head
from luthier.engines.torch.loading import (
    DTYPES,
    apply_adapters,
    find_quantised,
    find_twins,
    name_own_attention,
    read_model,
    still_dropout,
)
from luthier.engines.torch.lora import find_targets, replace_module
from luthier.engines.torch.nf4 import Nf4Weight, quantiser, read_weights
from luthier.errors import UnsupportedError
from luthier.runs.resolve import ResolvedModel
from luthier.spec.method import AdapterKeys, QloraMethod
from luthier.spec.plan import RunPlan
from luthier.weights.tensors import is_named

_PREFIX = "base_model.model."
_PARTS = (
    (".lora_A.default.weight", ".lora_A"),
    (".lora_B.default.weight", ".lora_B"),
    (".modules_to_save.default.", "."),
)


@dataclass(frozen=True)
class Loaded:
    """A base model before PEFT has put anything into it."""

    model: Any
    targets: tuple[str, ...]
    """The layers to adapt; none where every weight is trained."""
    twins: tuple[str, ...]
    lora: peft.LoraConfig | None


def load_model(plan: RunPlan, resolved: ResolvedModel, home: Path) -> Loaded:
    """The model of a plan: frozen weights in the plan's number format, trained ones in fp32."""
    method, device = plan.spec.method, torch.device(plan.device)
    is_adapter = isinstance(method, AdapterKeys)
    dtype = DTYPES[plan.spec.compute.precision] if is_adapter else torch.float32
    model = read_model(resolved.folder, dtype, device, attends=None)
    if model._can_set_attn_implementation():
        model.set_attn_implementation(name_own_attention(model))
    apply_adapters(model, resolved, home)
    still_dropout(model)
    twins = find_twins(model)
    if not isinstance(method, AdapterKeys):
        model.requires_grad_(True)
        return Loaded(model, (), twins, None)
    targets = tuple(find_targets(model, method))
    _check_head(model, targets, method)
    if isinstance(method, QloraMethod):
        layers, key = find_quantised(model, resolved)
        _hold_in_4bit(model, layers, read_weights(layers, method.double_quant, home, key), dtype)
    return Loaded(model, targets, twins, _lora_config(method, targets, _find_whole(model, method)))


def _find_whole(model: Any, method: AdapterKeys) -> list[str]:
    """Modules trained whole by their full names: PEFT would take `norm` for `input_layernorm` too."""
    found = []
    for wanted in method.also_train:
        fitting = [
            name
            for name, module in model.named_modules()
            if is_named(name, wanted) and any(True for _ in module.parameters(recurse=False))
        ]
        if not fitting:
            raise UnsupportedError(
                f"method.also_train: `{wanted}` is no module with weights in this model",
                hint="`luthier plan` lists what the model has",
            )
        found += fitting
    return list(dict.fromkeys(found))


def _lora_config(method: AdapterKeys, targets: tuple[str, ...], whole: list[str]) -> peft.LoraConfig:
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        use_rslora=method.rslora,
        target_modules=list(targets),
        modules_to_save=whole or None,
        bias="none",
    )


def _check_head(model: Any, targets: tuple[str, ...], method: AdapterKeys) -> None:
    """TRL multiplies by the head's weight itself: an adapter on it would be passed by, a copy of it left behind."""
    ends = [find_head(model).module, model.get_input_embeddings()]
    names = [name for name, module in model.named_modules() if any(module is each for each in ends)]
    for key, asked in (("targets", targets), ("also_train", tuple(method.also_train))):
        taken = [name for name in names for each in asked if name == each or name.endswith(f".{each}")]
        if taken:
            raise UnsupportedError(
                f"method.{key}: engine `trl` cannot train `{taken[0]}`: TRL takes the head's own weight for its loss",
                hint='leave it out, or set engine.kind = "torch"',
            )


def _hold_in_4bit(
    model: Any, layers: Mapping[str, nn.Linear], weights: Mapping[str, Nf4Weight], dtype: torch.dtype
) -> None:
    """bitsandbytes' layers in the place of the linear ones, over the values that `torch` trains against."""
    quantiser()  # which imports bitsandbytes the way it should be
    layers_of: Any = importlib.import_module("bitsandbytes.nn")
    for name, layer in layers.items():
        held = layers_of.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=dtype,
            quant_type="nf4",
            device="meta",
        )
        weight = weights[name]
        held.weight = layers_of.Params4bit(
            weight.packed, quant_state=weight.state, quant_type="nf4", bnb_quantized=True, module=held
        )
        held.quant_state, held.bias = weight.state, layer.bias
        # At the first evaluation on a CPU it would repack its weights, and compute otherwise in training from then
        # on; what unpacks them is not exact. So they are never packed.
        held.support_avx512bf16_for_cpu = False
        replace_module(model, name, held)
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True  # by which PEFT knows which layers to expect


def name_trained(model: Any) -> dict[str, nn.Parameter]:
    """What is trained, by our names."""
    return {_own_name(name): each for name, each in model.named_parameters() if each.requires_grad}


def _own_name(name: str) -> str:
    for theirs, ours in _PARTS:
        name = name.replace(theirs, ours)
    return name.removeprefix(_PREFIX)


@torch.no_grad()
def start_adapters(trained: Mapping[str, nn.Parameter], targets: tuple[str, ...], seed: int) -> None:
    """The first values that every engine starts from, in fp32: TRL rounds those of a 4-bit model to bf16."""
    for each in trained.values():
        each.data = each.data.float()
    for target in targets:
        down = trained[f"{target}.lora_A"]
        down.copy_(torch.from_numpy(first_values(seed, target, *down.shape)))
        trained[f"{target}.lora_B"].zero_()


def cast_weights(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The model's weights in the number format they are published in; those that are one stay one."""
    found: dict[tuple[int, torch.Size], Tensor] = {}
    state: dict[str, Tensor] = model.state_dict()
    for each in state.values():
        key = each.data_ptr(), each.shape
        if key not in found:
            found[key] = each.detach().to("cpu", dtype if each.is_floating_point() else each.dtype)
    return {name: found[each.data_ptr(), each.shape] for name, each in state.items()}
