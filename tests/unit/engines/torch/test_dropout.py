"""Dropout is a function of seed, step, row and site alone: however rows share a batch, each has its own mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.training.batches import Item
from tests.unit.engines.conftest import Shaped
from tests.unit.engines.tiny import (
    assert_near,
    assert_same_gradients,
    build_engine,
    draw_items,
    gradients_of,
    imitation,
    load_plain,
    make_plan,
    start_update,
)

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch
KEYS = {"dropout": 0.3}


def build(shaped: Shaped, home: Path, kind: str = "llama", **tables: Any) -> Any:
    engine = build_engine(shaped(kind), home, make_plan(**{"keys": KEYS, **tables}))
    start_update(engine)
    return engine


def run(engine: Any, items: list[Item], step: int = 0) -> np.ndarray:
    logprobs: np.ndarray = engine.forward_backward(*imitation(items, step=step)).result().logprobs
    return logprobs


@pytest.mark.parametrize("kind", ["llama", "lfm2"])
def test_masks_are_the_same_packed_and_apart_and_in_any_order(kind: str, shaped: Shaped, own_home: Path) -> None:
    engine = build(shaped, own_home, kind)
    items = draw_items(12, 7, 19, 5)
    together = np.split(run(engine, items, step=3), np.cumsum([len(item.trained[0]) for item in items])[:-1])
    whole = gradients_of(engine)
    apart = [run(engine, [item], step=3) for item in items]
    assert_same_gradients(gradients_of(engine), whole)
    turned = np.split(run(engine, items[::-1], step=3), np.cumsum([len(item.trained[0]) for item in items[::-1]])[:-1])
    for one, other, another in zip(together, apart, turned[::-1], strict=True):
        assert_near(one, other)
        assert_near(one, another)


def test_masks_differ_by_step_row_site_and_seed(shaped: Shaped, own_home: Path) -> None:
    engine, other = build(shaped, own_home), build(shaped, own_home, seed=1)
    for name, master in engine._masters.named().items():
        other._masters.named()[name].copy_(master)
    (item,) = draw_items(15)
    twin = Item(7, item.sequences, item.trained)
    first = run(engine, [item])
    assert np.array_equal(first, run(engine, [item]))
    for differently in (run(engine, [item], step=1), run(engine, [twin]), run(other, [item])):
        assert np.abs(first - differently).max() > 1e-3
    dropout = engine._loaded.dropout
    dropout.start([(5, 30)])
    sites = [dropout.mask(site, torch.zeros(30, 64)) for site in range(3)]
    assert not torch.equal(sites[0], sites[1])
    assert not torch.equal(sites[1], sites[2])


def test_evaluation_and_sampling_drop_nothing(shaped: Shaped, own_home: Path) -> None:
    engine, without = build(shaped, own_home), build(shaped, own_home, keys={})
    items = draw_items(15, 6)
    batch, _ = imitation(items)
    dropped = run(engine, items)
    found = engine.forward(batch).result().logprobs
    assert np.array_equal(found, without.forward(batch).result().logprobs)
    assert np.abs(found - dropped).max() > 1e-3


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_so_many_inputs_are_dropped_and_the_rest_is_scaled(share: float) -> None:
    from luthier.engines.torch.lora import Dropout

    dropout = Dropout(share, seed=3)
    like = torch.zeros(1000, 203)
    assert dropout.mask(0, like) is None
    dropout.start([(11, 300), (12, 700)])
    mask = dropout.mask(2, like)
    assert mask is not None
    assert mask.shape == like.shape
    assert mask.mean().item() == pytest.approx(1, abs=0.01)
    kept = (mask > 0).float()
    assert kept.mean().item() == pytest.approx(1 - share, abs=0.006)
    # No column and no row is favoured, and neighbours do not follow each other.
    assert kept.mean(0).std() < 1.3 * (share * (1 - share) / 1000) ** 0.5
    assert kept.mean(1).std() < 1.3 * (share * (1 - share) / 203) ** 0.5
    away = kept - kept.mean()
    for one, other in ((away[:, 1:], away[:, :-1]), (away[1:], away[:-1]), (away[:300], away[300:600])):
        assert abs((one * other).mean().item()) < 0.02 * share


def test_the_product_and_its_gradients_are_those_of_dropout_on_the_input_of_a() -> None:
    """What PEFT computes in training, with the mask taken from here."""
    from luthier.engines.torch.lora import Dropout, LoraLinear

    torch.manual_seed(0)
    base = torch.nn.Linear(24, 36)
    dropout = Dropout(0.25, seed=1)
    layer = LoraLinear(base, 4, 0.5, dropout, site=2)
    layer.start(0, "layer")
    with torch.no_grad():
        layer.lora_B.normal_()
    dropout.start([(9, 6), (10, 4)])
    mask = dropout.mask(2, torch.zeros(10, 24))
    x = torch.randn(1, 10, 24, requires_grad=True)
    slope = torch.randn(1, 10, 36)
    found = layer(x)
    found.backward(slope)
    gradients = [each.grad.clone() for each in (x, layer.lora_A, layer.lora_B)]
    for each in (x, layer.lora_A, layer.lora_B):
        each.grad = None
    assert mask is not None
    expected = base(x) + 0.5 * (x * mask) @ layer.lora_A.T @ layer.lora_B.T
    expected.backward(slope)
    assert_near(found.detach(), expected.detach())
    for one, each in zip(gradients, (x, layer.lora_A, layer.lora_B), strict=True):
        assert_near(one, each.grad)


def test_no_other_randomness_is_left_in_a_model(shaped: Shaped, own_home: Path) -> None:
    """Dropout of the architecture itself is off in training, with recomputation too."""
    settings = {"attention_dropout": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}
    folder = shaped("phi3", **settings)
    assert load_plain(folder).config.resid_pdrop == 0.5
    items = draw_items(12, 9)
    found = []
    for recompute in ("never", "always"):
        engine = build_engine(folder, own_home, make_plan(compute={"recompute": recompute}))
        start_update(engine)
        found += [run(engine, items), run(engine, items)]
    assert all(np.array_equal(each, found[0]) for each in found)
