"""Load a base model for training: weights, earlier adapters, 4-bit values, new adapters; check that packing holds."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field, replace
from importlib import import_module
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
from luthier.runs.resolve import AdapterRef, ResolvedModel
from luthier.spec.method import AdapterKeys, LoraMethod, QloraMethod
from luthier.spec.plan import RunPlan
from luthier.weights.peft import read_adapter
from luthier.weights.tensors import is_named

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

    def can_pack(self, batch: Batch) -> bool:
        """Whether the segments of a batch may be computed at once."""
        longest = find_rope_limit(self.model.config.get_text_config(), "longrope")
        return self.is_packed and (longest is None or len(batch.tokens) <= longest or batch.positions.max() < longest)


def load_for_training(plan: RunPlan, resolved: ResolvedModel, home: Path) -> Loaded:
    """The model of a plan on its device, with what is trained and what is frozen decided."""
    spec = plan.spec
    dtype, device = DTYPES[spec.compute.precision], torch.device(plan.device)
    model = read_model(resolved.folder, dtype, device)
    loaded = Loaded(model, find_head(model), device, dtype)
    apply_adapters(model, resolved, home)
    loaded.is_packed = holds_when_packed(loaded)
    method = spec.method
    if isinstance(method, AdapterKeys):
        if isinstance(method, QloraMethod):
            _quantise(model, method.double_quant, resolved, home, kept=plan.keeps_dequantised)
        _adapt(loaded, method, spec.seed)
    else:
        model.requires_grad_(True)
        loaded.whole = dict(model.named_parameters())
    _prepare_modules(loaded, recompute=spec.compute.recompute == "always")
    return loaded


def load_for_sampling(resolved: ResolvedModel, home: Path, *, precision: str, device: str) -> Loaded:
    """A model to be measured as it stands, adapters added to its weights."""
    model = read_model(resolved.folder, DTYPES[precision], torch.device(device))
    loaded = Loaded(model, find_head(model), torch.device(device), DTYPES[precision])
    apply_adapters(model, resolved, home)
    _prepare_modules(loaded, recompute=False)
    return loaded


def load_as_start(
    resolved: ResolvedModel, home: Path, *, precision: str, device: str, over: AdapterRef | None = None
) -> Loaded:
    """A model as training starts from it: earlier adapters in its weights, and NF4 values where `over` was on those."""
    model = read_model(resolved.folder, DTYPES[precision], torch.device(device))
    loaded = Loaded(model, find_head(model), torch.device(device), DTYPES[precision])
    apply_adapters(model, resolved, home)
    loaded.is_packed = holds_when_packed(loaded)
    if over is not None and over.quantised:
        _check_own(over)
        _quantise(model, over.double_quant, resolved, home, kept=True)
    _prepare_modules(loaded, recompute=False)
    return loaded


def read_model(folder: Path, dtype: torch.dtype, device: torch.device, attends: str | None = attention.NAME) -> Any:
    """transformers' model from safetensors alone, without code of its own; with our attention unless told."""
    os.environ.setdefault("USE_HUB_KERNELS", "0")
    import_module("transformers.modeling_utils")  # waits, where another thread is importing it in advance
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    attention.register()
    try:
        read = _from_pretrained(folder, dtype, attends)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{folder}: transformers cannot load this model: {said}",
            hint="`luthier doctor` shows its version; the folder needs config.json and .safetensors files",
        ) from None
    model, found = read
    # What the files lack, transformers would draw at random.
    if missing := sorted(found["missing_keys"]):
        raise ModelError(f"{folder}: {missing[0]} and {len(missing) - 1} more weights are in none of its files")
    if attends and getattr(model.config.get_text_config(), "attention_chunk_size", None):
        raise UnsupportedError(f"{folder}: this model attends in chunks, which packed attention does not have")
    return model.to(device)


def _from_pretrained(folder: Path, dtype: torch.dtype, attends: str | None) -> Any:
    """The model, and what was found of its weights."""
    from transformers import AutoModelForCausalLM

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                output_loading_info=True,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation=attends,
            )
    except KeyError as error:
        if error.args != (attention.NAME,):
            raise
        return _from_pretrained(folder, dtype, None)
    # Older models know no attention but their own, and would go without a mask under the name of another.
    takes_ours = attends is None or read[0]._can_set_attn_implementation()
    return read if takes_ours else _from_pretrained(folder, dtype, None)


