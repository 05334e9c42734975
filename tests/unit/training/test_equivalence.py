"""The proof over engines: what is compared, what is left out with its reason, and that a difference is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.engines import registry
from luthier.errors import CallError, MissingExtraError, ProofError, UnsupportedError
from luthier.runs import events
from luthier.training import equivalence
from luthier.training.equivalence import Trace, check_equivalence, prove_engines
from tests.unit.training.works import NEEDS_TORCH, make_work

SMALL = {"rows.train": 6, "rows.valid": 0, "optim.batch": 3, "optim.steps": 4, "output.save_every_steps": 0}
ONE, TWO = np.array([4, 5, 6]), np.array([7, 8])


def traced(engine: str, losses: list[float], *heard: tuple[int, Any, Any]) -> Trace:
    trace = Trace(engine)
    for step, tokens, trained in heard:
        trace.hear(step, tokens, np.array(trained))
    for number, loss in enumerate(losses, 1):
        trace.watch(events.StepDone(number, loss, 0.1, 1.0, 5, 3, 1.0, 1.0, 1))
    return trace


def test_how_a_step_is_cut_up_does_not_count_and_everything_else_does() -> None:
    first = traced("torch", [2.0], (0, ONE, [2, 1]), (0, TWO, [1]))
    other = traced("trl", [2.0 + 5e-5], (0, TWO, [1]), (0, ONE, [1, 2]))
    assert equivalence._compare(first, other).parted == ""
    changed = {
        "the tokens are not the same": traced("trl", [2.0], (0, ONE, [1, 2]), (0, TWO[::-1], [1])),
        "the trained tokens are not the same": traced("trl", [2.0], (0, ONE, [1]), (0, TWO, [1])),
        "the losses are 0.001 apart, 1e-04 allowed": traced("trl", [2.001], (0, ONE, [1, 2]), (0, TWO, [1])),
        "the losses are inf apart, 1e-04 allowed": traced("trl", [2.0, 2.0], (0, ONE, [1, 2]), (0, TWO, [1])),
    }
    for said, trace in changed.items():
        assert said in equivalence._compare(first, trace).parted
    moved = traced("trl", [2.0], (0, ONE, [1, 2]), (1, TWO, [1]))
    assert equivalence._compare(first, moved).parted.startswith("the tokens")


def test_an_engine_that_is_not_there_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "list_missing", lambda kind: ["bitsandbytes", "peft"] if kind == "trl" else [])
    with pytest.raises(MissingExtraError, match="engine `trl` needs the package `peft`") as caught:
        registry.find_engine("trl")
    assert caught.value.hint == "run: pip install 'luthier[trl]'"
    assert registry.find_missing("torch") == ""
    with pytest.raises(UnsupportedError, match="engine `tin` is not in this version; there is: torch, trl"):
        registry.check_engine("tin")


def maker(folder: Path, changes: dict[str, Any]) -> Any:
    def make(more: dict[str, object], _: Path | None) -> Any:
        plain = {key: value for key, value in more.items() if not key.startswith("compute.parallelism.")}
        return make_work(folder, {**changes, **plain})

    return make


pytestmark = NEEDS_TORCH


def test_wrong_calls_are_refused(tmp_path: Path) -> None:
    make = maker(tmp_path, SMALL)
    with pytest.raises(CallError, match="no engine `trel`"):
        prove_engines(make, ["torch", "trel"], steps=2, tell=lambda _: None)
    with pytest.raises(CallError, match="at least 1"):
        prove_engines(make, None, steps=0, tell=lambda _: None)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_torch_and_trl_do_the_same(objective: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    made = {"sft": {"method.kind": "qlora"}, "dpo": {"objective.kind": "dpo", "optim.learning_rate": 1e-3}}
    told: list[str] = []
    make = maker(tmp_path, {**SMALL, **made[objective]})
    found = prove_engines(make, ["torch", "trl"], steps=3, tell=told.append)
    assert told == ["3 steps on torch", "3 steps on trl"]
    assert found.holds
    assert found.steps == 3
    (other,) = found.others
    assert 0 < other.difference < 1e-5
    assert other.trace.token_hash == found.first.token_hash
    check_equivalence(found)


@pytest.mark.slow
def test_an_engine_that_trains_other_tokens_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    from luthier.training.trl.start import import_libraries

    import_libraries()
    from luthier.training.trl import job

    build = job.build_imitation

    def with_prompts(items: Any) -> Any:
        rows = build(items)
        rows["labels"][rows["attention_mask"] == 1] = rows["input_ids"][rows["attention_mask"] == 1]
        return rows

    monkeypatch.setattr(job, "build_imitation", with_prompts)
    found = prove_engines(maker(tmp_path, SMALL), ["torch", "trl"], steps=1, tell=lambda _: None)
    assert not found.holds
    with pytest.raises(ProofError, match="trl does not do what torch does: the trained tokens are not the same; the l"):
        check_equivalence(found)


@pytest.mark.slow
def test_an_engine_that_cannot_train_the_spec_is_left_out(tmp_path: Path) -> None:
    make = maker(tmp_path, {**SMALL, "objective.kind": "orpo"})
    with pytest.raises(ProofError, match=r"1 could be asked \(trl: cannot train this spec: `objective.kind` is beyond"):
        prove_engines(make, ["torch", "trl"], steps=1, tell=lambda _: None)
    make = maker(tmp_path, {**SMALL, "method.kind": "qlora"})
    with pytest.raises(ProofError, match=r"1 could be asked \(mlx: holds a base in 4 bits of its own"):
        prove_engines(make, ["torch", "mlx"], steps=1, tell=lambda _: None)


@pytest.mark.slow
def test_torch_and_mlx_do_the_same(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    found = prove_engines(maker(tmp_path, SMALL), ["torch", "mlx"], steps=2, tell=lambda _: None)
    (other,) = found.others
    assert 0 < other.difference < 1e-4
    assert found.holds
