"""Layers belong to attention, the feed-forward part or the head; and a model's size is told by its config alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from luthier.runs.resolve import practice_folder
from luthier.weights.groups import find_groups, group_of, list_left_out
from luthier.weights.sketch import read_or_sketch

PATHS = {
    "model.layers.0.self_attn.q_proj": "attn",
    "model.layers.0.mlp.down_proj": "mlp",
    "transformer.h.0.attn.c_proj": "attn",
    "transformer.h.0.mlp.c_proj": "mlp",
    "model.layers.0.feed_forward.w1": "mlp",
    "lm_head": "unembed",
}


@pytest.mark.parametrize(("module", "group"), PATHS.items())
def test_a_path_tells_its_group(module: str, group: str) -> None:
    assert group_of(module) == group


def test_names_alone_tell_it_for_the_usual_layers() -> None:
    assert find_groups("auto") == {"attn", "mlp"}
    assert find_groups(["q_proj", "o_proj"]) == {"attn"}
    assert find_groups(["gate_proj", "up_proj", "down_proj", "lm_head"]) == {"mlp", "unembed"}


def test_a_part_of_a_group_is_told_by_what_it_leaves_out() -> None:
    modules = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"] + ["model.layers.0.mlp.up_proj"]
    assert list_left_out(["q_proj", "v_proj"], modules) == ["k_proj", "o_proj"]
    assert list_left_out(["q_proj", "k_proj", "v_proj", "o_proj"], modules) == []


def test_a_model_without_its_weights_is_sketched_as_large_as_it_is(tmp_path: Path) -> None:
    whole = read_or_sketch(practice_folder(), "practice")
    shutil.copyfile(practice_folder() / "config.json", tmp_path / "config.json")
    sketch = read_or_sketch(tmp_path, "practice")
    assert sketch.linears == whole.linears
    assert sketch.vocab_size == whole.vocab_size
    assert sketch.total_parameters == pytest.approx(whole.total_parameters, rel=0.01)  # norms are left out


def test_a_model_of_another_kind_is_of_unknown_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "odd", "vocab_size": 7}))
    found = read_or_sketch(tmp_path, "odd")
    assert (found.architecture, found.vocab_size, found.total_parameters, found.targets) == ("odd", 7, 0, [])
    assert read_or_sketch(tmp_path / "nowhere", "odd").linears == {}
