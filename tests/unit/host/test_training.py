"""Works of models in training: in order for each, joined across them, fair, and nobody feels another's trouble."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.engines.verbs import OutOfMemory, Share
from luthier.errors import UnsupportedError
from luthier.host.datums import Datum, LossRequest, read_loss_output, write_loss_request
from luthier.host.training import Training
from luthier.host.work import Done, Work
from luthier.runs.resolve import ResolvedModel
from tests.unit.engines.tiny import VOCAB, save_shape

pytestmark = [pytest.mark.torch, pytest.mark.slow]


class Spy:
    """Real tenants, and what they were asked; `check` may raise what a machine might."""

    def __init__(self, tenants: Any) -> None:
        self._tenants = tenants
        self.passes: list[list[tuple[str, int]]] = []
        self.budget = 128
        self.check: Callable[[Sequence[Share]], None] = lambda shares: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tenants, name)

    def compute(self, shares: Sequence[Share]) -> Any:
        self.passes.append([(share.tenant, len(share.batch.tokens)) for share in shares])
        done = self._tenants.compute(shares)
        self.check(shares)  # after the fact, when gradients have been gathered already
        return done


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import torch

    from luthier.engines.torch.decoding import build_decoder

    torch.set_num_threads(1)
    folder = save_shape(tmp_path_factory.mktemp("llama"), "llama")
    return build_decoder(ResolvedModel(folder, name="tiny"), folder, precision="fp32").tenants()


class Desk:
    """A queue that is worked off by hand, and what it told."""

    def __init__(self, spy: Spy) -> None:
        self.spy = spy
        self.training = Training(spy, lambda: None, longest=100)  # type: ignore[arg-type]
        self.told: dict[int, Done] = {}
        self.order: list[int] = []
        self._number = 0

    def ask(self, kind: str, model: str, body: bytes = b"", **facts: Any) -> int:
        self._number += 1

        def hear(done: Done) -> None:
            self.told[done.id] = done
            self.order.append(done.id)

        self.training.submit(Work(self._number, kind, model, facts, body), hear)
        return self._number

    def open(self, *models: str, rank: int = 4, projects: Sequence[str] = ("p",)) -> None:
        for number, model in enumerate(models):
            self.ask("open", model, rank=rank, seed=ord(model[0]), project=projects[number % len(projects)])
        self.run()
        assert not [done for done in self.told.values() if done.error and done.error["code"] == "call_invalid"]

    def run(self) -> None:
        while self.training.has_work():
            self.training.work()

    def finish(self, number: int) -> Done:
        """Also what another thread writes."""
        self.run()
        self.training._writer.submit(lambda: None).result()
        self.run()
        return self.told[number]

    def code(self, number: int) -> str:
        error = self.finish(number).error
        return str(error and error["code"])


@pytest.fixture
def desk(tenants: Any) -> Iterator[Desk]:
    made = Desk(Spy(tenants))
    yield made
    for model in list(made.training._models):
        made.ask("drop", model)
    made.run()
    made.training.close()


def request(*lengths: int, seed: int = 0, loss: str = "cross_entropy", forward_only: bool = False) -> bytes:
    draw = np.random.default_rng(seed)
    data = []
    for length in lengths:
        tokens = draw.integers(3, VOCAB, length + 1)
        data.append(Datum(tokens[:-1], {"target_tokens": tokens[1:], "weights": np.ones(length, np.float32)}))
    return write_loss_request(LossRequest("m", 1, tuple(data), loss, {}, forward_only))


def test_works_of_models_are_joined_and_each_has_its_order(desk: Desk) -> None:
    desk.open("a", "b", "c")
    works = []
    for model in "abc":
        works += [desk.ask("forward_backward", model, request(10)), desk.ask("optim_step", model, learning_rate=0.01)]
        works += [desk.ask("forward_backward", model, request(10, forward_only=True))]
    desk.run()
    assert [[model for model, _ in each] for each in desk.spy.passes] == [["a", "b", "c"], ["a", "b", "c"]]
    first, last = (read_loss_output(desk.told[works[place]].body) for place in (0, 2))
    assert last.metrics["loss:sum"] < first.metrics["loss:sum"]
    assert desk.told[works[1]].facts["metrics"]["optimizer_steps"] == 1
    assert first.outputs[0]["logprobs"].shape == (10,)


def test_a_large_request_is_cut_and_holds_nobody_up(desk: Desk) -> None:
    desk.open("large", "small")
    large = desk.ask("forward_backward", "large", request(*[30] * 12))
    small = desk.ask("forward_backward", "small", request(20))
    desk.run()
    assert desk.order.index(small) < desk.order.index(large)
    assert all(tokens <= 64 for each in desk.spy.passes for _, tokens in each)
    assert len(read_loss_output(desk.told[large].body).outputs) == 12
    assert read_loss_output(desk.told[large].body).metrics["tokens:sum"] == 360


def test_no_datum_is_made_as_wide_as_its_neighbour(desk: Desk) -> None:
    draw = np.random.default_rng(5)
    shapes = [(4,), (4, 1), (4, 60), (4, 60), (4,), (40, 65), (40, 65)]
    data = [
        Datum(draw.integers(3, VOCAB, shape[0]), {"target_tokens": draw.integers(3, VOCAB, shape)}) for shape in shapes
    ]
    passes = desk.training._cut(LossRequest("m", 1, tuple(data), "cross_entropy"), 64)
    assert [piece.batch.targets.shape for piece in passes.pieces] == [(8, 1), (8, 60), (4,), (40, 65), (40, 65)]
    assert [piece.cost for piece in passes.pieces] == [8, 8, 4, 80, 80]


def test_projects_have_equal_turns(desk: Desk) -> None:
    desk.open("a1", "a2", "a3", "b1", projects=("a", "a", "a", "b"))
    for model in ("a1", "a2", "a3", "b1"):
        desk.ask("forward_backward", model, request(*[60] * 6))
    desk.run()
    turns = [model[0] for each in desk.spy.passes for model, _ in each][:12]
    assert turns.count("b") == 6


def test_what_is_told_does_not_depend_on_who_else_asks(desk: Desk) -> None:
    models = ["a", "b", "c"]

    def play(chosen: list[str]) -> dict[str, list[bytes]]:
        for model in models:
            desk.ask("drop", model)
        desk.open(*chosen, rank=5)
        asked: dict[str, list[int]] = {model: [] for model in chosen}
        for step in range(3):
            for place, model in enumerate(models):
                if model in chosen:
                    body = request(*range(5, 60, 9 + place), seed=step)
                    asked[model].append(desk.ask("forward_backward", model, body))
                    desk.ask("optim_step", model, learning_rate=0.01, grad_clip_norm=1.0)
        desk.run()
        return {model: [desk.told[number].body for number in asked[model]] for model in chosen}

    together = play(models)
    assert max(len(each) for each in desk.spy.passes) > 1
    for model in models:
        assert play([model])[model] == together[model]


def test_only_the_guilty_hears_of_it(desk: Desk) -> None:
    desk.open("good", "bad", "other")
    clean = [desk.ask("forward_backward", model, request(10)) for model in ("good", "other")]
    desk.run()
    expected = {model: desk.told[number].body for model, number in zip(("good", "other"), clean, strict=True)}
    norms = {model: desk.finish(desk.ask("optim_step", model)).facts["metrics"] for model in ("good", "other")}
    desk.open("good", "bad", "other")

    def refuse(shares: Sequence[Share]) -> None:
        if any(share.tenant == "bad" for share in shares):
            raise UnsupportedError("this one cannot be computed")

    desk.spy.check = refuse
    asked = {model: desk.ask("forward_backward", model, request(10)) for model in ("good", "bad", "other")}
    desk.run()
    assert desk.code(asked["bad"]) == "unsupported"
    for model in ("good", "other"):
        assert desk.told[asked[model]].body == expected[model]
        assert desk.finish(desk.ask("optim_step", model)).facts["metrics"] == norms[model]
    assert desk.finish(desk.ask("optim_step", "bad")).facts["metrics"]["grad_norm"] == 0


def test_memory_that_runs_out_makes_passes_smaller(desk: Desk) -> None:
    desk.open("a", "b")

    def run_out(shares: Sequence[Share]) -> None:
        if sum(len(share.batch.tokens) for share in shares) > 40:
            raise OutOfMemory("no room")

    desk.spy.check = run_out
    asked = [desk.ask("forward_backward", "a", request(*[20] * 3)), desk.ask("forward_backward", "b", request(20, 20))]
    too_long = desk.ask("forward_backward", "a", request(50))
    desk.run()
    assert [len(read_loss_output(desk.told[number].body).outputs) for number in asked] == [3, 2]
    assert desk.code(too_long) == "out_of_memory"
    desk.spy.check = lambda shares: None
    norm = desk.finish(desk.ask("optim_step", "a")).facts["metrics"]["grad_norm"]
    desk.open("a")
    desk.ask("forward_backward", "a", request(*[20] * 3))
    assert norm == pytest.approx(desk.finish(desk.ask("optim_step", "a")).facts["metrics"]["grad_norm"], rel=1e-5)


def test_a_state_is_saved_whole_and_taken_up_again(desk: Desk, tmp_path: Path) -> None:
    desk.open("a")
    folder = str(tmp_path / "deep" / "state")
    desk.ask("forward_backward", "a", request(10))
    desk.ask("optim_step", "a", learning_rate=0.01)
    saved = desk.ask("save", "a", what="state", folder=folder)
    after = desk.ask("forward_backward", "a", request(10, seed=2))
    loaded = desk.ask("load", "a", folder=folder, optimizer=True)  # waits until the folder is there
    assert desk.finish(saved).facts["bytes"] > 1000
    assert desk.finish(loaded).error is None
    copied = desk.ask("open", "b", rank=4, seed=9, folder=folder, optimizer=True, project="q")
    same = desk.ask("forward_backward", "b", request(10, seed=2))
    assert desk.finish(copied).error is None
    assert desk.finish(same).body == desk.told[after].body
    stepped = desk.ask("optim_step", "b", learning_rate=0.01)
    assert desk.finish(stepped).facts["metrics"]["optimizer_steps"] == 2
    wrong = desk.ask("open", "c", rank=8, folder=folder)
    assert desk.code(wrong) == "checkpoint_broken"
    assert desk.code(desk.ask("forward_backward", "c", request(10))) == "unavailable"
    (Path(folder) / "weights.safetensors").write_bytes(b"x")
    assert desk.code(desk.ask("load", "b", folder=folder)) == "checkpoint_broken"
    assert desk.finish(desk.ask("forward_backward", "b", request(10))).error is None


def test_refusals_name_the_field(desk: Desk) -> None:
    desk.open("a")
    asked = {
        "adam_params.beta1": desk.ask("optim_step", "a", beta1=1.0),
        "adam_params.learning_rate": desk.ask("optim_step", "a", learning_rate=float("nan")),
        "rank": desk.ask("open", "b", rank=300),
        "loss_fn": desk.ask("forward_backward", "a", request(5, loss="gspo")),
        "what": desk.ask("save", "a", what="all", folder="x"),
        "data[0].model_input": desk.ask("forward_backward", "a", request(101)),
    }
    desk.run()
    for where, number in asked.items():
        error = desk.told[number].error
        assert error
        assert error["where"] == where


def test_a_gradient_that_is_not_finite_refuses_the_step(desk: Desk) -> None:
    desk.open("a")
    draw = np.random.default_rng(1)
    tokens = draw.integers(3, VOCAB, 6)
    inputs = {"target_tokens": tokens, "logprobs": np.full(6, -1e4, np.float32), "advantages": np.ones(6, np.float32)}
    body = write_loss_request(LossRequest("a", 1, (Datum(tokens, inputs),), "importance_sampling"))
    assert desk.finish(desk.ask("forward_backward", "a", body)).error is None
    assert desk.code(desk.ask("optim_step", "a")) == "non_finite_loss"
    desk.ask("forward_backward", "a", request(10))
    assert desk.finish(desk.ask("optim_step", "a")).facts["metrics"]["optimizer_steps"] == 1
