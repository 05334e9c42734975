"""What mlx_lm does not read of a configuration is passed on, corrected or refused; each beside transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.errors import ModelError, UnsupportedError
from luthier.training.batches import build_batch
from tests.unit.engines.conftest import Shaped
from tests.unit.engines.mlx.beside import build
from tests.unit.engines.tiny import assert_near, draw_items

pytest.importorskip("torch")
pytest.importorskip("mlx_lm")
pytestmark = pytest.mark.torch
BATCH = build_batch(draw_items(30, 21))
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e3, "factor": 4.0}}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("gemma", {"hidden_act": "gelu"}),
    ("gemma", {"hidden_act": "gelu_pytorch_tanh"}),
    ("gemma3_text", {}),
    ("qwen3_moe", {}),
]


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_settings_that_mlx_lm_reads_elsewhere_are_passed_on(
    kind: str, settings: dict[str, Any], shaped: Shaped, own_home: Path
) -> None:
    base = shaped(kind, **settings)
    one, other = (build(name, base, own_home).forward(BATCH).result().logprobs for name in ("torch", "mlx"))
    assert_near(other, one, 1e-5)


@pytest.mark.parametrize(
    ("kind", "settings", "what"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, "dynamic"),
        ("llama", {"hidden_act": "gelu"}, "'gelu'"),
        (
            "gemma3_text",
            {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
            "windows of attention",
        ),
    ],
)
def test_what_mlx_lm_would_compute_otherwise_is_refused(
    kind: str, settings: dict[str, Any], what: str, shaped: Shaped, own_home: Path
) -> None:
    with pytest.raises(UnsupportedError, match=what):
        build("mlx", shaped(kind, **settings), own_home)


def test_a_model_that_mlx_lm_does_not_know_is_an_error_with_a_way_out(shaped: Shaped, own_home: Path) -> None:
    with pytest.raises(ModelError, match="mlx_lm cannot load this model"):
        build("mlx", shaped("bloom"), own_home)


def test_an_architecture_that_was_not_held_against_transformers_is_noted(shaped: Shaped, own_home: Path) -> None:
    assert build("mlx", shaped("llama"), own_home).facts.notes == ()
    (note,) = build("mlx", shaped("qwen3_moe"), own_home, keys={"targets": ["q_proj"]}).facts.notes
    assert "qwen3_moe" in note


def test_a_model_whose_code_cannot_be_parted_gives_the_same(shaped: Shaped, own_home: Path) -> None:
    """mamba's head is not behind a decoder that takes tokens alone, so that its own logits are used."""
    one, other = (
        build(name, shaped("mamba"), own_home, keys={"targets": ["in_proj"]}).forward(BATCH).result().logprobs
        for name in ("torch", "mlx")
    )
    assert np.abs(one - other).max() < 1e-4
