"""One spec means the same on both engines: the same first values, losses and gradients on the same tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.engines.verbs import Loss, StepParams
from luthier.training.batches import build_batch
from luthier.training.losses import dpo
from tests.unit.engines.conftest import Shaped
from tests.unit.engines.mlx.beside import both, build, pulled
from tests.unit.engines.tiny import WINDOW, apart, assert_near, assert_same_gradients, draw_items, imitation

pytest.importorskip("torch")
pytest.importorskip("mlx_lm")
pytestmark = pytest.mark.torch
# Windows of attention that mlx_lm does not have are refused beyond their length, so these are as long.
SHAPES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gemma3", "phi3", "mixtral")
ITEMS = draw_items(12, 17, 5, 9)
PAIRS = draw_items((6, 4, 5), (2, 7, 3))


def widened(kind: str) -> dict[str, Any]:
    wide = {"sliding_window": 64, "max_window_layers": 3}
    return wide if kind in ("mistral", "qwen2", "qwen3", "gemma2", "phi3") else {}


@pytest.mark.parametrize("kind", SHAPES)
def test_losses_and_gradients_are_torch_s(kind: str, shaped: Shaped, own_home: Path) -> None:
    base = shaped(kind, **widened(kind))
    found = [pulled(engine, *imitation(ITEMS)) for engine in both(base, own_home)]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert_near(found[1][1], found[0][1], 1e-5)
    assert_same_gradients(found[1][2], found[0][2])


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "gemma3_text"])
def test_every_weight_s_gradient_is_torch_s(kind: str, shaped: Shaped, own_home: Path) -> None:
    found = [pulled(engine, *imitation(ITEMS)) for engine in both(shaped(kind, **widened(kind)), own_home, "full")]
    ours = {name: each for name, each in found[1][2].items() if np.abs(each).max() > 0}
    assert_same_gradients(ours, {name: found[0][2][name] for name in ours})
    assert set(found[0][2]) == set(ours)


def test_pairs_pull_as_they_do_on_torch(shaped: Shaped, own_home: Path) -> None:
    batch = build_batch(PAIRS)
    found = []
    for engine in both(shaped("llama"), own_home):
        reference = engine.forward(batch).result().logprobs - 0.1
        found.append(pulled(engine, batch, Loss(lambda p, r=reference: dpo(p, batch.offsets, r, beta=0.5))))
    assert_near(found[1][1], found[0][1], 1e-5)
    assert_same_gradients(found[1][2], found[0][2])


def test_a_run_of_steps_is_torch_s(shaped: Shaped, own_home: Path) -> None:
    """Adam with decay and clipping: the same losses and norms step by step, from the engines' own first values."""
    for optim in ("adamw", "adam"):
        curves = []
        for kind in ("torch", "mlx"):
            engine, told = build(kind, shaped("qwen3", **widened("qwen3")), own_home, optim={"kind": optim}), []
            for _ in range(5):
                batch, loss = imitation(ITEMS, scale=0.05)
                value = engine.forward_backward(batch, loss).result().value
                taken = engine.optim_step(StepParams(1e-2, weight_decay=0.1, max_grad_norm=0.5)).result()
                told.append((value, taken.grad_norm))
            curves.append(told)
        assert np.array(curves[1]) == pytest.approx(np.array(curves[0]), rel=2e-4)


def test_dropout_leaves_out_what_it_does_on_torch(shaped: Shaped, own_home: Path) -> None:
    found = [
        pulled(engine, *imitation(apart(PAIRS), step=3))
        for engine in both(shaped("llama"), own_home, keys={"dropout": 0.3})
    ]
    assert_near(found[1][1], found[0][1], 1e-5)
    assert_same_gradients(found[1][2], found[0][2])


def test_a_shared_prompt_drops_alike_in_both_of_its_rows(shaped: Shaped, own_home: Path) -> None:
    """torch computes the prompt once; here it is computed in each row, with the same inputs left out."""
    found = [
        pulled(engine, *imitation(PAIRS, step=3)) for engine in both(shaped("llama"), own_home, keys={"dropout": 0.3})
    ]
    assert_near(found[1][1], found[0][1], 1e-5)
    assert_same_gradients(found[1][2], found[0][2])


METHODS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True, "rank": 9},
    "last layers": {"last_layers": 2},
    "head and norms": {"also_train": ["lm_head", "norm"]},
    "adapted head": {"targets": ["lm_head", "o_proj"]},
}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_trained_is_what_torch_trains(method: str, shaped: Shaped, own_home: Path) -> None:
    engines = both(shaped("llama"), own_home, keys=METHODS[method])
    assert engines[0].facts.trainable_parameters == engines[1].facts.trainable_parameters
    found = [pulled(engine, *imitation(ITEMS)) for engine in engines]
    assert_same_gradients(found[1][2], found[0][2])


def test_a_tied_head_is_published_twice(shaped: Shaped, own_home: Path, tmp_path: Path) -> None:
    from luthier.weights.peft import read_adapter

    for wanted in ("embed_tokens", "lm_head"):
        engines = both(shaped("qwen3", **widened("qwen3")), own_home, keys={"also_train": [wanted]})
        found = [pulled(engine, *imitation(ITEMS)) for engine in engines]
        assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
        published = []
        for number, engine in enumerate(engines):
            folder = tmp_path / f"{wanted}{number}"
            folder.mkdir()
            engine.save("weights").write(folder)
            config, tensors = read_adapter(folder)
            published.append((replace(config, targets=tuple(sorted(config.targets))), tensors))
        assert published[0][0] == published[1][0]
        assert published[0][1].keys() == published[1][1].keys()


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3", "gemma2", "phi3"])
def test_a_row_beyond_a_window_that_mlx_lm_lacks_is_refused(kind: str, shaped: Shaped, own_home: Path) -> None:
    from luthier.errors import UnsupportedError

    engine = build("mlx", shaped(kind), own_home)
    short = draw_items(WINDOW)
    expected = build("torch", shaped(kind), own_home).forward(build_batch(short)).result().logprobs
    assert_near(engine.forward(build_batch(short)).result().logprobs, expected, 1e-5)
    with pytest.raises(UnsupportedError, match=f"beyond {WINDOW}"):
        engine.forward(build_batch(draw_items(WINDOW + 1)))
