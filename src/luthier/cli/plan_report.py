"""Print a plan: how much there is to do, what it takes against what the machine has, and what was decided and why."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from luthier.cli.output import paint, print_table, say
from luthier.reports.words import show_bytes, show_seconds

if TYPE_CHECKING:
    from luthier.spec.plan import Decision, RunPlan

_LISTED = 12


def print_plan(plan: RunPlan) -> None:
    """What will be done, before it is done."""
    spec = plan.spec
    say(
        f"plan {plan.hash()[:12]}: {spec.method.kind} {spec.objective.kind} of {spec.model.base} "
        f"on {plan.memory.device} ({plan.device}, {spec.compute.precision}), engine `{spec.engine.kind}`"
    )
    print_table(_sizes(plan))
    _print_memory(plan)
    if plan.decisions:
        say("decided")
        print_table([(each.key, _value(each), each.reason) for each in plan.decisions])


def _sizes(plan: RunPlan) -> list[tuple[str, str]]:
    spec = plan.spec
    optim, processes = spec.optim, spec.compute.processes
    share = plan.trained_tokens_per_epoch / max(1, plan.tokens_per_epoch)
    trained = plan.trainable_parameters / max(1, plan.total_parameters)
    counted = f"{plan.trainable_parameters:,} of {plan.total_parameters:,} parameters ({trained:.2%})"
    length = "by optim.steps" if optim.steps > 0 else f"{optim.epochs:g} epochs"
    rows = [
        ("examples", f"{plan.train_examples:,} to train"),
        ("tokens", f"{plan.tokens_per_epoch:,} an epoch, {share:.1%} of them trained"),
        ("steps", f"{plan.steps:,} of {optim.batch} examples ({length})"),
        ("trainable", counted if plan.total_parameters else "an adapter; the service knows its size"),
    ]
    if processes > 1:
        least, most = optim.batch // processes, math.ceil(optim.batch / processes)
        each = f"{most}" if least == most else f"{least} to {most}"
        rows.append(("world size", f"{processes} processes, {each} examples of a step each"))
    else:
        rows.append(("world size", f"1 process, {optim.batch} examples of a step"))
    if plan.keeps_dequantised:
        rows.append(("base", "quantised to 4 bits, then held dequantised, since memory allows it"))
    if plan.seconds is not None:
        rows.append(("time", f"about {show_seconds(plan.seconds)}"))
    return rows


def _print_memory(plan: RunPlan) -> None:
    memory = plan.memory
    if not memory.items:
        say(f"memory   on {memory.device}: nothing of this machine's")
        return
    say("memory" if plan.spec.compute.processes == 1 else f"memory of {_whose(plan)}")
    rows = [(name, show_bytes(size)) for name, size in memory.items.items()]
    if memory.correction != 1.0:
        rows.append(("correction", f"x {memory.correction:.2f}"))
    rows.append(("total", show_bytes(memory.total_bytes)))
    rows.append(("free", show_bytes(memory.available_bytes)))
    print_table(rows, right=(1,))
    if memory.correction != 1.0:
        say("  the correction is what earlier runs of this kind took beside what was predicted for them")
    if not memory.fits:
        say(f"  {paint('does not fit', '31')}")


def _whose(plan: RunPlan) -> str:
    return "each device" if plan.device == "cuda" else f"{plan.spec.compute.processes} processes together"


def _value(decision: Decision) -> str:
    value = decision.value
    if isinstance(value, list):
        shown = ", ".join(str(each) for each in value[:_LISTED])
        return shown if len(value) <= _LISTED else f"{shown} and {len(value) - _LISTED} more"
    return f"{value:g}" if isinstance(value, float) else str(value)
