"""A run far away: its plan takes nothing of this machine, and the loop sends a step before it reads the one before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.engines.registry import find_engine
from luthier.errors import NonFiniteError, UnsupportedError
from luthier.runs import events
from luthier.spec.plan import RunPlan
from luthier.training import session
from luthier.training.planner import build_plan
from luthier.training.session import train
from tests.unit.training.plans import CPU, llama, make_spec, with_free, write_prepared
from tests.unit.training.works import NEEDS_TORCH, Watched, final_hash, make_work, resume, run_whole, stop_after

Patch = pytest.MonkeyPatch
ALL = ["q_proj", "k_proj", "v_proj", "o_proj"]


# -- the plan ------------------------------------------------------------------------------------------------------


def plan_of(folder: Path, method: dict[str, Any] | None = None, **tables: Any) -> RunPlan:
    prepared = write_prepared(folder / "prepared", [100] * 90 + [300] * 10, [50, 350])
    spec = make_spec(method, engine={"kind": "tinker"}, **tables)
    return build_plan(spec, prepared, llama(), with_free(CPU, 0.01))


def test_a_plan_elsewhere_needs_no_memory_here(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert (plan.memory.items, plan.memory.fits, plan.device) == ({}, True, "service")
    method = plan.spec.method
    assert (method.kind, method.model_dump()["dropout"], plan.spec.compute.precision) == ("lora", 0.0, "bf16")
    assert plan.spec.compute.micro_batch_tokens == 65536
    assert plan.trainable_parameters > 0
    again = build_plan(plan.spec, write_prepared(tmp_path / "again", [100] * 100, []), llama(), CPU)
    assert again.decisions == ()


def test_whole_groups_of_layers_are_planned_and_parts_refused(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {"kind": "lora", "targets": ALL})
    assert plan.spec.method.model_dump()["targets"] == ALL
    with pytest.raises(UnsupportedError, match=r"method\.targets leaves out o_proj"):
        plan_of(tmp_path / "part", {"kind": "lora", "targets": ALL[:3]})


# -- the loop ------------------------------------------------------------------------------------------------------


@dataclass
class Far:
    """The torch engine as if it were far away: what is asked of it is done when its result is read, in order."""

    engine: Any
    told: list[str]
    waiting: list[Callable[[], None]] = field(default_factory=list)
    steps: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    @property
    def facts(self) -> Any:
        return replace(self.engine.facts, runs_ahead=True)

    def _later(self, name: str, do: Callable[[], Any]) -> Any:
        self.told.append(f"send {name}")
        found: list[Any] = []
        self.waiting.append(lambda: found.append(do().result()))

        def result() -> Any:
            while not found:
                self.waiting.pop(0)()
            self.told.append(f"read {name}")
            return found[0]

        return type("Handle", (), {"result": staticmethod(result)})

    def forward_backward(self, batch: Any, loss: Any) -> Any:
        return self._later(f"{batch.step + 1}", lambda: self.engine.forward_backward(batch, loss))

    def optim_step(self, params: Any) -> Any:
        self.steps += 1
        return self._later(f"optim {self.steps}", lambda: self.engine.optim_step(params))

    def save(self, what: str) -> Any:
        assert not self.waiting, "a step was on its way when the checkpoint was saved"
        return self.engine.save(what)


@pytest.fixture
def far(patch: Patch) -> list[str]:
    """Engines that are loaded from now on are far; what they are asked appears in the list."""
    told: list[str] = []

    def find(kind: str) -> Any:
        build = find_engine(kind)
        return lambda *given, **more: Far(build(*given, **more), told)

    patch.setattr(session, "find_engine", find)
    return told


class TestTheLoop:
    """Over an engine that runs ahead."""

    pytestmark = NEEDS_TORCH

    def test_a_step_is_sent_before_the_last_is_read(self, far: list[str], tmp_path: Path) -> None:
        run_whole(tmp_path, {"output.save_every_steps": 0})
        sent = [f"send {what}" for number in (1, 2, 3) for what in (number, f"optim {number}")]
        assert far[:6] == [*sent[:4], "read 1", "read optim 1"]
        assert far[6:8] == sent[4:]
        assert sum(each.startswith("send optim") for each in far) == 6

    def test_the_weights_are_those_of_a_run_that_waits(self, far: list[str], tmp_path: Path, patch: Patch) -> None:
        changes = {"evaluate.every_steps": 3}
        there, found = run_whole(tmp_path / "far", changes)
        patch.setattr(session, "find_engine", find_engine)
        here, expected = run_whole(tmp_path / "near", changes)
        assert final_hash(there) == final_hash(here)
        assert found.losses == expected.losses
        assert [each.step for each in found.of(events.StepDone)] == [1, 2, 3, 4, 5, 6]

    def test_a_stop_waits_for_what_was_sent_and_loses_nothing(self, far: list[str], tmp_path: Path) -> None:
        whole, _ = run_whole(tmp_path / "whole")
        watched = Watched()
        work = make_work(tmp_path / "cut", {"output.save_every_steps": 0}, watch=watched)
        watched.after = stop_after(1, work.stop)
        assert train(work).outcome.step == 2  # the second was on its way
        _, later = resume(work)
        assert [each.step for each in later.of(events.StepDone)] == [3, 4, 5, 6]
        assert final_hash(work.run) == final_hash(whole)

    def test_a_step_that_is_not_finite_ends_the_run_at_the_checkpoint_before(
        self, far: list[str], tmp_path: Path, patch: Patch
    ) -> None:
        work = make_work(tmp_path, watch=Watched())
        real = Far.forward_backward

        def poisoned(self: Far, batch: Any, loss: Any) -> Any:
            if batch.step == 3:
                loss = replace(loss, weights=np.full(len(batch.targets), np.nan))
            return real(self, batch, loss)

        patch.setattr(Far, "forward_backward", poisoned)
        with pytest.raises(NonFiniteError, match="step 4"):
            train(work)
        assert sorted(path.name for path in work.run.folder.glob("checkpoint_*")) == ["checkpoint_step_2"]
