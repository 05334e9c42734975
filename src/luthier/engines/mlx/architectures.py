"""What mlx_lm must be told of a model's configuration, and where its models compute otherwise than transformers' do.

mlx_lm skips settings that it does not know without a word: positions nested as transformers 5 writes them, windows of
attention, activations. Each would train another model than the one that is served, so it is passed on or refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from luthier.errors import UnsupportedError

# Architectures whose logits our tests hold against transformers.
HELD = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gemma3", "phi3", "mixtral", "mamba")
_ROPE = "rope_parameters"
_PLAIN_ROPES = ("default", "linear", "llama3", "yarn")
_SILU = ("silu", "swish")
_TANH_GELU = "gelu_pytorch_tanh"
_ACTIVATIONS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral"), _SILU),
    **dict.fromkeys(("gemma2", "gemma3_text"), (_TANH_GELU,)),
    "gemma": (_TANH_GELU, "gelu"),
}


def text_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the part of a model that reads text."""
    inner = config.get("text_config")
    return dict(inner if isinstance(inner, dict) else config)


def translate_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration mlx_lm must be given besides; UnsupportedError for what it would compute otherwise."""
    text = text_settings(config)
    _refuse_other_activations(text)
    found = _positions(text)
    if "num_local_experts" in text:
        found["num_experts"] = text["num_local_experts"]
    if str(text.get("model_type")) == "gemma3_text" and text.get("layer_types"):
        found["sliding_window_pattern"] = _pattern(text["layer_types"])
    missing = {key: value for key, value in found.items() if text.get(key) is None}
    if isinstance(config.get("text_config"), dict):
        outer = {key: text[key] for key in ("vocab_size",) if key in text and key not in config}
        return {**outer, "text_config": {**text, **missing}}
    return missing


def _positions(text: Mapping[str, Any]) -> dict[str, Any]:
    """Positions as mlx_lm reads them, beside each other; transformers 5 nests them, sometimes by kind of layer."""
    table = text.get(_ROPE) or {}
    local = table.get("sliding_attention")
    whole = table.get("full_attention", table) if isinstance(table, dict) else {}
    for each in (whole, local or {}, text.get("rope_scaling") or {}):
        kind = each.get("rope_type") or each.get("type") or "default"
        if kind not in _PLAIN_ROPES:
            raise UnsupportedError(
                f"positions of the kind {kind!r}: mlx_lm stretches them otherwise than transformers does",
                hint='engine.kind = "torch" trains this model',
            )
    found = {"rope_theta": whole.get("rope_theta"), "partial_rotary_factor": whole.get("partial_rotary_factor")}
    if whole.get("rope_type", "default") != "default":
        found["rope_scaling"] = dict(whole)
    if isinstance(local, dict):
        found["rope_local_base_freq"] = local.get("rope_theta")
    return {key: value for key, value in found.items() if value is not None}


def _pattern(kinds: list[str]) -> int:
    """Every how many layers attend to everything, which is how mlx_lm says it."""
    every = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    told = ["full_attention" if (number + 1) % every == 0 else "sliding_attention" for number in range(len(kinds))]
    if told != kinds:
        raise UnsupportedError(
            "this model mixes windows of attention in an order that mlx_lm cannot be told",
            hint='engine.kind = "torch" trains it',
        )
    return every


def _refuse_other_activations(text: Mapping[str, Any]) -> None:
    known = _ACTIVATIONS.get(str(text.get("model_type")))
    asked = text.get("hidden_activation") or text.get("hidden_act")
    if known and asked is not None and asked not in known:
        raise UnsupportedError(
            f"this model's activation is {asked!r}, and mlx_lm computes it with {known[0]!r}",
            hint='engine.kind = "torch" trains it',
        )


def correct(model: Any, config: Mapping[str, Any], precision: str) -> None:
    """Make the model compute what its configuration says where mlx_lm's code does something else.

    mlx_lm's Gemma 1 takes the exact GELU; the configuration asks for the approximation by tanh, as Google trained it.
    Its Gemma 3 rounds the factor of the embeddings to bf16 in every precision, transformers only in bf16.
    """
    text = text_settings(config)
    if text.get("model_type") == "gemma" and text.get("hidden_act", _TANH_GELU) == _TANH_GELU:
        for layer in model.layers:
            layer.mlp.__class__ = _tanh_gelu(type(layer.mlp))
    if text.get("model_type") == "gemma3_text" and precision == "fp32":
        exact = float(text["hidden_size"]) ** 0.5
        ratio = exact / mx.array(exact, mx.bfloat16).astype(mx.float32).item()
        for path, module in model.named_modules():
            if path.endswith("embed_tokens"):
                module.__class__ = _times(type(module), ratio)


def _tanh_gelu(kind: type) -> type:
    def call(self: Any, x: Any) -> Any:
        return self.down_proj(nn.gelu_approx(self.gate_proj(x)) * self.up_proj(x))

    return type(f"Tanh{kind.__name__}", (kind,), {"__call__": call})


def _times(kind: Any, ratio: float) -> type:
    def call(self: Any, x: Any) -> Any:
        return kind.__call__(self, x) * ratio

    return type(f"Exact{kind.__name__}", (kind,), {"__call__": call})


def find_window(model: Any, config: Mapping[str, Any]) -> int | None:
    """Tokens beyond which a window of attention would count that mlx_lm's model does not have; None where none is lost.

    Up to that length the window sees everything, and both compute the same.
    """
    text = text_settings(config)
    window = text.get("sliding_window")
    if not isinstance(window, int) or text.get("use_sliding_window") is False:
        return None
    layers = model.layers
    kinds = text.get("layer_types") or _usual_kinds(text, len(layers))
    wanted = [kind == "sliding_attention" for kind in kinds]
    return window if wanted != [_is_sliding(layer) for layer in layers] else None


def _usual_kinds(text: Mapping[str, Any], layers: int) -> list[str]:
    """The kinds of layers of configurations that do not list them."""
    kind, pattern = text.get("model_type"), text.get("sliding_window_pattern")
    if kind == "gemma2":
        return ["full_attention" if number % 2 else "sliding_attention" for number in range(layers)]
    if isinstance(pattern, int):
        return ["sliding_attention" if (number + 1) % pattern else "full_attention" for number in range(layers)]
    if kind in ("qwen2", "qwen3"):
        first = text.get("max_window_layers", layers)
        return ["sliding_attention" if number >= first else "full_attention" for number in range(layers)]
    return ["sliding_attention"] * layers


def _is_sliding(layer: Any) -> bool:
    places = (layer, getattr(layer, "self_attn", layer))
    return any(bool(getattr(place, name, False)) for place in places for name in ("use_sliding", "is_sliding"))
