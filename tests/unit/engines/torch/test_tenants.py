"""Adapters that train over one base: each as if it were alone, bit for bit on a CPU, and as a run of its own would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.engines.verbs import AdapterLayout, Batch, Loss, LossResult, Share, StepParams
from luthier.errors import CallError, CheckpointError, NonFiniteError
from luthier.host.datums import Datum, LossRequest
from luthier.host.token_losses import batch_of_datums, build_loss
from luthier.runs.resolve import AdapterRef, ResolvedModel
from tests.unit.engines.conftest import Shaped
from tests.unit.engines.tiny import VOCAB, build_engine, draw_items, imitation, logprobs_of, make_plan

pytestmark = pytest.mark.torch
ADAM = StepParams(1e-2, 0.01, 1.0, (0.9, 0.95), 1e-12)
LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro")
WAYS = ((True, True, False), (True, False, True), (False, True, False), (False, False, True), (True, True, True))
LAYOUTS = [
    AdapterLayout(rank, seed, 32.0, *WAYS[seed % len(WAYS)]) for seed, rank in enumerate((1, 16, 3, 8, 64, 2, 5))
]


def open_tenants(folder: Path, home: Path, precision: str = "fp32") -> Any:
    from luthier.engines.torch.decoding import build_decoder

    return build_decoder(ResolvedModel(folder, name="tiny"), home, precision=precision).tenants()


def draw_request(draw: np.random.Generator, loss: str) -> LossRequest:
    """Some data of any lengths, weights of any sign, sometimes several targets a place."""
    data = []
    for _ in range(draw.integers(1, 4)):
        count = int(draw.integers(1, 50))
        tokens = draw.integers(3, VOCAB, count + 1)
        shape = (count, int(draw.integers(2, 4))) if loss == "cross_entropy" and draw.random() < 0.3 else (count,)
        targets = tokens[1:] if len(shape) == 1 else draw.integers(3, VOCAB, shape)
        weights = ((draw.random(shape) < 0.6) * draw.normal(size=shape)).astype(np.float32)
        inputs = {"target_tokens": targets, "weights": weights}
        if loss != "cross_entropy":
            sampled = draw.normal(-4, 1, count).astype(np.float32)
            inputs = {"target_tokens": targets, "logprobs": sampled, "advantages": weights}
        data.append(Datum(tokens[:-1], inputs))
    return LossRequest("m", 1, tuple(data), loss, {"beta": 0.1} if loss == "dro" else {})


def share_of(tenant: str, request: LossRequest) -> Share:
    return Share(tenant, batch_of_datums(request.data), build_loss(request))


def train(tenants: Any, chosen: Sequence[int], requests: Any, steps: int) -> dict[Any, Any]:
    """What every step of some adapters gives, trained together."""
    found: dict[Any, Any] = {}
    for number in chosen:
        tenants.open(str(number), LAYOUTS[number])
    for step in range(steps):
        done = tenants.compute([share_of(str(number), requests[number, step]) for number in chosen])
        for number, computed in zip(chosen, done, strict=True):
            tenants.keep(str(number))
            tenant = tenants.find(str(number))
            found[number, step, "logprobs"] = computed.logprobs
            found[number, step, "value"] = np.array(computed.value)
            for name, gradient in tenant.gradients().items():
                found[number, step, "gradient", name] = gradient.numpy().copy()
            assert tenants.optim_step(str(number), ADAM).taken
            for name, weight in tenant.named().items():
                found[number, step, "weight", name] = weight.numpy().copy()
    for number in chosen:
        tenants.drop(str(number))
    return found


@pytest.mark.parametrize(
    ("kind", "precision"), [("qwen3", "fp32"), ("llama", "bf16"), ("gemma2", "fp32"), ("qwen3_moe", "fp32")]
)
def test_who_shares_a_batch_changes_no_bit(kind: str, precision: str, shaped: Shaped, tmp_path: Path) -> None:
    tenants = open_tenants(shaped(kind), tmp_path, precision)
    draw = np.random.default_rng(7)
    every = range(len(LAYOUTS))
    requests = {
        (number, step): draw_request(draw, LOSSES[(number + step) % 5]) for number in every for step in range(2)
    }
    tiny = Datum(np.array([9]), {"target_tokens": np.array([4]), "weights": np.ones(1, np.float32)})
    requests[4, 0] = requests[3, 1] = LossRequest("m", 1, (tiny,), "cross_entropy")
    together = train(tenants, every, requests, 2)
    assert sum(bool(np.abs(each).max()) for key, each in together.items() if key[2] == "gradient") > 100
    for number in every:
        for key, value in train(tenants, [number], requests, 2).items():
            assert np.array_equal(value, together[key]), key


def with_every_place(batch: Batch, loss: Loss) -> tuple[Batch, Loss]:
    """The same loss as clients send it: every place is asked for, and those that are not trained weigh nothing."""
    assert loss.weights is not None
    places = np.arange(len(batch.tokens))
    targets, weights = np.zeros(len(places), np.int64), np.zeros(len(places))
    targets[batch.sources], weights[batch.sources] = batch.targets, loss.weights * loss.scale
    offsets = np.concatenate([[0], batch.segments[:, 1]])
    whole = Batch(batch.tokens, batch.segments, batch.prefixes, places, targets, offsets, batch.keys)
    return whole, Loss(lambda found: LossResult(float(-(weights * found).sum()), -weights), weights=weights)


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_an_adapter_is_trained_as_a_run_of_its_own(kind: str, with_head: bool, shaped: Shaped, tmp_path: Path) -> None:
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    keys = {"rank": 6, "alpha": 32.0, **({"targets": [*names, "lm_head"]} if with_head else {})}
    engine = build_engine(shaped(kind), tmp_path, make_plan(keys=keys, seed=5))
    tenants = open_tenants(shaped(kind), tmp_path)
    tenants.open("one", AdapterLayout(6, 5, train_unembed=with_head))
    tenants.open("other", AdapterLayout(3, 1))
    for step in range(4):
        batch, loss = imitation(draw_items(20, 31, 9, seed=step), scale=0.1)
        other = share_of("other", draw_request(np.random.default_rng(step), "cross_entropy"))
        expected = engine.forward_backward(batch, loss).result().logprobs
        (found, _) = tenants.compute([Share("one", *with_every_place(batch, loss)), other])
        assert np.abs(found.logprobs[batch.sources] - expected).max() < 1e-5
        for name in ("one", "other"):
            tenants.keep(name)
        norm = engine.optim_step(ADAM).result().grad_norm
        assert tenants.optim_step("one", ADAM).grad_norm == pytest.approx(norm, rel=1e-4)
        tenants.optim_step("other", ADAM)
    theirs = engine._masters.named()
    ours = tenants.find("one").named()
    assert set(ours) == set(theirs)
    for name, weight in ours.items():
        assert float((weight - theirs[name]).abs().max()) < 1e-5, name


def test_a_layout_chooses_layers(shaped: Shaped, tmp_path: Path) -> None:
    tenants = open_tenants(shaped("qwen3"), tmp_path)
    for way, endings in (
        ((True, False, False), {"gate_proj", "up_proj", "down_proj"}),
        ((False, True, False), {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ((False, False, True), {"lm_head"}),
    ):
        tenants.open("one", AdapterLayout(2, 0, 32.0, *way))
        assert {name.split(".")[-2] for name in tenants.find("one").named()} == endings
    with pytest.raises(CallError, match="nothing is left to train"):
        tenants.open("one", AdapterLayout(2, 0, 32.0, False, False, False))
    with pytest.raises(CallError, match="between 1 and 256"):
        tenants.open("one", AdapterLayout(257))


def one_step(tenants: Any, seed: int, *, apply: bool = True) -> np.ndarray[Any, Any]:
    done = tenants.compute([share_of("one", draw_request(np.random.default_rng(seed), "cross_entropy"))])
    tenants.keep("one")
    if apply:
        tenants.optim_step("one", ADAM)
    found: np.ndarray[Any, Any] = done[0].logprobs
    return found


def test_a_state_goes_on_where_it_was_saved(shaped: Shaped, tmp_path: Path) -> None:
    tenants = open_tenants(shaped("llama"), tmp_path)
    tenants.open("one", AdapterLayout(5, 3))
    one_step(tenants, 1)
    for what in ("state", "adapter"):
        (tmp_path / what).mkdir()
        tenants.save("one", what).write(tmp_path / what)
    straight = [one_step(tenants, seed) for seed in (2, 3)]
    tenants.open("one", AdapterLayout(5, 3))
    tenants.load("one", tmp_path / "state", optimizer=True)
    assert all(np.array_equal(one_step(tenants, seed), found) for seed, found in zip((2, 3), straight, strict=True))
    for folder in ("state", "adapter"):
        tenants.load("one", tmp_path / folder, optimizer=False)
        assert np.array_equal(one_step(tenants, 2), straight[0])
        assert not np.array_equal(one_step(tenants, 3), straight[1])
    for layout in (AdapterLayout(6, 3), AdapterLayout(5, 3, train_mlp=False)):
        tenants.open("one", layout)
        with pytest.raises(CheckpointError, match=r"this model's \[6, 32\]|other layers"):
            tenants.load("one", tmp_path / "state", optimizer=True)


def test_what_is_published_computes_the_same(shaped: Shaped, tmp_path: Path) -> None:
    """Also where the head has an adapter, and is the embedding table of the base."""
    tenants = open_tenants(shaped("qwen3"), tmp_path)
    tenants.open("one", AdapterLayout(5, 3))
    for seed in range(3):
        one_step(tenants, seed)
    folder = tmp_path / "adapter"
    folder.mkdir()
    tenants.save("one", "adapter").write(folder)
    tokens = np.arange(10, 30)
    batch = Batch(
        tokens,
        np.array([[0, 20]]),
        np.zeros((1, 2), np.int64),
        np.arange(20),
        np.broadcast_to(np.arange(VOCAB), (20, VOCAB)).copy(),
        np.array([0, 20]),
        np.zeros(1, np.int64),
    )
    (found,) = tenants.compute([Share("one", batch)])
    engine = build_engine(shaped("qwen3"), tmp_path, adapters=[AdapterRef(folder)])
    assert np.abs(found.logprobs - logprobs_of(engine, tokens.tolist())).max() < 1e-4


def test_gradients_add_up_until_the_step_and_are_kept_only_when_told(shaped: Shaped, tmp_path: Path) -> None:
    tenants = open_tenants(shaped("llama"), tmp_path)
    tenants.open("one", AdapterLayout(4, 3))
    one_step(tenants, 1, apply=False)
    first = {name: each.clone() for name, each in tenants.find("one").gradients().items()}
    one_step(tenants, 2, apply=False)
    both = {name: each.clone() for name, each in tenants.find("one").gradients().items()}
    tenants.compute([share_of("one", draw_request(np.random.default_rng(1), "cross_entropy"))])
    tenants.discard("one")
    kept = tenants.find("one").gradients()
    assert all(bool((kept[name] == each).all()) for name, each in both.items())
    assert any(bool((first[name] != each).any()) for name, each in both.items())


def test_a_gradient_that_is_no_number_is_refused_and_spoils_nobody(shaped: Shaped, tmp_path: Path) -> None:
    tenants = open_tenants(shaped("llama"), tmp_path)
    for name in ("one", "other"):
        tenants.open(name, AdapterLayout(4, 3))
    before = {name: each.clone() for name, each in tenants.find("one").named().items()}
    good = draw_request(np.random.default_rng(1), "cross_entropy")
    bad = share_of("one", good)
    nan = Loss(lambda found: LossResult(np.nan, np.full_like(found, np.nan)))
    tenants.compute([Share("one", bad.batch, nan), share_of("other", good)])
    for name in ("one", "other"):
        tenants.keep(name)
    assert not tenants.optim_step("one", ADAM).taken
    assert all(bool((before[name] == each).all()) for name, each in tenants.find("one").named().items())
    assert tenants.optim_step("other", ADAM).taken
    one_step(tenants, 1, apply=False)
    assert tenants.optim_step("one", StepParams(1e39)).taken
    with pytest.raises(NonFiniteError, match="not finite any more"):
        one_step(tenants, 2)


@pytest.mark.parametrize("kind", ["lfm2", "falcon"])
def test_models_that_cannot_be_packed_train_sequence_by_sequence(kind: str, shaped: Shaped, tmp_path: Path) -> None:
    tenants = open_tenants(shaped(kind), tmp_path)
    for name in ("one", "other"):
        tenants.open(name, AdapterLayout(4, 3, train_unembed=False))
    request = draw_request(np.random.default_rng(1), "ppo")
    values = []
    for _ in range(6):
        done = tenants.compute([share_of("one", request), share_of("other", request)])
        assert np.array_equal(done[0].logprobs, done[1].logprobs)
        values.append(done[0].value)
        for name in ("one", "other"):
            tenants.keep(name)
            tenants.optim_step(name, ADAM)
    assert values[-1] < values[0]


def test_all_ranks_in_one_product_give_what_each_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU, by its algebra."""
    import torch

    from luthier.engines.torch import shared

    torch.manual_seed(1)
    rows = [slice(0, 7), slice(7, 30), slice(33, 50)]
    sides = []
    for joins in (False, True):
        generator = torch.Generator().manual_seed(3)
        mine = []
        for own, rank in zip(rows, (8, 16, 40), strict=True):
            down, up = (torch.randn(shape, generator=generator) for shape in ((rank, 24), (12, rank)))
            low = shared.Low(down, up, 0.5, torch.zeros_like(down), torch.zeros_like(up))
            mine.append(shared._Mine(low, own))
        flat, slope = torch.randn(50, 24, generator=generator), torch.randn(50, 12, generator=generator)
        result, slope_x = torch.zeros(50, 12), torch.zeros(50, 24)
        if joins:
            joined = shared._join(mine, 50, shared.Pass())
            (inner,) = shared._add_joined(flat, result, joined)
            shared._pull_joined(slope, slope_x, flat, inner, joined)
        else:
            shared._pull_each(slope, slope_x, flat, shared._add_each(flat, result, mine), mine)
        sides.append([result, slope_x, *(each.low.slope_down for each in mine), *(each.low.slope_up for each in mine)])
    for one, other in zip(*sides, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert float(one.abs().max()) > 1
