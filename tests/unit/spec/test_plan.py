"""A plan written as YAML reads back as the same spec, whatever is in it, and its hash holds what decides the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from pydantic import ValidationError

from luthier.spec.load import load_spec, load_spec_text
from luthier.spec.plan import Decision, Memory, RunPlan, absolute_paths, render_plan_yaml
from luthier.spec.run import RunSpec, find_contradictions
from tests.unit.spec.specs import spec_tables


def make_plan(spec: RunSpec, *decisions: Decision) -> RunPlan:
    return RunPlan(
        spec=spec,
        decisions=decisions,
        steps=10,
        train_examples=160,
        stream_end=160,
        tokens_per_epoch=1000,
        trained_tokens_per_epoch=500,
        total_parameters=2000,
        trainable_parameters=100,
        memory=Memory({"weights": 100, "overhead": 50}, 1000, "cpu"),
        seconds=3.5,
        device="cpu",
    )


def make_spec(**tables: Any) -> RunSpec:
    return RunSpec.model_validate({"model": {"base": "practice"}, **tables})


@given(spec_tables())
def test_the_written_plan_loads_to_an_equal_spec(tables: dict[str, Any]) -> None:
    try:
        spec = absolute_paths(RunSpec.model_validate(tables), Path.cwd())
    except (ValidationError, ValueError, RuntimeError):
        return
    if find_contradictions(spec):
        return
    text = render_plan_yaml(make_plan(spec, Decision("method.targets", ["q\n", "\x00", "é"], "why")))
    assert load_spec_text(text, "yaml", name="finetune_config.yaml", base_dir=Path.cwd()).spec == spec


@pytest.mark.parametrize("text", ["2e-4", "1e5", "yes", "null", "~x", "3", "2026-11-20", "a: b", "# no", "- x", "="])
def test_text_that_looks_like_something_else_stays_text(text: str, tmp_path: Path) -> None:
    spec = make_spec(about={"title": text}, data={"group_by": text}, method={"kind": "lora", "targets": [text, text]})
    path = tmp_path / "finetune_config.yaml"
    path.write_text(render_plan_yaml(make_plan(spec)))
    assert load_spec(path).spec == spec


def test_decisions_stand_above_the_spec() -> None:
    text = render_plan_yaml(make_plan(make_spec(), Decision("optim.learning_rate", 2e-4, "the default of lora")))
    lines = text.split("\n")
    assert lines[1] == "# optim.learning_rate = 0.0002: the default of lora"
    assert lines[2] == ""


def test_the_hash_is_of_what_decides_the_result() -> None:
    plan = make_plan(make_spec())
    assert plan.hash() == make_plan(make_spec(about={"title": "x"}, output={"dir": "elsewhere"})).hash()
    assert plan.hash() != make_plan(make_spec(seed=1)).hash()
    assert plan.hash() != make_plan(make_spec(optim={"batch": 8})).hash()
    assert len(plan.hash()) == 64


def test_paths_mean_the_same_from_any_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "practice").mkdir()
    spec = absolute_paths(make_spec(data={"train": "rows.jsonl", "valid": "held.jsonl"}), tmp_path)
    assert (spec.data.train, spec.data.valid) == (str(tmp_path / "rows.jsonl"), str(tmp_path / "held.jsonl"))
    assert spec.model.base == "practice"
    assert absolute_paths(make_spec(model={"base": "mine"}), tmp_path).model.base == str(tmp_path / "mine")
    assert absolute_paths(make_spec(model={"base": "org/name"}), tmp_path).model.base == "org/name"
    assert absolute_paths(make_spec(data={"train": "hf:org/x:train"}), tmp_path).data.train == "hf:org/x:train"


def test_memory_fits_or_not() -> None:
    memory = Memory({"weights": 100, "overhead": 50}, 300, "cpu", correction=1.5)
    assert memory.total_bytes == 225
    assert memory.fits
    assert not Memory({"weights": 301}, 300, "cpu").fits


def test_the_plan_as_json_says_the_share_of_a_process() -> None:
    shown = make_plan(make_spec(compute={"processes": 2})).as_dict()
    assert shown["batch_per_process"] == 8
    assert shown["memory"]["fits"] is True


def test_examples_and_tokens_of_a_micro_batch_are_not_both_given() -> None:
    spec = make_spec(optim={"micro_batch": 2}, compute={"micro_batch_tokens": 100})
    assert [path for path, _ in find_contradictions(spec)] == ["compute.micro_batch_tokens"]
