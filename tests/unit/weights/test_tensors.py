"""Shapes come from headers alone; what is broken, pickled or quantised is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
from safetensors.numpy import save_file

from luthier.errors import ModelError, UnsupportedError
from luthier.runs.resolve import practice_folder
from luthier.weights.tensors import (
    TensorInfo,
    build_model_shape,
    fetch_shapes,
    has_weights,
    is_named,
    layer_number,
    match_modules,
    read_model_shape,
    read_shapes,
)

CONFIG = {"model_type": "tiny", "hidden_size": 4, "num_attention_heads": 2, "vocab_size": 10, "intermediate_size": 8}
Shapes = dict[str, tuple[int, ...]]


def dense(layers: int = 2) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (10, 4), "model.norm.weight": (4,)}
    for number in range(layers):
        shapes |= {
            f"model.layers.{number}.self_attn.q_proj.weight": (4, 4),
            f"model.layers.{number}.self_attn.q_proj.bias": (4,),
            f"model.layers.{number}.mlp.up_proj.weight": (8, 4),
            f"model.layers.{number}.input_layernorm.weight": (4,),
        }
    return shapes


def build(shapes: Shapes, dtype: str = "BF16", **config: Any) -> Any:
    infos = {name: TensorInfo(dtype, shape) for name, shape in shapes.items()}
    return build_model_shape(infos, {**CONFIG, **config}, name="tiny")


def test_the_practice_model() -> None:
    shape = read_model_shape(practice_folder())
    assert (shape.layers, shape.hidden_size, shape.vocab_size, shape.heads, shape.head_dim) == (4, 192, 2048, 4, 64)
    assert shape.targets == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert len(shape.linears) == 28
    assert shape.linears["model.layers.0.self_attn.q_proj"] == (256, 192)
    assert shape.is_tied
    assert shape.total_parameters == 2_164_928
    assert shape.embedding_parameters == 2048 * 192
    assert shape.modules["lm_head"] == 2048 * 192
    assert shape.key == "qwen3-4x192"


def test_an_index_names_the_files(tmp_path: Path) -> None:
    save_file({"a.weight": np.zeros((2, 3), np.float32)}, tmp_path / "one.safetensors")
    save_file({"b.weight": np.zeros(5, np.float16)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_bytes(orjson.dumps(index))
    assert has_weights(tmp_path)
    assert read_shapes(tmp_path) == {"a.weight": TensorInfo("F32", (2, 3)), "b.weight": TensorInfo("F16", (5,))}
    (tmp_path / "two.safetensors").unlink()
    assert not has_weights(tmp_path)
    with pytest.raises(ModelError, match=r"names two.safetensors, which is not there \(1 of 2 missing\)"):
        read_shapes(tmp_path)


@pytest.mark.parametrize(
    "index", [b"{", b"[]", b'{"weight_map": 3}', b'{"weight_map": {"a": "../../x.safetensors"}}', b'{"a": {}}']
)
def test_an_index_that_is_none_is_refused(index: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(ModelError, match="index"):
        read_shapes(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_unopened(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"never read")
    with pytest.raises(ModelError, match=f"pickled \\({name}\\)"):
        read_shapes(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    assert not has_weights(tmp_path)
    with pytest.raises(ModelError, match="no weights"):
        read_shapes(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 20, 150, -1])
def test_a_file_cut_short_is_refused(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": np.zeros((20, 30), np.float32)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        read_shapes(tmp_path)


@pytest.mark.parametrize("header", [b"[]", b"{]", b'{"a": 3}', b'{"a": {"dtype": "F32", "shape": [1]}}'])
def test_a_header_that_makes_no_sense_is_refused(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelError, match="header"):
        read_shapes(tmp_path)


def test_linear_layers_are_those_of_the_decoder() -> None:
    shape = build({**dense(), "lm_head.weight": (10, 4)}, tie_word_embeddings=False)
    assert shape.targets == ["q_proj", "up_proj"]
    assert not shape.is_tied
    assert shape.total_parameters == 40 + 4 + 2 * (16 + 4 + 32 + 4) + 40
    assert shape.computed_parameters == 2 * (16 + 32) + 40


def test_a_tied_head_counts_once_though_it_lies_in_the_file() -> None:
    with_head = build({**dense(), "lm_head.weight": (10, 4)}, tie_word_embeddings=True)
    assert with_head.total_parameters == build(dense()).total_parameters
    assert with_head.is_tied


def test_experts_are_no_targets() -> None:
    moe = {
        "model.layers.0.mlp.experts.gate_up_proj": (4, 4, 16),
        "model.layers.1.mlp.experts.0.up_proj.weight": (8, 4),
        "model.layers.0.mlp.gate.weight": (4, 4),
        "model.layers.0.mlp.shared_expert.up_proj.weight": (8, 4),
    }
    shape = build({**dense(), **moe}, num_experts=4, num_experts_per_tok=1)
    assert shape.targets == ["q_proj", "up_proj"]
    assert "model.layers.0.mlp.shared_expert.up_proj" in shape.linears
    assert shape.expert_parameters == 4 * 4 * 16 + 32
    assert len(shape.expert_names) == 2
    assert shape.computed_parameters == 2 * (16 + 32) + 32 + 40 + shape.expert_parameters // 4


def test_other_towers_and_whole_numbers_are_left_out() -> None:
    tower = {"vision_tower.layers.0.fc1.weight": (99, 99), "model.visual.blocks.0.qkv.weight": (99, 99)}
    plain = build(dense())
    assert build({**dense(), **tower}).linears == plain.linears
    infos = {name: TensorInfo("F32", each) for name, each in dense().items()}
    counted = build_model_shape({**infos, "model.layers.0.bias": TensorInfo("I64", (9, 9))}, CONFIG, name="tiny")
    assert counted.total_parameters == plain.total_parameters


def test_a_text_config_within_the_config_is_the_one() -> None:
    assert build(dense(), text_config={**CONFIG, "num_attention_heads": 1, "model_type": "inner"}).key == "inner-2x4"


@pytest.mark.parametrize(
    ("config", "dtype"), [({"quantization_config": {"bits": 4}}, "BF16"), ({}, "U8"), ({}, "F8_E4M3")]
)
def test_quantised_weights_are_refused(config: Mapping[str, Any], dtype: str) -> None:
    with pytest.raises(UnsupportedError, match="quantised already"):
        build(dense(), dtype, **config)


def test_a_model_without_decoder_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="no decoder layers"):
        build({"encoder.layer.0.dense.weight": (4, 4)})


def test_names_of_modules() -> None:
    assert layer_number("model.layers.12.mlp.up_proj") == 12
    assert layer_number("transformer.h.3") == 3
    assert layer_number("lm_head") is None
    assert is_named("model.layers.0.mlp.up_proj", "up_proj")
    assert not is_named("model.layers.0.mlp.gate_up_proj", "up_proj")
    assert match_modules(["a.b", "c.b", "d"], ["b", "x"]) == {"b": ["a.b", "c.b"], "x": []}


def test_shapes_of_the_hub_without_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def metadata(name: str, *, revision: str | None) -> Any:
        asked.append((name, revision))
        tensors = {"a.weight": SimpleNamespace(dtype="BF16", shape=[2, 3])}
        return SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})

    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", metadata)
    assert fetch_shapes("org/name", "abc") == {"a.weight": TensorInfo("BF16", (2, 3))}
    assert asked == [("org/name", "abc")]


def test_a_hub_that_does_not_answer_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *, revision: str | None) -> Any:
        raise OSError("no network\nmore")

    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", refuse)
    with pytest.raises(ModelError, match=r"org/name: .*: no network$"):
        fetch_shapes("org/name", None)
