"""What `[compute.parallelism]` does to a plan: set, noted where one device makes it meaningless, or refused by name."""

from __future__ import annotations

from luthier.errors import UnsupportedError
from luthier.machine import Machine
from luthier.spec.compute import Compute
from luthier.spec.plan import Decision
from luthier.spec.run import RunSpec

_TABLE = "compute.parallelism"


def settle_parallelism(spec: RunSpec, machine: Machine) -> tuple[Compute, list[Decision]]:
    """The compute table with what follows from the inner one, each key that was given with what becomes of it."""
    compute, given = spec.compute, spec.compute.parallelism
    decisions: list[Decision] = []
    for name in ("bf16", "fp16"):
        if getattr(given, name) and compute.precision == "auto":
            compute = compute.model_copy(update={"precision": name})
            decisions.append(Decision("compute.precision", name, f"{_TABLE}.{name} is true"))
    wanted = given.activation_checkpointing
    if wanted is not None and compute.recompute == "auto":
        compute = compute.model_copy(update={"recompute": "always" if wanted else "never"})
        reason = f"{_TABLE}.activation_checkpointing is {str(wanted).lower()}"
        decisions.append(Decision("compute.recompute", compute.recompute, reason))
    if compute.processes > 1 and given.sharding:
        raise _refusal(given.sharding, compute.processes, spec.engine.kind)
    one = f"there is one process, on {machine.device_name}: nothing is shared among devices"
    decisions += [Decision(f"{_TABLE}.{key}", value, one) for key, value in given.sharding.items()]
    return compute, decisions


def _refusal(sharding: dict[str, object], processes: int, engine: str) -> UnsupportedError:
    named = ", ".join(f"{_TABLE}.{key}" for key in sharding)
    return UnsupportedError(
        f"{named}: engine `{engine}` does not share a model over its {processes} processes; each holds the whole of it",
        hint="take it out: the processes share each step, which needs no sharding",
    )
