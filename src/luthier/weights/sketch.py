"""How large a model is by its config alone, for a base whose weights lie elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.weights.tensors import (
    ModelShape,
    TensorInfo,
    build_model_shape,
    has_weights,
    read_config,
    read_model_shape,
)

_NUMBERS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def read_or_sketch(folder: Path, name: str) -> ModelShape:
    """The shape of a model by its weights where they are here, else by its config as far as that tells."""
    if has_weights(folder):
        return read_model_shape(folder)
    config = read_config(folder) if (folder / "config.json").is_file() else {}
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    if all(isinstance(text.get(key), int) for key in _NUMBERS) and not _has_experts(text):
        return build_model_shape(_draw(text), config, name=name)
    return _unknown(str(text.get("model_type") or "unknown"), text)


def _has_experts(text: Mapping[str, Any]) -> bool:
    return any(text.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))


def _draw(text: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """The tensors of a decoder as most models have it: four layers of attention and three of the feed-forward part."""
    hidden, wide, layers, heads, vocabulary = (int(text[key]) for key in _NUMBERS)
    width = int(text.get("head_dim") or hidden // heads)
    shared = int(text.get("num_key_value_heads") or heads)
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    if text.get("tie_word_embeddings") is False:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    for number in range(layers):
        of_layer = {
            "self_attn.q_proj": (heads * width, hidden),
            "self_attn.k_proj": (shared * width, hidden),
            "self_attn.v_proj": (shared * width, hidden),
            "self_attn.o_proj": (hidden, heads * width),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in of_layer.items()}
    return {name: TensorInfo("BF16", shape) for name, shape in shapes.items()}


def _unknown(kind: str, text: Mapping[str, Any]) -> ModelShape:
    vocabulary = text.get("vocab_size")
    return ModelShape(
        architecture=kind,
        hidden_size=0,
        layers=0,
        vocab_size=vocabulary if isinstance(vocabulary, int) else 0,
        heads=0,
        head_dim=0,
        intermediate_size=0,
        is_tied=False,
        total_parameters=0,
        embedding_parameters=0,
        linears={},
    )
