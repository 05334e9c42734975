"""The `[compute.parallelism]` table: how trainers on many devices are told of precision, memory and sharding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from luthier.spec.part import Part

if TYPE_CHECKING:
    from luthier.spec.run import RunSpec

_FORMATS = ("bf16", "fp16")


class Parallelism(Part):
    """Settings of trainers on many devices: honoured where they act, noted where one device makes them meaningless."""

    bf16: bool | None = None
    """Compute in bf16, as `compute.precision` says it; false keeps the plan from choosing it."""
    fp16: bool | None = None
    """Compute in fp16, as `compute.precision` says it; false keeps the plan from choosing it."""
    activation_checkpointing: bool | None = None
    """Compute activations again in the backward pass, as `compute.recompute` says it."""
    use_deepspeed: bool | None = None
    """Shard by DeepSpeed: nothing to shard on one device, refused over several processes."""
    deepspeed_stage: int | None = Field(None, ge=0, le=3)
    """How much DeepSpeed shards; 0 is nothing."""
    fsdp: bool | str | None = None
    """Shard by FSDP: nothing to shard on one device, refused over several processes."""
    tensor_parallel_size: int | None = Field(None, ge=1)
    """Devices that share each layer: meaningless on one, refused over several processes."""
    pipeline_parallel_size: int | None = Field(None, ge=1)
    """Devices that share the layers among them: meaningless on one, refused over several processes."""

    @property
    def sharding(self) -> dict[str, object]:
        """The keys that were given and ask to share the model among devices."""
        switches = ("use_deepspeed", "deepspeed_stage", "fsdp")
        asked: dict[str, object] = {key: value for key in switches if (value := getattr(self, key))}
        sizes = ("tensor_parallel_size", "pipeline_parallel_size")
        return asked | {key: value for key in sizes if (value := getattr(self, key) or 1) > 1}


def find_parallel_contradictions(spec: RunSpec) -> list[tuple[str, str]]:
    """(key path, message) for each pair of settings that say two things of one matter."""
    compute, parallelism = spec.compute, spec.compute.parallelism
    wanted: dict[str, tuple[bool | None, bool | None, str]] = {
        name: (getattr(parallelism, name), _is(compute.precision, name), f'precision = "{compute.precision}"')
        for name in _FORMATS
    }
    said = f'recompute = "{compute.recompute}"'
    wanted["activation_checkpointing"] = parallelism.activation_checkpointing, _is(compute.recompute, "always"), said
    found = [
        (f"compute.parallelism.{name}", f"says other than `compute.{key}`")
        for name, (here, there, key) in wanted.items()
        if here is not None and there is not None and here != there
    ]
    if parallelism.bf16 and parallelism.fp16:
        found.append(("compute.parallelism.fp16", "given beside `compute.parallelism.bf16`; keep one of them"))
    return found


def _is(value: str, wanted: str) -> bool | None:
    """Whether a key says so; None where it is left open."""
    return None if value == "auto" else value == wanted
