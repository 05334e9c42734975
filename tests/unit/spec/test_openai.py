"""OpenAI's request for a job: what it means here, what `auto` decides, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.errors import SpecError, UnsupportedError
from luthier.spec.dialects.job_request import JobRequest
from luthier.spec.dialects.openai import build_job, choose_batch, choose_epochs
from luthier.spec.run import RunSpec, find_contradictions

REQUEST: dict[str, Any] = {"model": "Qwen/Qwen3-0.6B", "training_file": "file-1"}


def build(rows: int = 100, **keys: Any) -> tuple[JobRequest, RunSpec]:
    """What is asked for, and the spec of its tables."""
    job = build_job({**REQUEST, **keys}, rows=rows)
    spec = RunSpec.model_validate(job.tables)
    assert find_contradictions(spec) == []
    return job, spec


def supervised(**hyperparameters: Any) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


def dpo(**hyperparameters: Any) -> dict[str, Any]:
    return {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}


def test_the_least_request_trains_an_adapter_and_holds_out_nothing() -> None:
    job, spec = build()
    assert (spec.model.base, spec.method.kind, spec.objective.kind) == ("Qwen/Qwen3-0.6B", "qlora", "sft")
    assert (spec.data.valid, spec.evaluate.every_steps, spec.optim.learning_rate) == (0, 0, None)
    assert (job.training_file, job.validation_file, job.suffix, job.metadata) == ("file-1", None, None, {})


def test_hyperparameters_of_the_method() -> None:
    _, spec = build(method=supervised(n_epochs=2, batch_size=8, learning_rate_multiplier=0.5))
    assert (spec.optim.epochs, spec.optim.batch, spec.optim.learning_rate) == (2.0, 8, 1e-4)


def test_dpo_has_beta_and_a_tenth_of_the_rate() -> None:
    _, spec = build(method=dpo(n_epochs=1, batch_size=4, learning_rate_multiplier=2, beta=0.3))
    assert (spec.objective.kind, getattr(spec.objective, "beta", None)) == ("dpo", 0.3)
    assert spec.optim.learning_rate == pytest.approx(4e-5)


def test_auto_is_decided_by_the_rows_and_noted() -> None:
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    job, spec = build(method=supervised(**auto))
    assert (spec.optim.epochs, spec.optim.batch, spec.optim.learning_rate) == (3.0, 2, None)
    assert job.notes == ["`n_epochs` is 3 for 100 rows", "`batch_size` is 2 for 100 rows"]
    assert job.tables == build()[0].tables


@pytest.mark.parametrize(
    ("rows", "epochs"), [(1, 25), (10, 10), (33, 3), (34, 3), (8_333, 3), (10_000, 2), (25_001, 1), (10**9, 1)]
)
def test_how_many_passes_auto_means(rows: int, epochs: int) -> None:
    assert choose_epochs(rows) == epochs


@pytest.mark.parametrize(("rows", "batch"), [(0, 1), (10, 1), (63, 1), (64, 2), (511, 8), (512, 16), (10**6, 16)])
def test_how_large_a_step_auto_means(rows: int, batch: int) -> None:
    assert choose_batch(rows) == batch


def test_the_deprecated_place_counts_where_the_method_says_nothing() -> None:
    job, spec = build(hyperparameters={"n_epochs": 4, "batch_size": 2}, method=supervised(n_epochs=1))
    assert (spec.optim.epochs, spec.optim.batch) == (1.0, 2)
    assert [note for note in job.notes if "hyperparameters.n_epochs = 4" in note]


def test_a_checkpoint_after_each_pass_and_the_validation_file_with_it() -> None:
    job, spec = build(method=supervised(batch_size=8), validation_file="file-2")
    assert job.validation_file == "file-2"
    assert (spec.output.save_every_steps, spec.evaluate.every_steps) == (13, 13)
    assert "valid" not in job.tables["data"]


def test_seed_suffix_and_metadata() -> None:
    job, spec = build(seed=7, suffix="Support bot: v2", metadata={"team": "a"})
    assert (spec.seed, job.suffix, job.metadata) == (7, "Support-bot-v2", {"team": "a"})


def test_keys_of_ours_in_the_extra_body() -> None:
    job, spec = build(
        compute={"gpu_type": "H100", "gpu_count": 2},
        training={
            "method": {"kind": "lora", "rank": 8},
            "data": {"max_length": 512, "valid": 0.1},
            "optim": {"batch": 4, "steps": 20},
            "output": {"save_every_steps": 5},
        },
    )
    assert (spec.method.kind, getattr(spec.method, "rank", None), spec.data.max_length) == ("lora", 8, 512)
    assert (spec.optim.batch, spec.optim.steps, spec.output.save_every_steps) == (4, 20, 5)
    assert (spec.compute.gpu_type, spec.compute.processes, spec.evaluate.every_steps) == ("H100", 2, 25)
    assert job.notes == []


@pytest.mark.parametrize(("training", "kind"), [({"method": "full"}, "full"), ({"use_qlora": False}, "lora")])
def test_the_method_in_short(training: dict[str, Any], kind: str) -> None:
    assert build(training=training)[1].method.kind == kind


@pytest.mark.parametrize(
    ("keys", "said", "where"),
    [
        ({"sead": 1}, "unknown keys: `sead`", "sead"),
        ({"method": {"type": "grpo"}}, "`method.type` is 'grpo'", "method.type"),
        ({"method": {"type": "dpo", "beta": 1}}, "`method.beta`", "method.beta"),
        ({"method": supervised(beta=1)}, "supervised.hyperparameters.beta", "method.supervised.hyperparameters.beta"),
        ({"method": supervised(n_epochs="three")}, "`n_epochs`: expected", "n_epochs"),
        ({"hyperparameters": {"epochs": 1}}, "`hyperparameters.epochs`", "hyperparameters.epochs"),
        ({"training": {"model": {"base": "/etc"}}}, "`training.model`", "training.model"),
        ({"training": {"data": {"train": "/etc/passwd"}}}, "decided by the server", "training.data.train"),
        ({"training": {"data": {"valid": "/etc/passwd"}}}, "a share or a count", "training.data.valid"),
        ({"training": {"output": {"dir": "/tmp"}}}, "decided by the server", "training.output.dir"),
        ({"training": {"output": {"model_id_file": "x"}}}, "decided by the server", "training.output.model_id_file"),
        ({"training": {"optim": 1}}, "`training.optim`: expected an object", "training.optim"),
        (
            {"training": {"optim": {"batch": 2}}, "method": supervised(batch_size=4)},
            "keep one of them",
            "training.optim.batch",
        ),
        ({"suffix": "x" * 65}, "at most 64 letters", "suffix"),
        ({"metadata": ["a"]}, "`metadata`: expected an object", "metadata"),
        ({"model": ""}, "`model`: expected text", "model"),
        ({"validation_file": 3}, "`validation_file`: expected text", "validation_file"),
    ],
)
def test_what_is_refused_is_named(keys: dict[str, Any], said: str, where: str) -> None:
    with pytest.raises(SpecError) as caught:
        build_job({**REQUEST, **keys}, rows=10)
    assert said in caught.value.message
    assert caught.value.where == where


def test_reinforcement_is_not_offered() -> None:
    with pytest.raises(UnsupportedError, match="reinforcement"):
        build(method={"type": "reinforcement"})


def test_integrations_are_noted() -> None:
    job, _ = build(integrations=[{"type": "wandb", "wandb": {"project": "p"}}])
    assert [note for note in job.notes if "integrations" in note]
