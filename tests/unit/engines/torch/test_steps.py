"""The optimizer step held against torch's own; masters in fp32; steps refused; state saved and taken up again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.engines.verbs import Loss, OutOfMemory, StepParams
from tests.unit.engines.conftest import Shaped
from tests.unit.engines.tiny import (
    assert_near,
    build_engine,
    draw_items,
    gradients_of,
    imitation,
    load_plain,
    make_plan,
    start_update,
)

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.slow, pytest.mark.torch]
KINDS = ("adamw", "adam", "adamw_8bit", "adafactor")
ITEMS = draw_items(12, 17, 9, 25)
TRAINED = sum(item.trained_tokens for item in ITEMS)


def masters_of(engine: Any) -> dict[str, np.ndarray]:
    return {name: each.numpy().copy() for name, each in engine._masters.named().items()}


def step(engine: Any, params: StepParams, *, items: Any = ITEMS, number: int = 0) -> float:
    """One step on all the items; their mean loss before it."""
    batch, loss = imitation(items, scale=1 / sum(item.trained_tokens for item in items), step=number)
    value: float = engine.forward_backward(batch, loss).result().value
    assert engine.optim_step(params).result().taken
    return value / len(batch.targets)


def build(shaped: Shaped, home: Path, kind: str, method: str = "full", **tables: Any) -> Any:
    return build_engine(shaped("qwen3"), home, make_plan(method, optim={"kind": kind}, **tables))


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
@pytest.mark.parametrize("kind", ["adamw", "adam"])
def test_steps_are_those_of_torch(kind: str, max_grad_norm: float, method: str, shaped: Shaped, own_home: Path) -> None:
    engine = build(shaped, own_home, kind, method)
    copies = {name: torch.nn.Parameter(torch.from_numpy(each)) for name, each in masters_of(engine).items()}
    wanted = torch.optim.AdamW if kind == "adamw" else torch.optim.Adam
    settings = {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-7}
    optimizer = wanted(copies.values(), lr=1.0, **settings)
    batch, loss = imitation(ITEMS, scale=1 / TRAINED)
    for number in range(4):
        params = StepParams(1e-2 / (number + 1), max_grad_norm=max_grad_norm, **settings)
        engine.forward_backward(batch, loss).result()
        for name, gradient in zip(engine._masters.names, engine._masters.masters, strict=True):
            copies[name].grad = None if gradient.grad is None else gradient.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(copies.values(), max_grad_norm or torch.inf)
        taken = engine.optim_step(params).result()
        assert taken.grad_norm == pytest.approx(norm.item(), rel=1e-5)
        optimizer.param_groups[0]["lr"] = params.learning_rate
        optimizer.step()
        for name, each in masters_of(engine).items():
            assert_near(each, copies[name].detach(), 1e-6)
    assert gradients_of(engine) == {}


def test_nearly_every_weight_moves_in_bf16_at_a_small_rate(shaped: Shaped, own_home: Path) -> None:
    """The masters move, and what they gather over the steps reaches the weights; bf16 alone would lose it."""
    engine = build(shaped, own_home, "adamw", compute={"precision": "bf16"})
    before, weights = masters_of(engine), [each.detach().clone() for each in engine._masters.weights]
    alone = [torch.nn.Parameter(each.clone()) for each in weights]
    optimizer = torch.optim.AdamW(alone, lr=1e-5, weight_decay=0.0)
    for number in range(3):
        batch, loss = imitation(draw_items(*[40] * 8, seed=number), scale=1 / 200)
        engine.forward_backward(batch, loss).result()
        for one, master in zip(alone, engine._masters.masters, strict=True):
            one.grad = master.grad.to(one.dtype)
        optimizer.step()
        assert engine.optim_step(StepParams(1e-5)).result().taken
    after = masters_of(engine)
    moved = sum(int((after[name] != each).sum()) for name, each in before.items())
    assert moved / sum(each.size for each in before.values()) > 0.99
    lost = sum(int((one == each).sum()) for one, each in zip(alone, weights, strict=True))
    assert lost / sum(each.numel() for each in weights) > 0.5
    for weight, master in zip(engine._masters.weights, engine._masters.masters, strict=True):
        assert torch.equal(weight, master.to(torch.bfloat16))


def test_gradients_gather_in_fp32_over_micro_batches(shaped: Shaped, own_home: Path) -> None:
    engine = build(shaped, own_home, "adamw", compute={"precision": "bf16"})
    parts, sums = [], {}
    for number in range(6):
        engine.forward_backward(*imitation(draw_items(20, seed=number))).result()
        parts.append(gradients_of(engine))
    for number in range(6):
        engine.forward_backward(*imitation(draw_items(20, seed=number))).result()
    found = gradients_of(engine)
    for name in found:
        sums[name] = np.sum([part[name] for part in parts], axis=0, dtype=np.float64)
        assert found[name].dtype == np.float32
        assert_near(found[name], sums[name], 1e-6)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_optimizer_learns_and_goes_on_where_it_stopped(
    kind: str, method: str, shaped: Shaped, own_home: Path, tmp_path: Path
) -> None:
    params = StepParams(1e-2, weight_decay=0.01, max_grad_norm=1.0)
    engine = build(shaped, own_home, kind, method)
    losses = [step(engine, params) for _ in range(3)]
    folders = [tmp_path / name for name in ("weights", "state")]
    for folder in folders:
        folder.mkdir()
        engine.save(folder.name).write(folder)
    losses += [step(engine, params) for _ in range(3)]
    assert losses[-1] < losses[0] - 0.1
    other = build(shaped, own_home, kind, method)
    step(other, params)
    other.load(*folders)
    assert [step(other, params) for _ in range(3)] == losses[3:]
    for name, each in masters_of(other).items():
        assert np.array_equal(each, masters_of(engine)[name])


def test_what_was_taken_for_saving_does_not_change_with_later_steps(
    shaped: Shaped, own_home: Path, tmp_path: Path
) -> None:
    engine = build(shaped, own_home, "adamw", "lora")
    step(engine, StepParams(1e-2))
    saved = [engine.save(what) for what in ("weights", "state")]
    assert not any(each.is_live for each in saved)
    now, later = ([tmp_path / f"{when}_{what}" for what in ("weights", "state")] for when in ("now", "later"))
    for each, folder in zip(saved, now, strict=True):
        folder.mkdir()
        each.write(folder)
    step(engine, StepParams(1e-2))
    for each, folder in zip(saved, later, strict=True):
        folder.mkdir()
        each.write(folder)
    for one, other in zip(now, later, strict=True):
        for path in one.iterdir():
            assert path.read_bytes() == (other / path.name).read_bytes()


def test_8_bits_stay_close_to_32(shaped: Shaped, own_home: Path) -> None:
    curves = {}
    for kind in ("adamw", "adamw_8bit"):
        engine = build(shaped, own_home, kind)
        curves[kind] = [
            step(engine, StepParams(3e-3), items=draw_items(*[24] * 6, seed=number % 5)) for number in range(60)
        ]
        if kind == "adamw_8bit":
            state = engine._stepper.state()
            large = {name: each for name, each in state.items() if name.startswith("exp_avg") and each.numel() >= 4096}
            assert large
            assert {each.dtype for each in large.values()} == {torch.int8}
    ours, theirs = curves["adamw_8bit"], curves["adamw"]
    assert theirs[-1] < 0.4 * theirs[0]
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, abs=0.03 * theirs[0])


def test_moments_in_8_bits_neither_grow_nor_stand_still() -> None:
    """Over many noisy steps both moments stay what they are in fp32, for large and for small gradients of a block."""
    from luthier.engines.torch.eight_bit import AdamW8bit

    generator = torch.Generator().manual_seed(0)
    count = 4 * 4096
    size = 10 ** (torch.rand(count, generator=generator) * 3 - 3)
    ours, theirs = (torch.nn.Parameter(torch.zeros(count)) for _ in range(2))
    optimizers = AdamW8bit([ours]), torch.optim.AdamW([theirs], weight_decay=0.0)
    for _ in range(400):
        gradient = size * (torch.randn(count, generator=generator) + 0.3)
        for weights, optimizer in zip((ours, theirs), optimizers, strict=True):
            weights.grad = gradient.clone()
            optimizer.step()
    for low in (1e-3, 1e-2, 1e-1):
        chosen = (size > low) & (size <= 10 * low)
        moved, expected = ours.detach()[chosen], theirs.detach()[chosen]
        assert moved.sum() / expected.sum() == pytest.approx(1, abs=0.06)
        assert (moved - expected).norm() / expected.norm() < 0.2


def test_moments_in_8_bits_follow_gradients_that_become_small() -> None:
    """Beside one of their block that stays large: a moment rounded to the nearest code would never fall."""
    from luthier.engines.torch.eight_bit import AdamW8bit

    generator = torch.Generator().manual_seed(0)
    count = 4096
    ours, theirs = (torch.nn.Parameter(torch.zeros(count)) for _ in range(2))
    optimizers = AdamW8bit([ours]), torch.optim.AdamW([theirs], weight_decay=0.0)
    for optimizer in optimizers:
        optimizer.param_groups[0]["betas"] = (0.9, 0.99)
    is_large = torch.arange(count) % 256 == 0
    for step in range(400):
        gradient = torch.randn(count, generator=generator) + 0.3
        gradient[~is_large] *= 1.0 if step < 60 else 0.02
        if step == 300:
            marks = [each.detach().clone() for each in (ours, theirs)]
        for weights, optimizer in zip((ours, theirs), optimizers, strict=True):
            weights.grad = gradient.clone()
            optimizer.step()
    moved, expected = ((each.detach() - mark)[~is_large] for each, mark in zip((ours, theirs), marks, strict=True))
    assert moved.sum() / expected.sum() == pytest.approx(1, abs=0.15)


def test_state_in_8_bits_takes_a_quarter() -> None:
    from luthier.engines.torch.eight_bit import AdamW8bit

    weights = torch.nn.Parameter(torch.zeros(300, 1000))
    weights.grad = torch.ones_like(weights)
    optimizer = AdamW8bit([weights])
    optimizer.step()
    held = sum(each.numel() * each.element_size() for each in optimizer.state[weights].values())
    assert held < 0.26 * 8 * weights.numel()
    assert torch.allclose(weights, torch.full_like(weights, -1e-3))


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_step_with_gradients_that_are_not_finite_is_refused(broken: float, shaped: Shaped, own_home: Path) -> None:
    engine = build(shaped, own_home, "adamw", "lora")
    before = masters_of(engine)
    batch, loss = imitation(ITEMS)
    engine.forward_backward(batch, loss).result()
    engine.forward_backward(batch, Loss(loss.compute, broken, loss.weights)).result()
    taken = engine.optim_step(StepParams(1e-2)).result()
    assert (taken.taken, taken.replay) == (False, False)
    assert not np.isfinite(taken.grad_norm)
    assert gradients_of(engine) == {}
    assert all(np.array_equal(each, before[name]) for name, each in masters_of(engine).items())
    assert engine._stepper.state().keys() == {"scale"}
    step(engine, StepParams(1e-2))


def test_the_loss_is_scaled_where_gradients_are_in_fp16() -> None:
    """The step is the one without a scale; after an overflow the scale is halved and the step asked for again."""
    from luthier.engines.torch.steps import Masters, Stepper

    weights = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    stepper = Stepper("adamw", Masters({"w": weights}), scales_loss=True)
    scale = stepper.loss_scale
    assert scale > 1000
    (weights * torch.tensor([2.0, 1.0, 0.0]).half() * 1e4 * scale).sum().backward()
    taken = stepper.step(StepParams(0.1))
    assert (taken.taken, taken.replay) == (False, True)
    assert stepper.loss_scale == scale / 2
    (weights * torch.tensor([3e-4, 4e-4, 0.0]).half() * stepper.loss_scale).sum().backward()
    taken = stepper.step(StepParams(0.1, max_grad_norm=1.0))
    assert taken.taken
    assert taken.grad_norm == pytest.approx(5e-4, rel=1e-3)
    assert weights.tolist() == pytest.approx([0.9, 0.9, 1.0], abs=1e-3)


def test_the_plain_model_takes_the_same_first_step(shaped: Shaped, own_home: Path) -> None:
    """From transformers' loss to torch's step, with nothing of ours in between."""
    engine = build(shaped, own_home, "adamw")
    first = step(engine, StepParams(1e-2, weight_decay=0.1, max_grad_norm=0.5))
    model = load_plain(shaped("qwen3"))
    total = 0.0
    for item in ITEMS:
        ids, places = torch.from_numpy(item.sequences[0]), torch.from_numpy(item.trained[0])
        logprobs = model(ids[None]).logits[0].log_softmax(-1)[places - 1, ids[places]]
        (-logprobs.sum() / TRAINED).backward()
        total -= logprobs.sum().item() / TRAINED
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1).step()
    assert first == pytest.approx(total, rel=1e-5)
    # The first step of Adam is the sign of the gradient: where that is next to nothing, rounding decides.
    found = masters_of(engine)
    for name, each in model.named_parameters():
        away = np.abs(found[name] - each.detach().numpy())
        assert (away > 1e-4).mean() < 0.01


def test_a_run_in_bf16_with_modules_trained_whole_goes_on_where_it_stopped(
    shaped: Shaped, own_home: Path, tmp_path: Path
) -> None:
    """Embeddings that are the head too, and norms: their masters come back from the adapter's file in fp32."""
    tables = {"keys": {"also_train": ["embed_tokens", "norm"], "dropout": 0.1}, "compute": {"precision": "bf16"}}
    engine = build(shaped, own_home, "adamw", "lora", **tables)
    params = StepParams(3e-4)
    step(engine, params, number=0)
    folders = [tmp_path / name for name in ("weights", "state")]
    for folder in folders:
        folder.mkdir()
        engine.save(folder.name).write(folder)
    expected = [step(engine, params, number=number) for number in (1, 2)]
    other = build(shaped, own_home, "adamw", "lora", **tables)
    other.load(*folders)
    assert [step(other, params, number=number) for number in (1, 2)] == expected
    for name, each in masters_of(other).items():
        assert np.array_equal(each, masters_of(engine)[name])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_gradients_in_bf16_are_those_of_fp32_but_for_rounding(method: str, shaped: Shaped, own_home: Path) -> None:
    found = []
    for precision in ("fp32", "bf16"):
        engine = build(shaped, own_home, "adamw", method, compute={"precision": precision})
        start_update(engine)
        engine.forward_backward(*imitation(ITEMS)).result()
        found.append(gradients_of(engine))
    for name, each in found[0].items():
        one, other = each.ravel(), found[1][name].ravel()
        assert one @ other / (np.linalg.norm(one) * np.linalg.norm(other)) > 0.995, name
        assert np.linalg.norm(other) == pytest.approx(np.linalg.norm(one), rel=0.03)


@pytest.mark.parametrize("error", ["real", "device"])
def test_memory_that_ran_out_is_told_as_such(
    error: str, shaped: Shaped, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.engines.torch import engine as module

    def exhausted(*_: Any) -> Any:
        if error == "real":
            return torch.empty(1 << 60, dtype=torch.uint8)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    engine = build(shaped, own_home, "adamw", "lora", keys={"dropout": 0.3})
    start_update(engine)
    before = engine.forward(imitation(ITEMS)[0]).result().logprobs
    with monkeypatch.context() as patch:
        patch.setattr(module, "run_base", exhausted)
        for verb in (lambda: engine.forward(imitation(ITEMS)[0]), lambda: engine.forward_backward(*imitation(ITEMS))):
            with pytest.raises(OutOfMemory, match="memory"):
                verb()
        patch.setattr(module, "run_base", lambda *_: torch.zeros(2) @ torch.zeros(3))
        with pytest.raises(RuntimeError, match="size"):
            engine.forward_backward(*imitation(ITEMS))
    assert gradients_of(engine) == {}
    assert np.array_equal(engine.forward(imitation(ITEMS)[0]).result().logprobs, before)
