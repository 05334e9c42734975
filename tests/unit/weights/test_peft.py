"""Adapters of ours load in PEFT and compute what they should; PEFT's load here; what is broken is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from safetensors.numpy import load_file, save_file

from luthier.errors import LuthierError, MissingPathError, ModelError, UnsupportedError
from luthier.weights.peft import CONFIG, WEIGHTS, AdapterConfig, read_adapter, write_adapter
from tests.unit.weights.tiny import (
    KINDS,
    TARGETS,
    VOCAB,
    apply_by_hand,
    assert_close,
    build_model,
    draw_adapter,
    logits,
    save_base,
    targets_of,
)

BASE = AdapterConfig("org/base", rank=2, alpha=8.0, dropout=0.1, targets=("q_proj",))
Q0, Q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
quiet = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def tensors_for(*modules: str, rank: int = 2) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    sides = {}
    for module in modules:
        sides[f"{module}.lora_A"] = draw.normal(size=(rank, 4)).astype(np.float32)
        sides[f"{module}.lora_B"] = draw.normal(size=(6, rank)).astype(np.float32)
    return sides


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_bytes(orjson.dumps({**orjson.loads(path.read_bytes()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def load_with_peft(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize("scale", [8.0, 2.5])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_written_is_read(tmp_path: Path, scale: float, rslora: bool) -> None:
    config = replace(BASE, alpha=scale, rslora=rslora, layers=(0, 1), revision="abc", modules_to_save=("lm_head",))
    tensors = tensors_for(Q0, Q1) | {"lm_head.weight": np.ones((3, 4), np.float32)}
    write_adapter(tmp_path / "a", config, tensors)
    found, read = read_adapter(tmp_path / "a")
    assert found == config
    assert found.scale == scale / (2**0.5 if rslora else 2)
    assert read.keys() == tensors.keys()
    assert all(np.array_equal(read[name], tensors[name]) for name in tensors)


def test_the_file_is_what_safetensors_itself_would_write(tmp_path: Path) -> None:
    write_adapter(tmp_path, BASE, tensors_for(Q0, Q1))
    ours = (tmp_path / WEIGHTS).read_bytes()
    save_file(dict(reversed(load_file(tmp_path / WEIGHTS).items())), tmp_path / "theirs", {"format": "pt"})
    assert ours == (tmp_path / "theirs").read_bytes()


@quiet
@pytest.mark.torch
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_computes_w_plus_scaled_b_a(tmp_path: Path, kind: str, rslora: bool) -> None:
    config = replace(BASE, targets=targets_of(kind), rslora=rslora)
    tensors = draw_adapter(build_model(kind), config)
    write_adapter(tmp_path, config, tensors)
    theirs = logits(load_with_peft(build_model(kind), tmp_path))
    ours = logits(apply_by_hand(build_model(kind), config, tensors))
    assert np.abs(ours - logits(build_model(kind))).max() > 0.05
    assert_close(theirs, ours)


@quiet
@pytest.mark.torch
@pytest.mark.parametrize("targets", [("q_proj",), (Q1,)], ids=["by layer", "by whole name"])
def test_peft_adapts_only_the_chosen_layers(tmp_path: Path, targets: tuple[str, ...]) -> None:
    config = replace(BASE, targets=targets, layers=(1,) if targets == ("q_proj",) else None)
    tensors = draw_adapter(build_model("llama"), config)
    assert list(tensors) == [f"{Q1}.lora_A", f"{Q1}.lora_B"]
    write_adapter(tmp_path, config, tensors)
    model = load_with_peft(build_model("llama"), tmp_path)
    assert {name.partition(".lora_A")[0] for name, _ in model.named_modules() if "lora_A.default" in name} == {
        f"base_model.model.{Q1}"
    }
    assert_close(logits(model), logits(apply_by_hand(build_model("llama"), config, tensors)))


@quiet
@pytest.mark.torch
@pytest.mark.parametrize("modules", [("lm_head",), ("lm_head", "embed_tokens", "norm")])
def test_peft_takes_the_modules_trained_whole(tmp_path: Path, modules: tuple[str, ...]) -> None:
    config = replace(BASE, targets=TARGETS, modules_to_save=modules)
    tensors = draw_adapter(build_model("llama"), config)
    draw = np.random.default_rng(3)
    paths = {"lm_head": (VOCAB, 16), "model.embed_tokens": (VOCAB, 16), "model.norm": (16,)}
    tensors |= {
        f"{path}.weight": draw.normal(size=shape).astype(np.float32)
        for path, shape in paths.items()
        if path.rpartition(".")[2] in modules
    }
    write_adapter(tmp_path, config, tensors)
    theirs = logits(load_with_peft(build_model("llama"), tmp_path))
    assert_close(theirs, logits(apply_by_hand(build_model("llama"), config, tensors)))


@quiet
@pytest.mark.torch
def test_peft_keeps_embeddings_and_head_one_matrix(tmp_path: Path) -> None:
    config = replace(BASE, modules_to_save=("embed_tokens", "lm_head"), tied=True)
    model = build_model("llama", tie_word_embeddings=True)
    matrix = np.random.default_rng(3).normal(size=(VOCAB, 16)).astype(np.float32)
    tensors = draw_adapter(model, config) | {"model.embed_tokens.weight": matrix, "lm_head.weight": matrix}
    write_adapter(tmp_path, config, tensors)
    theirs = load_with_peft(build_model("llama", tie_word_embeddings=True), tmp_path)
    assert_close(logits(theirs), logits(apply_by_hand(model, config, tensors)))
    assert read_adapter(tmp_path)[0].tied


@quiet
@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        {"target_modules": r".*\.1\..*(q|v)_proj", "modules_to_save": ["lm_head"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": 0},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"], "rank_pattern": {"q_proj": 3}},
    ],
    ids=["rslora", "pattern", "all linear", "one layer", "norms"],
)
def test_adapters_of_pefts_own_are_read(tmp_path: Path, settings: dict[str, Any], dtype: str) -> None:
    import peft
    import torch

    config = peft.LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    base = build_model("llama").to(getattr(torch, dtype))
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    model.save_pretrained(tmp_path / "a")
    found, tensors = read_adapter(tmp_path / "a")
    assert {values.dtype for values in tensors.values()} == {np.dtype(np.float32)}
    theirs = logits(model.float())
    plain = build_model("llama").to(getattr(torch, dtype)).float()
    assert_close(logits(apply_by_hand(plain, found, tensors)), theirs)
    write_adapter(tmp_path / "b", found, tensors)
    again = load_with_peft(build_model("llama").to(getattr(torch, dtype)).float(), tmp_path / "b")
    assert_close(logits(again), theirs)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 1}}, "alpha_pattern"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_parameters": ["experts.down"]}, "target_parameters"),
        ({"something_new": {"on": True}}, "something_new"),
        ({"peft_type": "IA3"}, "peft_type"),
    ],
)
def test_settings_that_cannot_be_honoured_are_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    write_adapter(tmp_path, BASE, tensors_for(Q0))
    edit_config(tmp_path, **changes)
    with pytest.raises(UnsupportedError, match=named):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {}},
        {"init_lora_weights": "gaussian"},
        {"auto_mapping": {"parent": "x"}, "peft_version": "0.1", "exclude_modules": ["lm_head"], "lora_bias": False},
    ],
)
def test_settings_that_change_nothing_are_let_through(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_adapter(tmp_path, BASE, tensors_for(Q0))
    edit_config(tmp_path, **changes)
    assert read_adapter(tmp_path)[0] == BASE


@pytest.mark.parametrize("changes", [{"r": "2"}, {"r": 0}, {"r": None}, {"lora_alpha": None}, {"lora_alpha": "x"}])
def test_numbers_that_are_none_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_adapter(tmp_path, BASE, tensors_for(Q0))
    edit_config(tmp_path, **changes)
    with pytest.raises(ModelError, match=r"`r` and `lora_alpha`"):
        read_adapter(tmp_path)


KEY = f"base_model.model.{Q0}.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop(KEY), "has no lora_A"),
        (lambda tensors: tensors.pop(KEY.replace("_A", "_B")), "has no lora_B"),
        (lambda tensors: tensors.update({KEY: np.ones((3, 4), np.float32)}), "rank 2"),
        (lambda tensors: tensors.update({KEY: np.ones(4, np.float32)}), "rank 2"),
        (lambda tensors: tensors.update({KEY: np.full((2, 4), np.inf, np.float32)}), "not finite"),
        (lambda tensors: tensors.update({KEY: np.ones((2, 4), np.int32)}), "is I32"),
        (lambda tensors: tensors.update({"stray": np.ones(2, np.float32)}), "`stray` belongs to no part"),
        (lambda tensors: tensors.update({"base_model.model.lm_head.weight": np.ones(2)}), "lm_head.weight"),
        (lambda tensors: tensors.update({f"base_model.model.{Q0}.lora_magnitude_vector": np.ones(2)}), "magnitude"),
        (
            lambda tensors: tensors.update({"base_model.model.embed.lora_embedding_A": np.ones(2, np.float32)}),
            "embeddings",
        ),
        (lambda tensors: tensors.clear(), "no tensors"),
    ],
)
def test_broken_tensors_are_named(tmp_path: Path, change: Callable[[Any], Any], named: str) -> None:
    write_adapter(tmp_path, BASE, tensors_for(Q0, Q1))
    edit_tensors(tmp_path, change)
    with pytest.raises(LuthierError, match=named):
        read_adapter(tmp_path)


def test_modules_to_save_without_tensors_are_named(tmp_path: Path) -> None:
    write_adapter(tmp_path, BASE, tensors_for(Q0))
    edit_config(tmp_path, modules_to_save=["lm_head"])
    with pytest.raises(ModelError, match="names `lm_head`, and the file has no tensor of it"):
        read_adapter(tmp_path)


def test_files_that_are_missing_or_pickled_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match="not an adapter"):
        read_adapter(tmp_path)
    write_adapter(tmp_path, BASE, tensors_for(Q0))
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(MissingPathError, match=WEIGHTS):
        read_adapter(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"adapter_model\.bin is a pickle"):
        read_adapter(tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        read_adapter(tmp_path)
    (tmp_path / CONFIG).write_text("[]")
    with pytest.raises(ModelError, match="not a table"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("config", "extra", "named"),
    [
        (replace(BASE, targets=("k_proj",)), {}, f"`{Q0}` is adapted, and no target"),
        (replace(BASE, layers=(1,)), {}, f"`{Q0}` is adapted, and no target"),
        (replace(BASE, targets=("q_proj", "v_proj")), {}, "`v_proj` names no module"),
        (BASE, {"lm_head.weight": np.ones(2, np.float32)}, "trained whole, and modules_to_save"),
        (replace(BASE, modules_to_save=("head",)), {"lm_head.weight": np.ones(2, np.float32)}, "no tensor of it"),
        (replace(BASE, modules_to_save=("a",), tied=True), {"a.weight": np.ones(2, np.float32)}, "one matrix"),
        (replace(BASE, rank=4), {}, "rank 4"),
    ],
)
def test_an_adapter_that_would_lose_something_is_not_written(
    tmp_path: Path, config: AdapterConfig, extra: dict[str, np.ndarray], named: str
) -> None:
    with pytest.raises(ModelError, match=named):
        write_adapter(tmp_path / "a", config, tensors_for(Q0) | extra)
    assert not (tmp_path / "a").exists()


@quiet
@pytest.mark.torch
def test_peft_finds_the_base_by_the_config(tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    base = save_base(tmp_path / "base")
    config = replace(BASE, base=str(base))
    write_adapter(tmp_path / "a", config, draw_adapter(build_model("llama"), config))
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    assert np.abs(logits(model) - logits(build_model("llama"))).max() > 0.01