def apply_adapters(model: Any, resolved: ResolvedModel, home: Path) -> None:
    """Add adapters to the weights in order, each to the values it was trained over: those of NF4 for a QLoRA run."""
    for number, ref in enumerate(resolved.adapters):
        if ref.quantised:
            _check_own(ref)
            below = replace(resolved, adapters=resolved.adapters[:number])
            _quantise(model, ref.double_quant, below, home, kept=True)
        _apply_adapter(model, ref.path)


def _check_own(ref: AdapterRef) -> None:
    if ref.engine != "torch":
        raise UnsupportedError(
            f"{ref.path}: was trained over values of mlx_lm's quantiser, which engine `torch` does not have",
            hint="`luthier merge` it, and name the merged model as the base",
        )


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
                _untie(model, modules[name])
                weight = modules[name].weight
                update = torch.from_numpy(tensors[f"{name}.lora_B"]) @ torch.from_numpy(value)
                weight.copy_((weight.float() + config.scale * update.to(weight.device)).to(weight.dtype))
            else:
                parameters[key].copy_(torch.from_numpy(value))


def _untie(model: Any, module: Any) -> None:
    """A head that an adapter changes is the embedding table no longer."""
    if module is model.get_output_embeddings() and module.weight is model.get_input_embeddings().weight:
        module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def _quantise(model: Any, double: bool, resolved: ResolvedModel, home: Path, *, kept: bool) -> None:
    layers, key = find_quantised(model, resolved)
    quantise_model(model, layers, double=double, keep_dequantised=kept, home=home, base_key=key)


def find_quantised(model: Any, resolved: ResolvedModel) -> tuple[dict[str, nn.Linear], str]:
    """The layers that a 4-bit base holds in 4 bits, and what their values hang on."""
    every = find_targets(model, LoraMethod(kind="lora"))
    key = "|".join([base_hash(resolved.folder), *(base_hash(ref.path) for ref in resolved.adapters)])
    return {name: model.get_submodule(name) for name in every}, key


def _adapt(loaded: Loaded, method: AdapterKeys, seed: int) -> None:
    loaded.adapters = adapt(loaded.model, method, seed)
    loaded.head = find_head(loaded.model)  # which may be one of the layers that were adapted
    layers = list(lora_layers(loaded.model))
    if layers:
        loaded.dropout = layers[0].dropout
    loaded.twins = find_twins(loaded.model)
    for wanted in method.also_train:
        known = {id(parameter) for parameter in loaded.whole.values()}
        found = _also_train(loaded.model, wanted)
        loaded.whole |= {name: parameter for name, parameter in found.items() if id(parameter) not in known}


def find_twins(model: Any) -> tuple[str, ...]:
    """Names of the embedding table's weight and of the head's, where they are one."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if table.weight is not getattr(head, "weight", None):
        return ()
    return tuple(f"{name}.weight" for name, module in model.named_modules() if module in (table, head))


def _also_train(model: Any, wanted: str) -> dict[str, nn.Parameter]:
    modules = {path: module for path, module in model.named_modules() if is_named(path, wanted)}
    if any(isinstance(module, LoraLinear) for module in modules.values()):
        raise UnsupportedError(
            f"method.also_train: `{wanted}` has an adapter already, and cannot be trained whole as well",
            hint="leave it out of method.targets, or out of method.also_train",
        )
    found = {
        f"{path}.{name}": parameter
        for path, module in modules.items()
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


def still_dropout(model: Any) -> None:
    """No randomness of the model's own: what an adapter's dropout does is all there is."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def _prepare_modules(loaded: Loaded, *, recompute: bool) -> None:
    """No randomness but ours, and recomputation where it was planned."""
    still_dropout(loaded.model)
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
    limit = find_rope_limit(loaded.model.config.get_text_config(), "dynamic")
    if limit is not None and batch.positions.max() >= limit:
        raise UnsupportedError(
            f"this model stretches its positions beyond {limit:,} tokens by the longest sequence it has seen so far",
            hint=f"set data.max_length = {limit}",
        )
    arguments: dict[str, Any] = {}
    if loaded.is_packed:  # else there is one segment, and its positions are those that a model assumes
        arguments[attention.LAYOUT] = attention.lay_out(batch, device)
        arguments["position_ids"] = torch.from_numpy(batch.positions).to(device)[None]
    return _run(loaded, torch.from_numpy(batch.tokens).to(device), arguments)


