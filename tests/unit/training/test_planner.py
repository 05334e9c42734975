"""The plan decides what is left open, says why, and refuses with numbers what cannot fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from luthier.data.prepared import Prepared
from luthier.errors import LuthierError, PlanError, SpecError, UnsupportedError
from luthier.machine import Machine
from luthier.spec.load import load_spec
from luthier.spec.plan import RunPlan, render_plan_yaml
from luthier.training import planner
from luthier.training.memory import remember_correction, remember_speed
from luthier.training.planner import build_plan, count_trainable, plan_run
from luthier.weights.tensors import TensorInfo
from tests.unit.training.plans import CPU, GIB, GPU, METAL, llama, make_spec, with_free, write_prepared

MODEL = llama()
TARGETS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
LORA = {"kind": "lora"}
Build = Callable[..., RunPlan]


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    return write_prepared(tmp_path / "prepared", [100] * 90 + [300] * 10, [50, 350])


@pytest.fixture
def build(prepared: Prepared) -> Build:
    def made(method: dict[str, Any] | None = None, machine: Machine = CPU, **tables: Any) -> RunPlan:
        return build_plan(make_spec(method, **tables), prepared, MODEL, machine)

    return made


def reasons(plan: RunPlan) -> dict[str, str]:
    return {each.key: each.reason for each in plan.decisions}


def test_nothing_is_left_to_decide(build: Build, tmp_path: Path) -> None:
    plan = build()
    spec = plan.spec
    assert spec.method.kind == "full"
    assert (spec.optim.learning_rate, spec.optim.warmup_steps, spec.optim.warmup_ratio) == (2e-5, 1, None)
    assert (spec.compute.precision, spec.compute.recompute) == ("bf16", "never")
    assert spec.compute.micro_batch_tokens == 4096
    assert {each.key for each in plan.decisions} == {
        "method.kind",
        "optim.learning_rate",
        "optim.warmup_steps",
        "compute.precision",
        "compute.recompute",
        "compute.micro_batch_tokens",
    }
    path = tmp_path / "finetune_config.yaml"
    path.write_text(render_plan_yaml(plan))
    assert load_spec(path).spec == spec


@pytest.mark.parametrize("method", [None, LORA, {"kind": "qlora", "last_layers": 3}, {"kind": "full"}])
def test_a_plan_planned_again_is_the_same_plan(method: dict[str, Any] | None, build: Build, prepared: Prepared) -> None:
    plan = build(method)
    again = build_plan(plan.spec, prepared, MODEL, CPU)
    assert again.decisions == ()
    assert replace(again, decisions=plan.decisions) == plan
    assert again.hash() == plan.hash()


def test_the_size_of_the_run(build: Build) -> None:
    plan = build(LORA, optim={"epochs": 1.5, "batch": 16})
    assert (plan.steps, plan.stream_end, plan.train_examples) == (10, 150, 100)
    assert (plan.tokens_per_epoch, plan.trained_tokens_per_epoch) == (12_000, 6_000)
    assert plan.spec.optim.steps == 0
    plan = build(LORA, optim={"steps": 7})
    assert (plan.steps, plan.stream_end) == (7, None)
    assert build(LORA, optim={"epochs": 1e-6}).stream_end == 1


def test_auto_is_full_only_where_it_fits_comfortably(build: Build) -> None:
    needed = build({"kind": "full"}).memory.total_bytes / GIB
    roomy, tight = build(machine=with_free(CPU, 2.1 * needed)), build(machine=with_free(CPU, 1.1 * needed))
    assert roomy.spec.method.kind == "full"
    assert "less than half" in reasons(roomy)["method.kind"]
    assert tight.spec.method.kind == "qlora"
    assert "training every weight takes at least" in reasons(tight)["method.kind"]


def test_auto_is_qlora_when_a_key_of_an_adapter_is_set(build: Build) -> None:
    plan = build({"kind": "auto", "rank": 8, "last_layers": 2})
    assert plan.spec.method.model_dump() == {
        "kind": "qlora",
        "rank": 8,
        "alpha": 32.0,
        "dropout": 0.05,
        "rslora": False,
        "targets": TARGETS,
        "last_layers": 2,
        "also_train": [],
        "double_quant": True,
        "bits": 4,
    }
    assert "last_layers, rank" in reasons(plan)["method.kind"]


def test_auto_on_tinker_is_lora(build: Build) -> None:
    assert build(engine={"kind": "tinker"}).spec.method.kind == "lora"


@pytest.mark.parametrize(
    ("method", "objective", "rate"),
    [("full", "sft", 2e-5), ("lora", "pretrain", 2e-4), ("qlora", "dpo", 2e-5), ("full", "orpo", 2e-6)],
)
def test_the_learning_rate_follows_method_and_objective(method: str, objective: str, rate: float, build: Build) -> None:
    plan = build({"kind": method}, objective={"kind": objective})
    assert plan.spec.optim.learning_rate == pytest.approx(rate)
    assert build({"kind": method}, optim={"learning_rate": 0.5}).spec.optim.learning_rate == 0.5


@pytest.mark.parametrize(
    ("given", "steps", "expected"),
    [({}, 100, 3), ({"warmup_ratio": 0.07}, 100, 7), ({"warmup_ratio": 0.0}, 100, 0), ({"warmup_steps": 9}, 100, 9)],
)
def test_warm_up_becomes_steps(given: dict[str, Any], steps: int, expected: int, build: Build) -> None:
    optim = build(LORA, optim={**given, "steps": steps}).spec.optim
    assert (optim.warmup_steps, optim.warmup_ratio) == (expected, None)


@pytest.mark.parametrize(
    ("machine", "precision"),
    [(CPU, "bf16"), (replace(CPU, has_bf16=False), "fp32"), (GPU, "bf16"), (replace(GPU, has_bf16=False), "fp16")],
)
def test_precision_follows_the_machine(machine: Machine, precision: str, build: Build) -> None:
    assert build(LORA, machine).spec.compute.precision == precision


def test_fp16_on_a_cpu_is_refused(build: Build) -> None:
    with pytest.raises(UnsupportedError, match="fp16 on a CPU"):
        build(LORA, compute={"precision": "fp16"})


def test_micro_batches_shrink_before_anything_is_computed_twice(build: Build) -> None:
    lora = build(LORA).memory.items
    fixed = sum(lora.values()) - lora["activations"]
    budgets = []
    for share in (1.05, 0.6, 0.25, 0.12):
        free = (fixed + share * lora["activations"]) / 0.9 / GIB
        compute = build(LORA, with_free(CPU, free)).spec.compute
        budgets.append((compute.micro_batch_tokens, compute.recompute))
    # The 16 longest examples have 3,600 tokens, so a step is never more at once; the longest of all has 350.
    assert budgets == [(4096, "never"), (2048, "never"), (512, "never"), (350, "never")]
    plan = build(LORA, with_free(CPU, (fixed + 0.05 * lora["activations"]) / 0.9 / GIB))
    assert plan.spec.compute.recompute == "always"
    assert "would not fit" in reasons(plan)["compute.recompute"]


def test_what_is_given_is_kept(build: Build) -> None:
    plan = build(LORA, optim={"micro_batch": 2}, compute={"recompute": "always"})
    assert plan.spec.compute.micro_batch_tokens is None
    assert plan.spec.compute.recompute == "always"
    assert "compute.micro_batch_tokens" not in reasons(plan)
    more = build(LORA, optim={"micro_batch": 4}, compute={"recompute": "always"})
    assert more.memory.items["activations"] > plan.memory.items["activations"]
    assert build(LORA, compute={"micro_batch_tokens": 10}).spec.compute.micro_batch_tokens == 10


def test_a_4_bit_base_is_held_dequantised_where_memory_allows(build: Build) -> None:
    roomy = build({"kind": "qlora"})
    assert roomy.keeps_dequantised
    tight = build({"kind": "qlora"}, with_free(CPU, 1.9))
    assert not tight.keeps_dequantised
    assert tight.memory.items["weights"] < roomy.memory.items["weights"]


def test_what_does_not_fit_is_refused_with_numbers_and_a_way_out(build: Build) -> None:
    with pytest.raises(PlanError) as caught:
        build({"kind": "full"}, with_free(CPU, 4))
    error = caught.value
    assert error.code == "plan_does_not_fit"
    assert "full training of org/name takes at least" in error.message
    assert "weights 1.0, gradients 2.0, optimizer 6.0" in error.message
    assert "4.0 GiB are free on Quick 9000" in error.message
    assert 'method.kind = "qlora" takes' in error.hint
    assert isinstance(error.details, dict)
    assert error.details["items"]["optimizer"] > 5 * GIB


@pytest.mark.parametrize(
    ("tables", "hint"),
    [
        ({"compute": {"recompute": "never"}}, 'compute.recompute = "auto" takes'),
        ({"optim": {"micro_batch": 16}, "compute": {"recompute": "never"}}, "no optim.micro_batch takes"),
        ({"compute": {"micro_batch_tokens": 4000, "recompute": "never"}}, "no compute.micro_batch_tokens takes"),
        ({"compute": {"processes": 4}}, "compute.processes = 1 takes"),
        ({}, "take a smaller base model"),
    ],
)
def test_the_ways_out(tables: dict[str, Any], hint: str, build: Build) -> None:
    with pytest.raises(PlanError) as caught:
        build({"kind": "qlora"}, with_free(CPU, 0.9), **tables)
    assert hint in caught.value.hint


def test_processes_on_a_cpu_need_memory_for_each(build: Build) -> None:
    two = build(LORA, compute={"processes": 2})
    assert two.memory.items["weights"] == 2 * build(LORA).memory.items["weights"]
    with pytest.raises(PlanError, match="in 8 processes"):
        build({"kind": "full"}, compute={"processes": 8})


def test_each_process_needs_a_device_and_an_example(build: Build) -> None:
    with pytest.raises(PlanError, match=r"compute\.processes is 2, and this machine has 1 x NVIDIA H200"):
        build(LORA, GPU, compute={"processes": 2})
    with pytest.raises(SpecError, match="a step has 1 examples"):
        build(LORA, optim={"batch": 1}, compute={"processes": 2})
    assert build(LORA, replace(GPU, device_count=2), compute={"processes": 2}).device == "cuda"


def test_a_pair_is_one_example_of_both_its_sequences(tmp_path: Path) -> None:
    prepared = write_prepared(tmp_path / "pairs", [3000, 5001], pairs=True)
    plan = build_plan(make_spec(LORA, objective={"kind": "dpo"}), prepared, MODEL, CPU)
    assert plan.spec.compute.micro_batch_tokens == 5001
    assert plan.train_examples == 2
    assert plan.tokens_per_epoch == 8001


def test_what_runs_took_before_counts(prepared: Prepared, tmp_path: Path) -> None:
    spec = make_spec(LORA)
    plain = build_plan(spec, prepared, MODEL, CPU, tmp_path)
    remember_correction(tmp_path, plain.memory_key, 100, 150)
    remember_speed(tmp_path, plain.speed_key, 1000.0)
    learnt = build_plan(spec, prepared, MODEL, CPU, tmp_path)
    assert learnt.memory.total_bytes == pytest.approx(1.5 * plain.memory.total_bytes, abs=2)
    assert learnt.seconds == pytest.approx((12_000 + 200) / 1000)
    assert build_plan(make_spec({"kind": "full"}), prepared, MODEL, CPU, tmp_path).memory.correction == 1.0


def test_time_grows_with_the_run(build: Build) -> None:
    def seconds(**tables: Any) -> float:
        found = build(LORA, **tables).seconds
        assert found is not None
        return found

    one = seconds()
    assert seconds(optim={"epochs": 10.0}) > 5 * one - 50
    assert seconds(optim={"epochs": 10.0}, evaluate={"every_steps": 1}) > seconds(optim={"epochs": 10.0})
    assert seconds(objective={"kind": "dpo"}) > seconds(objective={"kind": "simpo"})
    assert seconds(compute={"recompute": "always"}) > one


def count(model: Any = MODEL, **keys: Any) -> tuple[int, int]:
    method = make_spec({"kind": "lora", **keys}).method
    assert method.kind == "lora"
    found = count_trainable(method, model)
    return found.adapter, found.whole


def test_trainable_parameters() -> None:
    layer = 4 * 2 * 1024 + 3 * (1024 + 3072)
    assert count(rank=8) == (28 * 8 * layer, 0)
    assert count(rank=8, last_layers=2) == (2 * 8 * layer, 0)
    assert count(rank=8, last_layers=99) == (28 * 8 * layer, 0)
    assert count(rank=4, targets=["q_proj", "model.layers.0.mlp.up_proj"]) == (28 * 4 * 2048 + 4 * 4096, 0)
    assert count(rank=4, targets=["lm_head"]) == (4 * (151_936 + 1024), 0)
    assert count(rank=4, targets=["q_proj"], also_train=["embed_tokens"])[1] == 151_936 * 1024


@pytest.mark.parametrize(
    ("keys", "said", "hint"),
    [
        ({"targets": ["q_porj"]}, "no module `q_porj`", "did you mean `q_proj`?"),
        ({"targets": ["xyz"]}, "no module `xyz`", "known modules"),
        ({"targets": ["input_layernorm"]}, "`input_layernorm` is not a linear layer", "method.also_train"),
        ({"also_train": ["lm_haed"]}, "method.also_train: no module `lm_haed`", "did you mean `lm_head`?"),
        ({"targets": ["model.layers.0.mlp.up_proj"], "last_layers": 1}, "leaves none", ""),
    ],
)
def test_a_target_that_is_none_is_refused_by_name(keys: dict[str, Any], said: str, hint: str) -> None:
    with pytest.raises(LuthierError) as caught:
        count(**keys)
    assert said in caught.value.message
    assert hint in caught.value.hint


def test_experts_are_refused_by_name() -> None:
    model = replace(MODEL, expert_names=("model.layers.0.mlp.experts.gate_up_proj",))
    with pytest.raises(UnsupportedError, match="`gate_up_proj` is a parameter of mixture-of-experts layers"):
        count(model, targets=["gate_up_proj"])
    with pytest.raises(UnsupportedError, match="`experts` is a parameter"):
        count(model, targets=["experts"])


def test_a_model_without_linear_layers_has_no_auto_targets(prepared: Prepared) -> None:
    with pytest.raises(UnsupportedError, match="no linear layers to adapt"):
        build_plan(make_spec(LORA), prepared, replace(MODEL, linears={}), CPU)


def test_a_hub_model_is_planned_without_its_weights(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("ab" * 20)
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "tiny", "num_attention_heads": 1}')
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "far.safetensors"}}')
    asked = []

    def shapes(name: str, revision: str | None) -> dict[str, TensorInfo]:
        asked.append((name, revision))
        return {
            "model.embed_tokens.weight": TensorInfo("BF16", (10, 4)),
            "model.layers.0.mlp.up_proj.weight": TensorInfo("BF16", (8, 4)),
        }

    monkeypatch.setattr(planner, "fetch_shapes", shapes)
    plan = plan_run(make_spec(LORA), prepared, folder, tmp_path)
    assert asked == [("org/name", "ab" * 20)]
    assert plan.trainable_parameters == 16 * 12


def test_a_mac_s_memory_is_one_and_its_base_is_packed_there_alone(build: Build) -> None:
    """mlx_lm's quantiser: embeddings too, a scale and an offset of 16 bits for each 64 weights."""
    tables = {"engine": {"kind": "mlx"}}
    size = MODEL.total_parameters
    for bits in (4, 8):
        plan = build({"kind": "qlora", "bits": bits}, METAL, **tables)
        adapter = 4 * plan.trainable_parameters
        assert plan.memory.items["weights"] == round(size * (bits + 0.5) / 8) + adapter
        assert (plan.device, plan.keeps_dequantised) == ("metal", False)
        assert plan.spec.compute.micro_batch_tokens == 8192
        assert not plan.spec.method.double_quant
        assert "16 bits" in reasons(plan)["method.double_quant"]
    plain = build({"kind": "qlora"}, CPU, **tables)
    assert plain.keeps_dequantised
    assert plain.memory.items["weights"] == 2 * size + 4 * plain.trainable_parameters


def test_a_base_that_mlx_lm_quantised_is_of_its_engine_and_of_its_bits(prepared: Prepared) -> None:
    model, mlx = replace(MODEL, mlx_bits=8), {"engine": {"kind": "mlx"}}
    plan = build_plan(make_spec(None, **mlx), prepared, model, METAL)
    assert (plan.spec.method.kind, plan.spec.method.bits) == ("qlora", 8)
    assert reasons(plan)["method.bits"] == "as the base is quantised"
    with pytest.raises(UnsupportedError, match="quantised by mlx_lm to 8 bits"):
        build_plan(make_spec(None), prepared, model, CPU)
    for kind in ("lora", "full"):
        with pytest.raises(SpecError, match="wants the full ones"):
            build_plan(make_spec({"kind": kind}, **mlx), prepared, model, METAL)
    with pytest.raises(UnsupportedError, match="4 and 8"):
        build_plan(make_spec(None, **mlx), prepared, replace(MODEL, mlx_bits=3), METAL)
