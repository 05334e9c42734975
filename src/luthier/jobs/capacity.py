"""What a machine has for jobs, what a job needs of it, and whether the one fits into the other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from luthier.errors import PlanError

if TYPE_CHECKING:
    from luthier.machine import Machine
    from luthier.spec.plan import RunPlan

_KEPT_SHARE = 0.1
"""Of the memory, for everything else on the machine."""
_HOST_BYTES = 2 << 30
"""Memory of a trainer on an accelerator beside the weights that pass through it."""
GIB = 1 << 30


@dataclass(frozen=True)
class Capacity:
    """What a worker has in all, or has free."""

    processors: int
    memory_bytes: int
    devices: int = 0
    device: str = "cpu"
    """What trains here: cpu or cuda."""
    device_name: str = ""
    device_bytes: int = 0
    """Memory of each accelerator."""
    slots: int = 1
    """How many jobs at once."""

    def as_dict(self) -> dict[str, Any]:
        """As tables and routes show it."""
        return asdict(self)

    def without(self, needs: Iterable[Needs]) -> Capacity:
        """What is left beside jobs with these needs."""
        left = self
        for each in needs:
            left = replace(
                left,
                processors=left.processors - each.processors,
                memory_bytes=left.memory_bytes - each.memory_bytes,
                devices=left.devices - each.devices,
                slots=left.slots - 1,
            )
        return left


@dataclass(frozen=True)
class Needs:
    """What a job takes while it runs. Before it is checked, only what its request asked for is known."""

    processors: int = 1
    memory_bytes: int = 0
    devices: int = 0
    device_bytes: int = 0
    device: str | None = None
    """What it was planned for, cpu or cuda, once it is planned."""
    gpu_type: str | None = None
    gpu_count: int | None = None
    nodes: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Only what is set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def read_capacity(table: Mapping[str, Any]) -> Capacity:
    """From a worker's row."""
    known = Capacity(0, 0).as_dict()
    return Capacity(**{name: table.get(name, value) for name, value in known.items()})


def read_needs(table: Mapping[str, Any]) -> Needs:
    """From a job's row; keys that are not ours are another's business."""
    return Needs(**{name: table[name] for name in asdict(Needs()) if table.get(name) is not None})


def find_capacity(machine: Machine | None = None, slots: int | None = None) -> Capacity:
    """This machine's; by default as many jobs at once as it has accelerators, or one."""
    from luthier.machine import find_machine

    found = machine or find_machine()
    on_device = found.device == "cuda"
    return Capacity(
        processors=found.cores,
        memory_bytes=math.floor(found.memory_bytes * (1 - _KEPT_SHARE)),
        devices=found.device_count if on_device else 0,
        device=found.device,
        device_name=found.device_name,
        device_bytes=found.device_memory_bytes if on_device else 0,
        slots=slots or (found.device_count if on_device else 1),
    )


def needs_of(plan: RunPlan) -> Needs:
    """What the plan says that the run takes."""
    compute = plan.spec.compute
    asked = Needs(
        processors=compute.processes,
        device=plan.device,
        gpu_type=compute.gpu_type,
        gpu_count=compute.gpu_count,
        nodes=compute.nodes,
    )
    if plan.device == "cpu":
        return replace(asked, memory_bytes=plan.memory.total_bytes)
    return replace(
        asked,
        memory_bytes=compute.processes * (_HOST_BYTES + 2 * plan.total_parameters),
        devices=compute.processes,
        device_bytes=plan.memory.total_bytes,
    )


def does_fit(needs: Needs, free: Capacity) -> bool:
    """Whether a job can start beside what runs already."""
    return free.slots > 0 and not list_shortages(needs, free)


def list_shortages(needs: Needs, capacity: Capacity) -> list[str]:
    """What a job needs more of than there is, with both numbers."""
    found = []
    if needs.device not in (None, capacity.device):
        found.append(f"a worker that trains on {needs.device}, and this one trains on {capacity.device}")
    for what, wanted, there in (
        ("processors", needs.processors, capacity.processors),
        ("accelerators", needs.devices, capacity.devices),
    ):
        if wanted > there:
            found.append(f"{wanted} {what}, and {there} are there")
    for what, wanted, there in (
        ("memory", needs.memory_bytes, capacity.memory_bytes),
        ("memory of an accelerator", needs.device_bytes, capacity.device_bytes),
    ):
        if wanted > there:
            found.append(f"{wanted / GIB:.1f} GiB of {what}, and {max(0, there) / GIB:.1f} GiB are there")
    return found


def may_check(needs: Needs, capacity: Capacity, offers: Mapping[str, str]) -> bool:
    """Whether a worker may check a job: what it is planned for there is what it will train on."""
    if needs.gpu_type is None:
        return True
    return offer_for(needs.gpu_type, [capacity], offers) in ("cpu", capacity.device)


def offer_for(gpu_type: str, capacities: Iterable[Capacity], offers: Mapping[str, str]) -> str | None:
    """What a kind of accelerator stands for: `cpu` or `cuda` as the administrator maps it, or one that is there."""
    if gpu_type in offers:
        return offers[gpu_type]
    wanted = _plain(gpu_type)
    has_it = any(each.device == "cuda" and wanted in _plain(each.device_name) for each in capacities)
    return "cuda" if wanted and has_it else None


def check_asked(needs: Needs, capacities: Iterable[Capacity], offers: Mapping[str, str]) -> None:
    """Refuse a request for machines that this server does not have; the message has the numbers."""
    there = list(capacities)
    if needs.nodes is not None and needs.nodes > 1:
        raise _too_much(f"{needs.nodes} nodes are asked for, and a job runs on 1", "ask for one node")
    device = None
    if needs.gpu_type is not None:
        device = offer_for(needs.gpu_type, there, offers)
        if device is None:
            names = sorted({each.device_name for each in there if each.device == "cuda"} | set(offers))
            raise _too_much(
                f"gpu_type {needs.gpu_type!r} is not what this server has: {', '.join(names) or 'no accelerator'}",
                "leave gpu_type out, or have the server started with --offer "
                f"{needs.gpu_type}=cpu to let jobs that ask for it run on what it has",
            )
    if needs.gpu_count is not None and device != "cpu":
        most = max((each.devices for each in there), default=0)
        if needs.gpu_count > most and not (device is None and most == 0 and needs.gpu_count == 1):
            raise _too_much(
                f"gpu_count {needs.gpu_count} is asked for, and the largest machine of this server has {most}",
                f"ask for at most {max(most, 1)}",
            )
    if there and (shortages := [list_shortages(needs, each) for each in there]) and all(shortages):
        least = min(shortages, key=len)
        raise _too_much(f"the job needs {least[0]}", "use a smaller base model, or shorter rows")


def _too_much(message: str, hint: str) -> PlanError:
    return PlanError(message, hint=hint)


def _plain(name: str) -> str:
    return "".join(each for each in name.lower() if each.isalnum())
