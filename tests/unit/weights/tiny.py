"""Tiny models of several architectures, and adapters for them, that the tests of weights share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from luthier.weights.peft import AdapterConfig

VOCAB = 48
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA: dict[str, Any] = {"head_dim": 8, "query_pre_attn_scalar": 8}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
}
TARGETS = ("q_proj", "v_proj", "down_proj")


def targets_of(kind: str) -> tuple[str, ...]:
    """Linear layers of the architecture under their own names."""
    return ("qkv_proj", "gate_up_proj") if kind == "phi3" else TARGETS


def build_model(kind: str, *, seed: int = 0, **settings: Any) -> Any:
    """A model with random weights that are large enough to matter."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **SIZES, **KINDS[kind], initializer_range=0.2, **settings)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def save_base(folder: Path, kind: str = "llama", *, dtype: str = "float32", **settings: Any) -> Path:
    """A model folder; `shard` limits the size of its files."""
    import torch

    shard = settings.pop("shard", "1GB")
    model = build_model(kind, **settings).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def load(folder: Path) -> Any:
    """The model of a folder, in the type that its files have."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager").eval()


def logits(model: Any) -> np.ndarray:
    """What a model says to one row of every token."""
    import torch

    with torch.no_grad():
        return model(torch.arange(VOCAB)[None]).logits[0].float().numpy()


def assert_close(found: np.ndarray, expected: np.ndarray, share: float = 5e-5) -> None:
    """Equal but for the order of fp32 additions."""
    assert np.abs(found - expected).max() <= share * np.abs(expected).max()


def draw_adapter(model: Any, config: AdapterConfig, *, seed: int = 1) -> dict[str, np.ndarray]:
    """Random low-rank updates for the linear layers that the config names."""
    draw = np.random.default_rng(seed)
    tensors = {}
    for name, module in model.named_modules():
        layer = name.split(".")[2] if name.count(".") > 2 else "-1"
        if name.endswith(config.targets) and (config.layers is None or int(layer) in config.layers):
            out, into = module.weight.shape
            tensors[f"{name}.lora_A"] = draw.normal(size=(config.rank, into)).astype(np.float32)
            tensors[f"{name}.lora_B"] = draw.normal(scale=0.1, size=(out, config.rank)).astype(np.float32)
    return tensors


def apply_by_hand(model: Any, config: AdapterConfig, tensors: dict[str, np.ndarray]) -> Any:
    """The same model with W + scale * B @ A in its layers and the whole tensors in their place."""
    import torch

    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for name, values in tensors.items():
        module, _, side = name.rpartition(".")
        if side == "lora_A":
            update = config.scale * (tensors[f"{module}.lora_B"] @ values)
            weights[f"{module}.weight"] += torch.from_numpy(np.float32(update))
        elif side != "lora_B":
            weights[name] = torch.from_numpy(values)
    model.load_state_dict(weights)
    return model
