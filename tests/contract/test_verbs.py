"""What every engine promises of its verbs, whatever computes them: the same tests for each engine that has verbs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.engines.registry import ENGINES, JOBS, LOCAL, find_engine
from luthier.engines.verbs import Batch, Loss, LossResult, SampleParams, StepParams
from luthier.errors import CheckpointError, UnsupportedError
from luthier.runs.resolve import ResolvedModel
from luthier.training.batches import Item, build_batch
from luthier.training.losses import cross_entropy, dpo
from tests.unit.engines.tiny import VOCAB, apart, assert_near, draw_items, every_place, imitation, make_plan, save_shape

pytestmark = pytest.mark.torch  # the tiny models are made with it, whatever the engine
NEEDS = {"torch": "torch", "mlx": "mlx_lm"}
ITEMS = draw_items(12, 17, 5, 9)
PARAMS = StepParams(1e-2)
Build = Callable[..., Any]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, whose shape every engine knows."""
    pytest.importorskip("torch")
    return save_shape(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(params=sorted(set(LOCAL) - set(JOBS)))
def build(request: pytest.FixtureRequest, base: Path, own_home: Path) -> Iterator[Build]:
    """Builds the engine of a plan; every one is closed at the end."""
    if not importlib.util.find_spec(NEEDS[request.param]):
        pytest.skip(f"engine {request.param} is not installed")
    built = []

    def make(method: str = "lora", **tables: Any) -> Any:
        plan = make_plan(method, engine={"kind": request.param}, **tables)
        built.append(find_engine(request.param)(plan, ResolvedModel(base, name="tiny"), own_home))
        return built[-1]

    yield make
    for engine in built:
        engine.close()


@pytest.fixture(params=["lora", "full"])
def method(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def learn(engine: Any, steps: int = 1, items: list[Item] = ITEMS, **changes: Any) -> list[float]:
    """The loss before each of some steps."""
    batch, loss = imitation(items, scale=1 / sum(item.trained_tokens for item in items), **changes)
    losses = []
    for _ in range(steps):
        losses.append(engine.forward_backward(batch, loss).result().value * loss.scale)
        assert engine.optim_step(PARAMS).result().taken
    return losses


def logprobs(engine: Any, items: list[Item] = ITEMS) -> np.ndarray:
    found: np.ndarray = engine.forward(build_batch(items)).result().logprobs
    return found


def grad_norm(engine: Any) -> float:
    """The norm of what has gathered; the step it takes for that is the engine's next."""
    found: float = engine.optim_step(StepParams(1e-9)).result().grad_norm
    return found


def save(engine: Any, folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).mkdir(parents=True)
        engine.save(name).write(folder / name)
    return [folder / name for name in names]


def test_the_registry_is_what_the_tests_know_and_refuses_the_rest() -> None:
    assert sorted(NEEDS) == sorted(set(LOCAL) - set(JOBS))  # tests/service/tinker has those elsewhere
    with pytest.raises(UnsupportedError, match="nothing"):
        find_engine("nothing")


def test_facts_are_honest(build: Build) -> None:
    facts = build().facts
    assert facts.engine in ENGINES
    assert (facts.device, facts.precision, facts.is_packed) == ("cpu", "fp32", True)
    assert facts.trainable_parameters == 3 * 4 * (3 * (32 + 16) + 16 * 2 + 2 * (32 + 48) + 48 + 32 + 64 - 16)
    assert facts.versions


def test_log_probabilities_are_those_of_a_distribution(build: Build) -> None:
    found = build().forward(every_place(ITEMS[0].sequences[0])).result().logprobs
    assert found.shape == (12, VOCAB)
    assert found.dtype == np.float64
    assert_near(np.exp(found).sum(1), np.ones(12), 1e-5)


def test_hits_tell_the_likeliest_token(build: Build) -> None:
    engine = build()
    sequence = ITEMS[1].sequences[0]
    rated = engine.forward(every_place(sequence)).result().logprobs.argmax(1)
    told = np.concatenate([sequence[:1], rated[:-1]])
    for tokens, expected in ((sequence, sequence[1:] == rated[:-1]), (told, None)):
        item = Item(0, (tokens,), (np.arange(1, len(tokens)),))
        hits = engine.forward(build_batch([item])).result().hits
        assert hits.dtype == bool
        if expected is not None:
            assert (hits == expected).all()
    assert hits[0]


def test_training_and_looking_see_the_same(build: Build, method: str) -> None:
    engine = build(method)
    learn(engine, 2)
    batch, loss = imitation(ITEMS)
    computed = engine.forward_backward(batch, loss).result()
    assert_near(computed.logprobs, logprobs(engine), 1e-6)
    assert computed.value == pytest.approx(-computed.logprobs.sum())


def test_looking_leaves_no_gradient(build: Build) -> None:
    engine = build()
    logprobs(engine)
    assert engine.optim_step(PARAMS).result().grad_norm == 0


def test_the_loss_falls(build: Build, method: str) -> None:
    losses = learn(build(method), 8)
    assert losses[-1] < losses[0] - 0.3
    assert losses[0] == pytest.approx(-np.mean(logprobs(build(method))))


def test_one_seed_is_one_run_and_another_is_another(build: Build) -> None:
    curves = [learn(build(seed=seed, keys={"dropout": 0.2}), 4) for seed in (1, 1, 2)]
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


def test_gradients_add_up(build: Build, method: str) -> None:
    engine, other = build(method), build(method)
    learn(engine)
    learn(other)
    for item in ITEMS:
        engine.forward_backward(*imitation([item]))
    batch, loss = imitation(ITEMS)
    other.forward_backward(batch, loss)
    one, another = (each.optim_step(PARAMS).result().grad_norm for each in (engine, other))
    assert one == pytest.approx(another, rel=1e-5)
    assert_near(logprobs(engine), logprobs(other), 1e-4)


def test_scale_is_a_factor_of_the_gradient_and_not_of_what_is_told(build: Build) -> None:
    engine = build()
    found = []
    for scale in (1.0, 0.25):
        batch, loss = imitation(ITEMS, scale=scale)
        value = engine.forward_backward(batch, loss).result().value
        found.append((value, grad_norm(engine)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[1][1] == pytest.approx(0.25 * found[0][1], rel=1e-4)


def test_gradients_are_forgotten_when_asked_and_after_a_step(build: Build, method: str) -> None:
    engine = build(method)
    batch, loss = imitation(ITEMS)
    engine.forward_backward(batch, loss)
    engine.discard_gradients()
    assert grad_norm(engine) == 0
    engine.forward_backward(batch, loss)
    assert grad_norm(engine) > 0
    assert grad_norm(engine) == 0


def test_a_loss_known_before_is_the_loss_computed_after(build: Build) -> None:
    """The same slope, given as weights and given as a function of the log-probabilities."""
    engine = build()
    batch = build_batch(ITEMS)
    weights = np.random.default_rng(0).normal(size=len(batch.targets))
    found = []
    for given in (weights, None):
        loss = Loss(lambda p: cross_entropy(p, weights), 0.5, given)
        value = engine.forward_backward(batch, loss).result().value
        found.append((value, grad_norm(engine)))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_k_targets_are_k_places(build: Build) -> None:
    """Soft targets at one place are the same place asked once for each of them."""
    engine = build()
    sequence = ITEMS[0].sequences[0]
    draw = np.random.default_rng(1)
    targets, weights = draw.integers(0, VOCAB, (11, 3)), draw.random((11, 3))
    whole = np.array([[0, 12]])
    keys, ends = np.zeros(1, np.int64), np.array([0, 11])
    soft = Batch(sequence, whole, np.zeros_like(whole), np.arange(11), targets, ends, keys)
    hard = Batch(
        sequence, whole, np.zeros_like(whole), np.repeat(np.arange(11), 3), targets.reshape(-1), ends * 3, keys
    )
    found = []
    for batch, each in ((soft, weights), (hard, weights.reshape(-1))):
        computed = engine.forward_backward(batch, Loss(lambda p, w=each: cross_entropy(p, w), 1.0, each)).result()
        found.append((computed.logprobs.reshape(-1), computed.value, grad_norm(engine)))
    assert_near(found[0][0], found[1][0])
    assert found[0][1:] == pytest.approx(found[1][1:], rel=1e-5)


def test_a_sequence_with_nothing_to_train_is_no_hindrance(build: Build) -> None:
    engine = build()
    bare = Item(9, ITEMS[3].sequences, (np.zeros(0, np.int64),))
    found = engine.forward_backward(*imitation([ITEMS[0], bare, ITEMS[1]])).result()
    norm = grad_norm(engine)
    expected = engine.forward_backward(*imitation(ITEMS[:2])).result()
    assert_near(found.logprobs, expected.logprobs)
    assert norm == pytest.approx(grad_norm(engine), rel=1e-5)
    assert engine.forward_backward(*imitation([bare])).result().value == 0
    assert len(engine.forward(build_batch([bare])).result().logprobs) == 0


def test_packed_is_each_alone_and_a_shared_prompt_is_both_whole(build: Build) -> None:
    engine = build()
    learn(engine, 2)
    items = [*draw_items(11, 3), *draw_items((6, 4, 5), (2, 7, 3), seed=4)]
    together = logprobs(engine, items)
    assert_near(together, np.concatenate([logprobs(engine, [item]) for item in items]))
    assert_near(together, logprobs(engine, apart(items)))
    alone = [engine.forward(part).result().logprobs for part in build_batch(items).alone()]
    assert_near(together, np.concatenate(alone))


def test_pairs_pull_the_answers_apart(build: Build, method: str) -> None:
    engine = build(method)
    batch = build_batch(draw_items((6, 4, 5), (2, 7, 3)))
    reference = engine.forward(batch).result().logprobs
    margins = []
    for _ in range(4):
        loss = Loss(lambda p: dpo(p, batch.offsets, reference, beta=0.5), 0.5)
        computed = engine.forward_backward(batch, loss).result()
        margins.append(computed.metrics["reward_margin"])
        engine.optim_step(PARAMS).result()
    assert margins[0] == pytest.approx(0, abs=1e-4)
    assert margins[-1] > margins[1] > 0


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_step_that_is_not_finite_is_refused_and_changes_nothing(build: Build, broken: float) -> None:
    engine, other = build(), build()
    learn(engine, 2)
    learn(other, 2)
    batch = build_batch(ITEMS)
    bad = Loss(lambda p: LossResult(broken, np.full(len(p), broken)))
    assert np.isfinite(engine.forward_backward(batch, bad).result().logprobs).all()
    taken = engine.optim_step(PARAMS).result()
    assert not taken.taken
    assert not np.isfinite(taken.grad_norm)
    assert learn(engine, 2) == learn(other, 2)


def test_weights_come_back_as_they_were(build: Build, method: str, tmp_path: Path) -> None:
    engine = build(method)
    learn(engine, 2)
    expected = logprobs(engine)
    (weights,) = save(engine, tmp_path, "weights")
    learn(engine, 2)
    assert np.abs(logprobs(engine) - expected).max() > 1e-3
    for each in (engine, build(method)):
        each.load(weights)
        assert np.array_equal(logprobs(each), expected)


def test_stopped_and_resumed_is_never_stopped(build: Build, method: str, tmp_path: Path) -> None:
    tables = {} if method == "full" else {"keys": {"dropout": 0.2}}
    whole = learn(build(method, **tables), 5)
    engine = build(method, **tables)
    assert learn(engine, 2) == whole[:2]
    weights, state = save(engine, tmp_path, "weights", "state")
    other = build(method, seed=0, **tables)
    learn(other, 1, ITEMS[:1])
    other.load(weights, state)
    assert learn(other, 3) == whole[2:]


def test_what_was_saved_is_of_its_moment(build: Build, method: str, tmp_path: Path) -> None:
    engine = build(method)
    learn(engine)
    saved = engine.save("weights")
    expected = logprobs(engine)
    if not saved.is_live:  # else it was not copied, and is written before training goes on
        learn(engine)
    saved.write(tmp_path)
    learn(engine)
    engine.load(tmp_path)
    assert np.array_equal(logprobs(engine), expected)


def test_weights_of_another_shape_of_adapter_are_refused(build: Build, tmp_path: Path) -> None:
    (weights,) = save(build(keys={"targets": ["q_proj"]}), tmp_path, "weights")
    with pytest.raises(CheckpointError, match="which this run trains"):
        build(keys={"targets": ["q_proj", "k_proj"]}).load(weights)


def test_greedy_answers_follow_the_forward_pass(build: Build, method: str) -> None:
    engine = build(method)
    learn(engine, 3)
    prompts = [item.sequences[0].tolist() for item in ITEMS]
    answers = engine.sample(prompts, SampleParams(max_tokens=4)).result()
    for prompt, answer in zip(prompts, answers, strict=True):
        rated = engine.forward(every_place([*prompt, *answer])).result().logprobs.argmax(1)
        assert answer == rated[len(prompt) - 1 : -1].tolist()


def test_one_process_sums_nothing(build: Build) -> None:
    values = np.array([1.0, -2.5])
    assert np.array_equal(build().sum_over_processes(values), values)


def test_it_tells_the_memory_of_its_device(build: Build) -> None:
    assert build().peak_memory_bytes() > 1 << 20
