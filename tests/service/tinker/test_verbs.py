"""The contract of the verbs, held by the engine that asks a server of ours for each of them."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from luthier.engines.registry import find_engine
from luthier.runs.resolve import ResolvedModel, practice_folder
from luthier.spec.tinker import ALPHA
from tests.contract.test_verbs import (  # noqa: F401 (collected here, with the fixtures below)
    test_a_loss_known_before_is_the_loss_computed_after,
    test_a_sequence_with_nothing_to_train_is_no_hindrance,
    test_a_step_that_is_not_finite_is_refused_and_changes_nothing,
    test_gradients_add_up,
    test_gradients_are_forgotten_when_asked_and_after_a_step,
    test_greedy_answers_follow_the_forward_pass,
    test_k_targets_are_k_places,
    test_log_probabilities_are_those_of_a_distribution,
    test_looking_leaves_no_gradient,
    test_one_process_sums_nothing,
    test_packed_is_each_alone_and_a_shared_prompt_is_both_whole,
    test_pairs_pull_the_answers_apart,
    test_scale_is_a_factor_of_the_gradient_and_not_of_what_is_told,
    test_stopped_and_resumed_is_never_stopped,
    test_the_loss_falls,
    test_training_and_looking_see_the_same,
    test_weights_come_back_as_they_were,
    test_what_was_saved_is_of_its_moment,
)
from tests.service.process import Server, running
from tests.unit.engines.tiny import make_plan, save_shape

pytest.importorskip("tinker")
_LEFT_OPEN = ("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
pytestmark = [pytest.mark.torch, pytest.mark.slow, *(pytest.mark.filterwarnings(each) for each in _LEFT_OPEN)]
Build = Callable[..., Any]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Server]]:
    """A tiny Llama, and a server that offers it under its own path."""
    pytest.importorskip("torch").set_num_threads(1)
    folder = save_shape(tmp_path_factory.mktemp("models") / "own" / "llama", "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):  # which a host reads; nothing here is text
        shutil.copyfile(practice_folder() / name, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with running(tmp_path_factory.mktemp("served"), "--precision", "fp32", "--model", str(folder)) as server:
            yield folder, server


@pytest.fixture
def method() -> str:
    """The only one that a service has."""
    return "lora"


@pytest.fixture
def build(served: tuple[Path, Server], own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Build]:
    """Builds the engine of a plan; every one is closed at the end."""
    built, (base, server) = [], served
    for name, value in (("BASE_URL", server.url), ("API_KEY", server.key), ("TELEMETRY", "0")):
        monkeypatch.setenv(f"TINKER_{name}", value)

    def make(method: str = "lora", *, keys: dict[str, Any] | None = None, **tables: Any) -> Any:
        keys = {**(keys or {}), "dropout": 0.0, "alpha": ALPHA}
        plan = make_plan(method, keys=keys, engine={"kind": "tinker", "model": str(base)}, **tables)
        built.append(find_engine("tinker")(plan, ResolvedModel(base, name="tiny"), own_home))
        return built[-1]

    yield make
    for engine in built:
        engine.close()
    gc.collect()


def test_the_memory_of_a_service_is_not_known(build: Build) -> None:
    assert build().peak_memory_bytes() == 0
