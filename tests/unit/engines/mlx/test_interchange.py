"""Adapters there and back: mlx_lm puts ours in place and computes the same, and what it trained is one of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from luthier.engines.mlx import loading
from luthier.runs.resolve import AdapterRef, ResolvedModel, find_resolved
from luthier.weights.mlx import write_mlx_adapter
from luthier.weights.peft import read_adapter, write_adapter
from tests.unit.engines.conftest import Shaped
from tests.unit.engines.mlx.beside import begin, build
from tests.unit.engines.mlx.test_beside_torch import widened
from tests.unit.engines.tiny import VOCAB, logprobs_of

mx = pytest.importorskip("mlx.core")
pytest.importorskip("torch")
pytest.importorskip("mlx_lm")
pytestmark = pytest.mark.torch
TOKENS = np.random.default_rng(3).integers(3, VOCAB, 15)
KINDS = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gemma3")


def trained(base: Path, home: Path, folder: Path, **keys: Any) -> Any:
    """An engine with an update that is not zero, and its adapter as published."""
    engine = build("mlx", base, home, keys=keys)
    begin(engine)
    folder.mkdir()
    engine.save("weights").write(folder)
    return engine


def own_logprobs(model: Any) -> np.ndarray:
    logits = model(mx.array(TOKENS)[None])[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


@pytest.mark.parametrize("kind", KINDS)
def test_mlx_lm_puts_our_adapter_in_and_computes_the_same(
    kind: str, shaped: Shaped, own_home: Path, tmp_path: Path
) -> None:
    from mlx_lm.tuner.utils import load_adapters

    base = shaped(kind, **widened(kind))
    engine = trained(base, own_home, tmp_path / "peft", last_layers=2)
    config, tensors = read_adapter(tmp_path / "peft")
    write_mlx_adapter(tmp_path / "mlx", config, tensors, layers=3)
    model = load_adapters(loading.read_model(base, "fp32")[0], str(tmp_path / "mlx"))
    found, expected = own_logprobs(model.eval() or model), logprobs_of(engine, TOKENS)
    assert np.abs(found - expected).max() < 1e-4
    assert np.abs(found - own_logprobs(loading.read_model(base, "fp32")[0])).max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_what_mlx_lm_trained_is_an_adapter_of_ours(kind: str, shaped: Shaped, own_home: Path, tmp_path: Path) -> None:
    """As `mlx_lm.lora` makes and saves it: its own layers, its own defaults, every linear layer."""
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    base = shaped(kind, **widened(kind))
    parameters = {"rank": 4, "dropout": 0.0, "scale": 20.0}
    model = loading.read_model(base, "fp32")[0]
    model.freeze()
    linear_to_lora_layers(model, 2, parameters)
    weights = dict(tree_flatten(model.trainable_parameters()))
    drawn = np.random.default_rng(0)
    weights |= {n: mx.array(drawn.normal(size=v.shape) * 0.01, mx.float32) for n, v in weights.items() if "lora_b" in n}
    model.load_weights(list(weights.items()), strict=False)
    folder = tmp_path / "adapters"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    told = {"fine_tune_type": "lora", "model": str(base), "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_bytes(orjson.dumps(told))
    expected = own_logprobs(model.eval() or model)
    resolved = find_resolved(str(folder), with_weights=True)
    assert (resolved.folder, resolved.adapters[0].engine) == (base, "mlx")
    config, tensors = read_adapter(folder)
    write_adapter(tmp_path / "peft", config, tensors)
    for adapter in (folder, tmp_path / "peft"):
        below = ResolvedModel(base, (AdapterRef(adapter),))
        found = own_logprobs(loading.load_for_sampling(below, own_home, precision="fp32").model)
        assert np.abs(found - expected).max() < 2e-4
    assert np.abs(expected - own_logprobs(loading.read_model(base, "fp32")[0])).max() > 1e-2
