"""A Synth client's payload means what its TOML means; what does not agree in it is refused with the numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import MissingGpuTypeError, SpecError
from luthier.spec.dialects.job_request import JobRequest
from luthier.spec.dialects.synth_wire import build_job
from luthier.spec.load import load_spec
from luthier.spec.run import RunSpec, find_contradictions

SEED = Path(__file__).parents[2] / "data" / "synth_seed_001.toml"
# What synth-ai 0.2.10 sends for that seed, with a validation file.
PAYLOAD: dict[str, Any] = {
    "model": "Qwen/Qwen3-4B",
    "hyperparameters": {
        "n_epochs": 1,
        "per_device_batch": 1,
        "gradient_accumulation_steps": 64,
        "sequence_length": 4096,
        "learning_rate": 5e-06,
        "warmup_ratio": 0.03,
        "evaluation_strategy": "steps",
        "eval_steps": 20,
        "save_best_model_at_end": True,
        "metric_for_best_model": "val.loss",
        "greater_is_better": False,
    },
    "training_type": "sft_offline",
    "metadata": {
        "effective_config": {
            "compute": {"gpu_type": "H100", "gpu_count": 1, "nodes": 1},
            "data": {"topology": {}, "validation_files": ["file_000002"]},
            "training": {"mode": "sft_offline", "use_qlora": True, "validation": {"enabled": True}},
        }
    },
    "training_file_id": "file_000001",
}


def changed(path: str, value: object) -> dict[str, Any]:
    """The payload with one key set, or taken out."""
    payload = copy.deepcopy(PAYLOAD)
    *parents, last = path.split(".")
    table = payload
    for parent in parents:
        table = table.setdefault(parent, {})
    if value is None:
        table.pop(last, None)
    else:
        table[last] = value
    return payload


def build(payload: dict[str, Any], *, needs_gpu_type: bool = True) -> JobRequest:
    """What is asked for; the tables make a spec without contradictions."""
    job = build_job(payload, needs_gpu_type=needs_gpu_type)
    spec = RunSpec.model_validate(job.tables)
    assert find_contradictions(spec) == []
    return job


CONFIG = "metadata.effective_config"


def test_the_payload_of_the_seed_is_the_spec_of_its_toml() -> None:
    payload = changed(f"{CONFIG}.data.validation_files", None)
    assert RunSpec.model_validate(build(payload).tables) == load_spec(SEED).spec


def test_files_are_named_beside_the_tables() -> None:
    job = build(PAYLOAD)
    assert (job.training_file, job.validation_file) == ("file_000001", "file_000002")
    assert job.tables["data"] == {"max_length": 4096}


@pytest.mark.parametrize(
    ("path", "value"),
    [("validation_file", "file_000002"), (f"{CONFIG}.data.validation_files", ["file_000002", "file_000002"])],
)
def test_the_validation_file_is_found_wherever_it_stands(path: str, value: object) -> None:
    assert build(changed(path, value)).validation_file == "file_000002"


def test_two_validation_files_are_refused() -> None:
    with pytest.raises(SpecError, match="several validation files"):
        build(changed("validation_file", "file_000003"))


def test_a_job_without_a_kind_of_accelerator_is_refused_by_its_code() -> None:
    payload = changed(f"{CONFIG}.compute.gpu_type", None)
    with pytest.raises(MissingGpuTypeError, match="missing_gpu_type") as caught:
        build(payload)
    assert caught.value.code == "missing_gpu_type"
    assert "gpu_type" in caught.value.hint
    assert build(payload, needs_gpu_type=False).tables["compute"] == {"gpu_count": 1, "nodes": 1}
    with pytest.raises(MissingGpuTypeError):
        build(changed("metadata", None))


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        (PAYLOAD, "qlora"),
        (changed(f"{CONFIG}.training.use_qlora", False), "full"),
        (changed(f"{CONFIG}.training.use_qlora", None), "full"),
        (changed("hyperparameters.train_kind", "peft") | {"metadata": {}}, "lora"),
        (changed("training_type", "qft") | {"metadata": {}}, "qlora"),
        (changed("training_type", "fft") | {"metadata": {}}, "full"),
    ],
)
def test_how_the_method_is_told(payload: dict[str, Any], kind: str) -> None:
    assert build(payload, needs_gpu_type=False).tables["method"]["kind"] == kind


@pytest.mark.parametrize(
    ("compute", "topology", "parallelism", "numbers"),
    [
        ({"gpu_count": 2, "nodes": 1}, {"container_count": 4}, {}, ("container_count` is 4", "nodes` is 1")),
        ({"gpu_count": 2}, {}, {"tensor_parallel_size": 4}, ("tensor_parallel_size` is 4", "has 2")),
        (
            {"gpu_count": 4, "nodes": 1},
            {},
            {"tensor_parallel_size": 2, "pipeline_parallel_size": 3},
            ("2 x `pipeline_parallel_size` 3 = 6", "`gpu_count` 4 x `nodes` 1 = 4"),
        ),
        ({"gpu_count": 0}, {}, {}, ("gpu_count`: expected a whole number of at least 1, found 0",)),
        ({"gpu_count": True}, {}, {}, ("found True",)),
        ({"gpu_count": 1}, {"container_count": "two"}, {}, ("found 'two'",)),
    ],
)
def test_sizes_that_do_not_agree_are_refused_with_the_numbers(
    compute: dict[str, Any], topology: dict[str, Any], parallelism: dict[str, Any], numbers: tuple[str, ...]
) -> None:
    payload = changed(f"{CONFIG}.compute", {"gpu_type": "H100", **compute})
    payload["metadata"]["effective_config"]["data"]["topology"] = topology
    payload["hyperparameters"]["parallelism"] = parallelism
    with pytest.raises(SpecError) as caught:
        build(payload)
    for number in numbers:
        assert number in caught.value.message


def test_sizes_that_agree_give_each_accelerator_a_process() -> None:
    payload = changed(f"{CONFIG}.compute", {"gpu_type": "H100", "gpu_count": 4, "nodes": 2})
    payload["metadata"]["effective_config"]["data"]["topology"] = {"container_count": 2, "zone": "a"}
    payload["hyperparameters"]["parallelism"] = {"tensor_parallel_size": 2, "use_deepspeed": True, "bf16": True}
    job = build(payload)
    parallelism = payload["hyperparameters"]["parallelism"]
    sizes = {"gpu_type": "H100", "gpu_count": 4, "nodes": 2, "processes": 4}
    assert job.tables["compute"] == {**sizes, "parallelism": parallelism}
    assert "zone" in " ".join(job.notes)


def test_what_stands_beside_the_effective_config_is_the_metadata_of_the_job() -> None:
    payload = changed("metadata.team", "crafter")
    payload["metadata"]["attempt"] = 3
    assert build(payload).metadata == {"team": "crafter", "attempt": "3"}


def test_an_unknown_hyperparameter_is_refused_and_an_unknown_key_of_the_request_noted() -> None:
    with pytest.raises(SpecError, match=r"hyperparameters\.n_epoch"):
        build(changed("hyperparameters.n_epoch", 3))
    assert "`integrations` is not understood" in " ".join(build(changed("integrations", {"wandb": {}})).notes)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("model", None, "`model`: expected text"),
        ("training_file_id", None, "`training_file`: expected text"),
        ("hyperparameters", [1], "`hyperparameters`: expected an object"),
        ("metadata", {"effective_config": "all"}, "`metadata.effective_config`: expected an object"),
        ("training_type", "rl", "`training_type` is 'rl'"),
        (f"{CONFIG}.data.validation_files", "file_1", "expected a list"),
        (f"{CONFIG}.training.use_qlora", "yes", "`training.use_qlora`: expected true or false"),
        ("suffix", 7, "`suffix`"),
    ],
)
def test_a_part_that_cannot_be_read_is_named(path: str, value: object, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        build(changed(path, value))
    assert said in caught.value.message


def test_steps_may_be_given_instead_of_passes() -> None:
    assert build(changed("hyperparameters.total_steps", 30)).tables["optim"]["steps"] == 30


def test_one_file_of_validation_is_measured_even_where_nothing_says_so() -> None:
    payload = {
        "model": "practice",
        "training_file": "file_1",
        "validation_file": "file_2",
        "hyperparameters": {"n_epochs": 1},
    }
    job = build(payload, needs_gpu_type=False)
    assert (job.training_file, job.validation_file) == ("file_1", "file_2")
    assert "valid" not in job.tables["data"]
    assert build({**payload, "validation_file": None}, needs_gpu_type=False).tables["data"]["valid"] == 0
