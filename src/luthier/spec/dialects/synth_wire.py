"""The payload that Synth clients send to make a job: checked for itself, and brought into the form of their TOML.

`metadata.effective_config` carries the tables that the client does not flatten into `hyperparameters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from luthier.errors import MissingGpuTypeError, SpecError
from luthier.spec.dialects.job_request import (
    JobRequest,
    plain_suffix,
    read_metadata,
    read_name,
    read_table,
    share_among_processes,
)
from luthier.spec.dialects.synth import build_tables

_NAME = "the request"
_VALIDATION_KEYS = (
    "evaluation_strategy",
    "eval_steps",
    "save_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
)
_UNDERSTOOD = {
    "model",
    "hyperparameters",
    "training_type",
    "metadata",
    "training_file_id",
    "training_file",
    "validation_file",
    "validation_file_id",
    "suffix",
}
_KINDS_OF_TRAINING = ("sft", "fft", "qft", "qlora", "lora", "peft")
_USUAL = "sft_offline"
_WHERE_GPU_TYPE = "metadata.effective_config.compute.gpu_type"
EFFECTIVE_CONFIG = "effective_config"


def build_job(payload: Mapping[str, Any], *, needs_gpu_type: bool) -> JobRequest:
    """What a payload asks for; raises SpecError that says which part of it cannot be understood.

    `needs_gpu_type` is true for `/learning/jobs`, whose clients always name one.
    """
    metadata = read_table(payload, "metadata")
    config = read_table(metadata, EFFECTIVE_CONFIG, "metadata.")
    compute = read_table(config, "compute", "metadata.effective_config.")
    if needs_gpu_type and not compute.get("gpu_type"):
        raise MissingGpuTypeError(
            f"missing_gpu_type: `{_WHERE_GPU_TYPE}` is not set",
            hint='set gpu_type in the [compute] table of the job, for instance gpu_type = "H100"',
            where=_WHERE_GPU_TYPE,
        )
    _check_kind_of_training(payload)
    hyperparameters = read_table(payload, "hyperparameters")
    parallelism = read_table(hyperparameters, "parallelism", "hyperparameters.")
    data = read_table(config, "data", "metadata.effective_config.")
    topology = read_table(data, "topology", "metadata.effective_config.data.")
    check_sizes(compute, topology, parallelism)
    validation = _validation_file(payload, data)
    translated = build_tables(_as_toml(payload, hyperparameters, config, validation), _NAME)
    tables = _without_files(translated.tables)
    share_among_processes(tables)
    return JobRequest(
        tables=tables,
        training_file=_training_file(payload),
        validation_file=validation,
        suffix=plain_suffix(payload.get("suffix")),
        metadata=read_metadata({key: value for key, value in metadata.items() if key != EFFECTIVE_CONFIG}),
        notes=[*translated.notes, *_unread(payload, topology)],
    )


@dataclass(frozen=True)
class Asked:
    """The machines a job asks for."""

    gpu_count: int
    nodes: int

    @property
    def total(self) -> int:
        """All accelerators together."""
        return self.gpu_count * self.nodes


def check_sizes(compute: Mapping[str, Any], topology: Mapping[str, Any], parallelism: Mapping[str, Any]) -> Asked:
    """The machines asked for, if what is said of them in several places agrees; SpecError with the numbers if not."""
    count = _size(compute, "gpu_count", "compute.gpu_count")
    containers = _find_size(topology, "container_count", "data.topology.container_count")
    nodes = _find_size(compute, "nodes", "compute.nodes")
    if containers and nodes and containers != nodes:
        raise SpecError(
            f"`data.topology.container_count` is {containers}, and `compute.nodes` is {nodes}; one container runs on "
            f"each node",
            hint=f"set container_count = {nodes}, or leave it out",
            where="metadata.effective_config.data.topology.container_count",
        )
    asked = Asked(count, nodes or containers or 1)
    _check_parallel_sizes(asked, parallelism)
    return asked


def _check_parallel_sizes(asked: Asked, parallelism: Mapping[str, Any]) -> None:
    tensor = _size(parallelism, "tensor_parallel_size", "parallelism.tensor_parallel_size")
    pipeline = _size(parallelism, "pipeline_parallel_size", "parallelism.pipeline_parallel_size")
    machines = f"`gpu_count` {asked.gpu_count} x `nodes` {asked.nodes} = {asked.total}"
    if tensor > asked.gpu_count:
        raise SpecError(
            f"`tensor_parallel_size` is {tensor}, and a node has {asked.gpu_count} of the accelerators asked for",
            hint=f"set gpu_count = {tensor}, or tensor_parallel_size to at most {asked.gpu_count}",
            where="hyperparameters.parallelism.tensor_parallel_size",
        )
    if asked.total % (tensor * pipeline):
        raise SpecError(
            f"`tensor_parallel_size` {tensor} x `pipeline_parallel_size` {pipeline} = {tensor * pipeline} does not "
            f"divide the accelerators asked for: {machines}",
            hint="make the product of the parallel sizes a divisor of gpu_count x nodes",
            where="hyperparameters.parallelism",
        )


def _find_size(table: Mapping[str, Any], key: str, shown: str) -> int | None:
    value = table.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SpecError(f"`{shown}`: expected a whole number of at least 1, found {value!r}", where=shown)
    return value


def _size(table: Mapping[str, Any], key: str, shown: str) -> int:
    return _find_size(table, key, shown) or 1


def _check_kind_of_training(payload: Mapping[str, Any]) -> None:
    kind = payload.get("training_type")
    if kind is not None and not str(kind).lower().startswith(_KINDS_OF_TRAINING):
        raise SpecError(
            f"`training_type` is {kind!r}; expected sft_offline",
            hint="this server fine-tunes on rows; reinforcement learning is not offered",
            where="training_type",
        )


def _as_toml(
    payload: Mapping[str, Any], hyperparameters: Mapping[str, Any], config: Mapping[str, Any], validation: str | None
) -> dict[str, Any]:
    """The payload as the TOML that its client was given; what only a server checks is left out."""
    flat = {key: value for key, value in hyperparameters.items() if key not in _VALIDATION_KEYS}
    knobs = {key: hyperparameters[key] for key in _VALIDATION_KEYS if key in hyperparameters}
    training = read_table(config, "training", "metadata.effective_config.")
    enabled = read_table(training, "validation", "metadata.effective_config.training.")
    kind = str(payload.get("training_type") or _USUAL)
    said = {"use_qlora": True} if kind.lower().startswith(("qft", "qlora")) else {}
    tables = {
        "job": {"model": read_name(payload, "model"), "data": _training_file(payload)},
        "compute": read_table(config, "compute", "metadata.effective_config."),
        "training": {"mode": None if kind == _USUAL else kind, **said, **training},
        "hyperparameters": flat,
    }
    if validation or knobs or enabled:
        tables["training"]["validation"] = {"enabled": bool(validation or knobs), **enabled, **knobs}
    if validation:
        tables["data"] = {"validation_path": validation}
    return tables


def _without_files(tables: dict[str, Any]) -> dict[str, Any]:
    """The tables without the names of files, which the server puts in itself once it has found them."""
    data = {key: value for key, value in tables.get("data", {}).items() if not isinstance(value, str)}
    return {**tables, "data": data}


def _unread(payload: Mapping[str, Any], topology: Mapping[str, Any]) -> list[str]:
    unknown = sorted(set(payload) - _UNDERSTOOD)
    notes = [f"`{key}` is not understood and changes nothing" for key in unknown if payload[key] not in (None, {}, [])]
    beside = sorted(set(topology) - {"container_count"})
    return notes + [f"`data.topology.{key} = {topology[key]}` is shown and changes nothing" for key in beside]


def _training_file(payload: Mapping[str, Any]) -> str:
    return read_name(payload, "training_file_id" if payload.get("training_file_id") else "training_file")


def _validation_file(payload: Mapping[str, Any], data: Mapping[str, Any]) -> str | None:
    """The one validation file, wherever the client put its id."""
    listed = data.get("validation_files") or []
    if not isinstance(listed, list):
        raise SpecError(f"`metadata.effective_config.data.validation_files`: expected a list, found {listed!r}")
    named = [payload.get("validation_file"), payload.get("validation_file_id"), data.get("validation_file"), *listed]
    found = sorted({str(each) for each in named if each})
    if len(found) > 1:
        raise SpecError(
            f"several validation files are named: {', '.join(found)}",
            hint="name one; rows of several files can be put into one",
            where="metadata.effective_config.data.validation_files",
        )
    return found[0] if found else None
