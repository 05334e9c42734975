"""Adapters for mlx_lm: its names and shapes, the same update by its own equation, and back without a change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson
import pytest
from safetensors.numpy import load_file, save_file

from luthier.errors import MissingPathError, ModelError, UnsupportedError
from luthier.weights.mlx import name_for_mlx, name_from_mlx, read_mlx_adapter, write_mlx_adapter
from luthier.weights.peft import AdapterConfig, read_adapter, write_adapter

CONFIG = AdapterConfig("org/base", rank=2, alpha=8.0, dropout=0.1, targets=("q_proj", "down_proj"))
SIZES = {"self_attn.q_proj": (8, 6), "self_attn.k_proj": (4, 6), "mlp.down_proj": (6, 10), "mlp.gate_proj": (10, 6)}
# Llama, Mistral, Qwen 2 and 3, and Gemma 2 name their layers alike; Gemma 3 with pictures nests them.
FAMILIES = {
    "llama, qwen, gemma": ("model.layers.{}.", "model.layers.{}."),
    "gemma 3 with pictures": ("model.language_model.layers.{}.", "language_model.model.layers.{}."),
}


def draw(prefix: str, layers: tuple[int, ...], modules: tuple[str, ...] = tuple(SIZES)) -> dict[str, np.ndarray]:
    source = np.random.default_rng(0)
    tensors = {}
    for layer in layers:
        for module in modules:
            out, into = SIZES[module]
            name = prefix.format(layer) + module
            tensors[f"{name}.lora_A"] = source.normal(size=(2, into)).astype(np.float32)
            tensors[f"{name}.lora_B"] = source.normal(size=(out, 2)).astype(np.float32)
    return tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_mlx_lm_s(tmp_path: Path, family: str) -> None:
    ours, theirs = FAMILIES[family]
    tensors = draw(ours, (0, 1))
    write_mlx_adapter(tmp_path, CONFIG, tensors, layers=2)
    found = load_file(tmp_path / "adapters.safetensors")
    assert len(found) == len(tensors) == 16
    for layer in (0, 1):
        for module, (out, into) in SIZES.items():
            name = theirs.format(layer) + module
            assert found[f"{name}.lora_a"].shape == (into, 2)
            assert found[f"{name}.lora_b"].shape == (2, out)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_update_is_the_same_by_mlx_lm_s_equation(tmp_path: Path, family: str) -> None:
    ours, theirs = FAMILIES[family]
    tensors = draw(ours, (3,))
    write_mlx_adapter(tmp_path, CONFIG, tensors, layers=4)
    found = load_file(tmp_path / "adapters.safetensors")
    scale = orjson.loads((tmp_path / "adapter_config.json").read_bytes())["lora_parameters"]["scale"]
    for module, (_, into) in SIZES.items():
        x = np.random.default_rng(1).normal(size=(3, into)).astype(np.float32)
        one, other = ours.format(3) + module, theirs.format(3) + module
        left = scale * ((x @ found[f"{other}.lora_a"]) @ found[f"{other}.lora_b"])
        right = x @ (CONFIG.scale * tensors[f"{one}.lora_B"] @ tensors[f"{one}.lora_A"]).T
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rslora", [False, True])
def test_there_and_back_nothing_changes(tmp_path: Path, family: str, rslora: bool) -> None:
    tensors = draw(FAMILIES[family][0], (0, 2))
    given = AdapterConfig("org/base", rank=2, alpha=8.0, rslora=rslora)
    write_mlx_adapter(tmp_path, given, tensors, layers=3)
    config, back = read_mlx_adapter(tmp_path)
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], values) for name, values in tensors.items())
    assert config.scale == pytest.approx(given.scale)
    assert (config.base, config.rank, len(config.targets)) == ("org/base", 2, 8)
    write_adapter(tmp_path / "peft", config, back)
    assert read_adapter(tmp_path / "peft")[1].keys() == tensors.keys()


@pytest.mark.parametrize(
    ("layers", "adapted", "counted"), [(4, (0, 1, 2, 3), 4), (4, (2, 3), 2), (4, (1,), 3), (28, (27,), 1)]
)
def test_layers_are_counted_from_the_last(tmp_path: Path, layers: int, adapted: tuple[int, ...], counted: int) -> None:
    write_mlx_adapter(tmp_path, CONFIG, draw("model.layers.{}.", adapted, ("mlp.down_proj",)), layers=layers)
    shown = orjson.loads((tmp_path / "adapter_config.json").read_bytes())
    assert shown["num_layers"] == counted
    assert shown["fine_tune_type"] == "lora"
    assert shown["lora_parameters"] == {"rank": 2, "scale": 4.0, "dropout": 0.1, "keys": ["mlp.down_proj"]}


def test_modules_trained_whole_keep_their_shape_and_the_head_its_name(tmp_path: Path) -> None:
    tensors = draw("model.layers.{}.", (0,)) | {"model.embed_tokens.weight": np.ones((9, 6), np.float32)}
    tensors |= {"lm_head.lora_A": np.ones((2, 6), np.float32), "lm_head.lora_B": np.ones((9, 2), np.float32)}
    write_mlx_adapter(tmp_path, CONFIG, tensors, layers=1)
    found = load_file(tmp_path / "adapters.safetensors")
    assert found["model.embed_tokens.weight"].shape == (9, 6)
    assert found["lm_head.lora_a"].shape == (6, 2)
    keys = orjson.loads((tmp_path / "adapter_config.json").read_bytes())["lora_parameters"]["keys"]
    assert "lm_head" in keys
    config, back = read_mlx_adapter(tmp_path)
    assert config.modules_to_save == ("model.embed_tokens",)
    assert back["model.embed_tokens.weight"].shape == (9, 6)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.lora_A", "model.norm.weight", "lm_head.lora_B"])
def test_names_come_back(name: str) -> None:
    assert name_from_mlx(name_for_mlx(name, nested=False)) == name
    assert name_from_mlx(name_for_mlx(name, nested=True)) == name


def test_a_layer_that_the_base_lacks_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="layer 4, and the base has 4"):
        write_mlx_adapter(tmp_path, CONFIG, draw("model.layers.{}.", (4,)), layers=4)
    with pytest.raises(ModelError, match="no low-rank updates"):
        write_mlx_adapter(tmp_path, CONFIG, {"model.norm.weight": np.ones(6, np.float32)}, layers=4)


def test_what_is_no_adapter_of_mlx_lm_s_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match="it needs adapter_config"):
        read_mlx_adapter(tmp_path)
    write_mlx_adapter(tmp_path, CONFIG, draw("model.layers.{}.", (0,)), layers=1)
    path = tmp_path / "adapter_config.json"
    good = orjson.loads(path.read_bytes())
    path.write_bytes(orjson.dumps({**good, "fine_tune_type": "dora"}))
    with pytest.raises(UnsupportedError, match="dora"):
        read_mlx_adapter(tmp_path)
    path.write_bytes(orjson.dumps({**good, "lora_parameters": {"rank": 3, "scale": 1.0}}))
    with pytest.raises(ModelError, match="do not fit rank 3"):
        read_mlx_adapter(tmp_path)
    path.write_bytes(orjson.dumps({"lora_parameters": {"rank": "2"}}))
    with pytest.raises(ModelError, match="must be numbers"):
        read_mlx_adapter(tmp_path)
    path.write_bytes(orjson.dumps(good))
    save_file({"model.layers.0.mlp.up_proj.lora_a": np.ones((6, 2), np.float32)}, tmp_path / "adapters.safetensors")
    with pytest.raises(ModelError, match="only one of"):
        read_mlx_adapter(tmp_path)
