"""`[compute.parallelism]` in a plan: each key acts, is noted with its reason, or is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import UnsupportedError
from luthier.machine import Machine
from luthier.spec.plan import RunPlan
from luthier.training.planner import build_plan
from tests.unit.training.plans import CPU, GPU, llama, make_spec, write_prepared

OLD_GPU = replace(GPU, has_bf16=False)


def plan_of(
    folder: Path, parallelism: dict[str, Any], machine: Machine = CPU, *, engine: str = "torch", **compute: Any
) -> RunPlan:
    prepared = write_prepared(folder / "prepared", [100] * 20, [50])
    tables = {"engine": {"kind": engine}, "compute": {**compute, "parallelism": parallelism}}
    return build_plan(make_spec({"kind": "qlora"}, **tables), prepared, llama(), machine)


def decided(plan: RunPlan) -> dict[str, object]:
    return {each.key: each.value for each in plan.decisions}


@pytest.mark.parametrize("engine", ["torch", "trl"])
def test_formats_and_recomputation_act(engine: str, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {"bf16": True, "activation_checkpointing": True}, OLD_GPU, engine=engine)
    assert (plan.spec.compute.precision, plan.spec.compute.recompute) == ("bf16", "always")
    reasons = {each.key: each.reason for each in plan.decisions}
    assert reasons["compute.precision"] == "compute.parallelism.bf16 is true"
    assert reasons["compute.recompute"] == "compute.parallelism.activation_checkpointing is true"
    other = plan_of(tmp_path, {"bf16": False, "activation_checkpointing": False}, engine=engine)
    assert (other.spec.compute.precision, other.spec.compute.recompute) == ("fp32", "never")


def test_fp16_acts_where_it_can(tmp_path: Path) -> None:
    assert plan_of(tmp_path, {"fp16": True}, GPU).spec.compute.precision == "fp16"
    assert plan_of(tmp_path, {}, OLD_GPU).spec.compute.precision == "fp16"
    assert plan_of(tmp_path, {}, OLD_GPU, engine="trl").spec.compute.precision == "fp32"


SHARDING = {"use_deepspeed": True, "deepspeed_stage": 3, "fsdp": "full_shard", "tensor_parallel_size": 2}


def test_sharding_is_noted_on_one_device_and_refused_over_several(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {**SHARDING, "pipeline_parallel_size": 1})
    assert SHARDING.items() <= {key.rpartition(".")[2]: value for key, value in decided(plan).items()}.items()
    assert "compute.parallelism.pipeline_parallel_size" not in decided(plan)
    for key, value in SHARDING.items():
        with pytest.raises(UnsupportedError, match=rf"^compute\.parallelism\.{key}: engine `torch` does not share"):
            plan_of(tmp_path, {key: value}, processes=2)
    off = {"use_deepspeed": False, "deepspeed_stage": 0, "fsdp": False, "tensor_parallel_size": 1}
    assert plan_of(tmp_path, off, processes=2).spec.compute.processes == 2


def test_a_plan_stands_as_its_own_spec(tmp_path: Path) -> None:
    """What was decided does not contradict what was asked when the plan is run again."""
    from luthier.spec.load import load_spec
    from luthier.spec.plan import render_plan_yaml

    plan = plan_of(tmp_path, {**SHARDING, "bf16": False, "activation_checkpointing": True})
    path = tmp_path / "plan.yaml"
    path.write_text(render_plan_yaml(plan))
    assert load_spec(path).spec == plan.spec


def test_trl_pads_and_says_so_and_keeps_four_bits(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {}, engine="trl")
    assert not plan.keeps_dequantised
    assert plan_of(tmp_path, {}).keeps_dequantised
    assert decided(plan)["engine.kind"] == "trl"
    with pytest.raises(UnsupportedError, match="over processes on a CPU only"):
        plan_of(tmp_path, {}, replace(GPU, device_count=2), engine="trl", processes=2)
