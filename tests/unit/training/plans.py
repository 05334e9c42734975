"""Models, machines and prepared data by their numbers alone, for tests of plans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from luthier.data.cache import write_array
from luthier.data.prepared import Prepared
from luthier.machine import Machine
from luthier.spec.run import RunSpec
from luthier.weights.tensors import ModelShape, TensorInfo, build_model_shape

GIB = 1 << 30
CPU = Machine(
    cores=2,
    memory_bytes=24 * GIB,
    available_bytes=22 * GIB,
    device="cpu",
    device_name="Quick 9000",
    device_memory_bytes=24 * GIB,
    device_free_bytes=22 * GIB,
    has_bf16=True,
    key="cpu-quick",
)
GPU = replace(
    CPU,
    device="cuda",
    device_name="NVIDIA H200",
    device_memory_bytes=140 * GIB,
    device_free_bytes=138 * GIB,
    key="cuda-h200",
    device_count=1,
)

METAL = replace(CPU, device="metal", device_name="Apple M4", device_free_bytes=16 * GIB, key="metal-apple-m4")


def with_free(machine: Machine, gib: float) -> Machine:
    """The machine with so much of its device free."""
    return replace(machine, device_free_bytes=round(gib * GIB))


def llama(layers: int = 28, hidden: int = 1024, wide: int = 3072, vocab: int = 151_936) -> ModelShape:
    """A dense model; the sizes of Qwen3-0.6B unless told."""
    shapes = {"model.embed_tokens.weight": TensorInfo("BF16", (vocab, hidden))}
    for number in range(layers):
        at = f"model.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{at}.self_attn.{name}.weight"] = TensorInfo("BF16", (hidden, hidden))
        for name in ("gate_proj", "up_proj"):
            shapes[f"{at}.mlp.{name}.weight"] = TensorInfo("BF16", (wide, hidden))
        shapes[f"{at}.mlp.down_proj.weight"] = TensorInfo("BF16", (hidden, wide))
        shapes[f"{at}.mlp.input_layernorm.weight"] = TensorInfo("BF16", (hidden,))
    config = {"model_type": "llama", "hidden_size": hidden, "num_attention_heads": hidden // 64, "vocab_size": vocab}
    return build_model_shape(shapes, {**config, "intermediate_size": wide}, name="llama")


def write_prepared(folder: Path, train: list[int], valid: list[int] | None = None, *, pairs: bool = False) -> Prepared:
    """Prepared data of examples of so many tokens; each is two sequences where they are `pairs`."""
    folder.mkdir(parents=True, exist_ok=True)
    lengths, each = [*train, *(valid or [])], 2 if pairs else 1
    parts = [part for length in lengths for part in ([length // 2, length - length // 2] if pairs else [length])]
    arrays = {
        "train.u64": np.arange(len(train)),
        "valid.u64": np.arange(len(train), len(lengths)),
        "offsets.u64": np.cumsum([0, *parts]),
        "first_sequences.u64": np.arange(len(lengths) + 1) * each,
    }
    for name, values in arrays.items():
        write_array(folder, name, values)
    (folder / "summary.json").write_bytes(orjson.dumps({"trained_tokens": {"train": sum(train) // 2}}))
    return Prepared(folder)


def make_spec(method: dict[str, Any] | None = None, **tables: Any) -> RunSpec:
    """A spec of a model that is not looked at."""
    tables = {"model": {"base": "org/name"}, "data": {"train": "hf:org/rows:train"}, **tables}
    return RunSpec.model_validate({**tables, "method": method} if method else tables)
