"""Measure training on one CUDA device beside Trainer + PEFT, a plain loop, and TRL where it is installed: G1, G2, G4.

Run `python benchmarks/train_gpu.py --rows G1 --rounds 3`. Without a CUDA device it says so and ends. It was written on
a machine without one and has not been run on a GPU yet, so look at its first figures with suspicion. Models have
published shapes and random weights; rows are 2,048 tokens long, so that no side pads. What is timed leaves out loading
and the first step, and the device is waited for at the end of each step, on every side. Unsloth is not measured here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from inputs import QWEN3_06B, QWEN3_8B, QWEN3_17B, TINY, Lengths
from rounds import OURS, Comparison, Side, compare, describe_machine, tell

# A row is its words, and six tokens of its two turns.
_FULL_ROWS = Lengths(median=2042, sigma=0.0, most=2042)
_OURS = Side(OURS, "luthier")


def list_sides(micro_batch: int, *, is_quantised: bool = False) -> tuple[Side, ...]:
    """Ours and the peers that are installed here, each with its defaults and with its best settings."""
    best = {"bf16_weights": True, "recompute": False, "micro_batch": micro_batch}
    # What TRL does by default, told to transformers' Trainer: fp32 weights, bf16 autocast, recomputation.
    usual = {"autocast": True, "recompute": True, "micro_batch": micro_batch}
    sides = [
        _OURS,
        Side("Trainer, TRL's defaults", "trainer", usual, aim=3),
        Side("Trainer, best", "trainer", {**best, "autocast": True}),
    ]
    if not is_quantised:
        sides.append(Side("plain loop", "plain", best))
    if importlib.util.find_spec("trl"):
        sides.append(Side("TRL defaults", "trl", {"micro_batch": micro_batch}, aim=3))
        sides.append(Side("TRL best", "trl", {**best, "autocast": True}))
    return tuple(sides)


def list_comparisons() -> tuple[Comparison, ...]:
    """G1, G2 and both sizes of G4."""
    first = Comparison(
        "G1", "LoRA SFT, Qwen3-8B, rank 16, rows of 2,048", QWEN3_8B, _FULL_ROWS, list_sides(2), steps=8, rank=16
    )
    quantised = replace(
        first,
        id="G2",
        title="QLoRA SFT (NF4, double quantisation), Qwen3-8B, rank 16, rows of 2,048",
        sides=list_sides(2, is_quantised=True),
        method="qlora",
    )
    small = replace(
        first,
        id="G4-0.6B",
        title="LoRA SFT, Qwen3-0.6B, rank 16, rows of 2,048",
        shape=QWEN3_06B,
        sides=list_sides(8),
        steps=16,
    )
    larger = replace(small, id="G4-1.7B", title="LoRA SFT, Qwen3-1.7B, rank 16, rows of 2,048", shape=QWEN3_17B)
    return first, quantised, small, larger


def find_missing(comparison: Comparison) -> str:
    """A package that the comparison cannot do without and that is not here."""
    needed = ["torch", "transformers", "peft", "accelerate"]
    needed += ["bitsandbytes"] if comparison.method == "qlora" else []
    return next((name for name in needed if importlib.util.find_spec(name) is None), "")


def main() -> None:
    """Print every row that was asked for."""
    comparisons = {each.id: each for each in list_comparisons()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(comparisons), help="rows of the aims, with commas between them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="steps measured in each round, instead of each row's own number")
    parser.add_argument("--quick", action="store_true", help="tiny models: to try the benchmark, not to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there too")
    options = parser.parse_args()
    asked = options.rows.split(",")
    wanted = [name for name in comparisons if name in asked or name.partition("-")[0] in asked]
    if not wanted:
        parser.error(f"no row {options.rows}; there are {', '.join(comparisons)}")
    sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
    from luthier.machine import find_machine

    machine = find_machine()
    if machine.device != "cuda":
        sys.exit("no CUDA device here (or a torch without CUDA): these rows need one; train_cpu.py does without")
    names = ("luthier", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "numpy")
    print(f"{machine.device_name}, {machine.device_memory_bytes / 1e9:.0f} GB; {describe_machine(names)}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="luthier-bench-"))
    found = []
    try:
        for name in wanted:
            comparison = comparisons[name]
            if missing := find_missing(comparison):
                print(f"\n{name}: left out, because {missing} is not installed")
                continue
            if options.quick:
                comparison = replace(comparison, shape=TINY, lengths=Lengths(median=120, sigma=0.0))
            comparison = replace(comparison, steps=options.steps or comparison.steps)
            found.append(tell(comparison, compare(comparison, folder, options.rounds)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    problems = [problem for each in found for problem in each["problems"]]
    if problems:
        sys.exit(f"void: {len(problems)} problems, the first: {problems[0]}")


if __name__ == "__main__":
    main()