def run_lanes(loaded: Loaded, tokens: Tensor, positions: Tensor, lanes: attention.Lanes) -> Tensor:
    """Hidden states of tokens that follow what lanes hold, which hold them too from then on: (tokens, width)."""
    return _run(loaded, tokens, {attention.LAYOUT: lanes, "position_ids": positions[None]})


def _run(loaded: Loaded, tokens: Tensor, arguments: dict[str, Any]) -> Tensor:
    output = _find_decoder(loaded.model)(input_ids=tokens[None], use_cache=False, **arguments)
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def find_rope_limit(config: Any, kind: str) -> int | None:
    """Tokens beyond which a model stretches its positions, for a whole batch as its longest sequence asks."""
    table = getattr(config, "rope_parameters", None) or {}
    tables = [table, *(each for each in table.values() if isinstance(each, dict))]
    given = [each.get("original_max_position_embeddings") for each in tables if each.get("rope_type") == kind]
    return min((int(each or config.max_position_embeddings) for each in given), default=None)


def _find_decoder(model: Any) -> Any:
    """All of a model but its head; some models call something else so, or themselves."""
    decoder = model.get_decoder()
    return model.model if decoder is model or isinstance(decoder, nn.Linear) else decoder


@torch.no_grad()
def holds_when_packed(loaded: Loaded) -> bool:
    """Whether two short segments in one forward give what each gives alone; and our head gives the model's own logits.

    Some hybrid models carry state from one segment to the next without a word, and some older ones take no attention
    but their own, which they keep. The reference is the model's own forward with its own attention.
    """
    count = min(512, int(loaded.head.weight.shape[0]))
    tokens = (np.arange(22) * 37 + 11) % count
    batch, single = _probe_batch(tokens, [(0, 9), (9, 22)]), _probe_batch(tokens[:9], [(0, 9)])
    alone = [_own_logits(loaded, tokens[start:stop]) for start, stop in ((0, 9), (9, 22))]
    largest = max(float(logits.abs().max()) for logits in alone)
    allowed = _TOLERANCE[loaded.dtype] * max(largest, 1.0)
    loaded.is_packed = _takes_our_attention(loaded, single)
    if not loaded.is_packed:
        loaded.model.set_attn_implementation(name_own_attention(loaded.model))
    if not _differ(_our_logits(loaded, single), alone[0]) <= allowed:
        raise ModelError(
            "this model gives other logits through packed attention than through its own",
            hint='report its architecture, and use engine.kind = "trl" for it meanwhile',
        )
    return loaded.is_packed and _differ(_our_logits(loaded, batch), torch.cat(alone)) <= allowed


def _takes_our_attention(loaded: Loaded, batch: Batch) -> bool:
    calls = []

    def counted(*arguments: Any, **named: Any) -> tuple[Tensor, None]:
        calls.append(arguments[0])
        return attention.packed_attention(*arguments, **named)

    attention.register(counted)
    try:
        run_base(loaded, batch)
    except (TypeError, AttributeError):  # the layout, the positions or the mask that is not there, where not known
        return False
    finally:
        attention.register()
    return bool(calls)


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
        self._before = self._model.config._attn_implementation
        self._model.set_attn_implementation(name_own_attention(self._model))

    def __exit__(self, *_: object) -> None:
        self._model.set_attn_implementation(self._before)


def name_own_attention(model: Any) -> str:
    """The attention that transformers has for a model, where it is right for it."""
    # Some versions of transformers say that `sdpa` will do where it leaves soft-capping out.
    is_capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "sdpa" if getattr(model, "_supports_sdpa", False) and not is_capped else "eager"
