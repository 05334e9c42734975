"""How long training stands still for a checkpoint, beside transformers' Trainer: row C10 of the aims."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from inputs import SMALL, TINY, Lengths
from rounds import OURS, WARM_STEPS, Comparison, Side, compare, print_steps
from sides import Measured

_ADAPTER_WEIGHTS = 10_000_000
_EVERY_STEPS = 4


def measure_saving(folder: Path, rounds: int, *, is_quick: bool) -> dict[str, Any]:
    """C10: the same training with a checkpoint every few steps, and what each took of the loop."""
    shape = TINY if is_quick else SMALL
    rank = 16 if is_quick else round(_ADAPTER_WEIGHTS / shape.adapter_weights_a_rank)
    comparison = Comparison(
        "C10",
        f"checkpoints of a {rank * shape.adapter_weights_a_rank / 1e6:.1f}M-weight adapter",
        shape,
        Lengths(median=24, sigma=0.5, most=64),
        (Side(OURS, "luthier"), Side("HF Trainer", "trainer", {"bf16_weights": True}, is_tuned=True, aim=10)),
        steps=11,
        batch=4,
        rank=rank,
        learning_rate=1e-3 if is_quick else 1e-4,
        save_every_steps=_EVERY_STEPS,
    )
    results = compare(comparison, folder, rounds)
    print(f"\n{comparison.id}: {comparison.title}, every {_EVERY_STEPS} steps, {rounds} rounds")
    print(f"    {'':14}{'stands still':>14}  {'from':>8}{'to':>8}  {'longer step':>12}{'a step':>9}{'peak MB':>9}")
    found: dict[str, Any] = {"id": comparison.id, "title": comparison.title, "sides": {}, "problems": results.problems}
    for side in comparison.sides:
        measured = [each[side.name] for each in results.rounds]
        saves = [seconds for each in measured for seconds in each.saves]
        longer, plain = (statistics.median(each) for each in zip(*map(compare_intervals, measured), strict=True))
        peak = max(each.peak_bytes for each in measured) / 1e6
        least, most = min(saves) * 1e3, max(saves) * 1e3
        print(
            f"    {side.name:14}{statistics.median(saves) * 1e3:>11.1f} ms  {least:>8.1f}{most:>8.1f}"
            f"  {longer * 1e3:>9.0f} ms{plain:>7.2f} s{peak:>9,.0f}"
        )
        found["sides"][side.name] = {"seconds": saves, "longer_step": longer, "step": plain, "peak_mb": peak}
    ours, theirs = (found["sides"][side.name] for side in comparison.sides)
    ratio = statistics.median(theirs["seconds"]) / statistics.median(ours["seconds"])
    print(f"    HF Trainer stands still {ratio:.1f} times as long (aim: {comparison.sides[1].aim:g}x)")
    print("    `longer step`: the step after a save less one without, which holds what goes on in the background too")
    print_steps(comparison, results)
    for problem in results.problems:
        print(f"    VOID: {problem}")
    return {**found, "ratio": ratio}


def compare_intervals(measured: Measured) -> tuple[float, float]:
    """How much longer an interval with a save in it is, and an interval without one."""
    after = {place for place in range(len(measured.seconds)) if place and place % _EVERY_STEPS == 0}
    without = [each for place, each in enumerate(measured.seconds) if place >= WARM_STEPS and place not in after]
    plain = statistics.median(without)
    return statistics.median(measured.seconds[place] for place in after) - plain, plain
