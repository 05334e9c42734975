"""Measure training on a CPU beside TRL and beside a plain loop, by turns: rows C1 to C5, C9 and C10 of the aims.

Run `make bench-train-cpu`, or `python benchmarks/train_cpu.py --rows C1,C9 --rounds 3`; `--quick` takes tiny models and
says nothing about speed. Each measurement is a process of its own; what is timed leaves out imports and loading, except
in C9, and the first step. Luthier's side runs what `luthier train` runs. All sides train the same token ids in the same
order from the same weights, with the same schedule; losses and gradient norms must agree, or the row is void.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from first_step import measure_first_step
from inputs import QWEN3_06B, SMALL, TINY, Lengths
from rounds import OURS, Comparison, Side, compare, describe_machine, tell
from saving import measure_saving

_LENGTHS = Lengths(median=80, sigma=0.65)
_OURS = Side(OURS, "luthier")
_DEFAULTS = Side("TRL defaults", "trl", aim=8)
# Measured against each other: padding-free beats padding, and autocast over bf16 weights beats fp32 adapters without.
_BEST_OPTIONS = {"bf16_weights": True, "autocast": True, "recompute": False}
_BEST = Side("TRL best", "trl", {**_BEST_OPTIONS, "padding_free": True}, aim=4)
_PLAIN = Side("plain loop", "plain", {"bf16_weights": True}, aim=2)

COMPARISONS = (
    Comparison(
        "C1",
        "LoRA SFT, 0.1B, rank 16, log-normal lengths, all tokens trained",
        SMALL,
        _LENGTHS,
        (
            _OURS,
            _DEFAULTS,
            _BEST,
            _PLAIN,
            replace(_BEST, name="TRL best, tuned", is_tuned=True, aim=None),
            Side("packed loop, tuned", "plain", {"bf16_weights": True, "joined": True}, is_tuned=True),
        ),
        # With the step that is left out, three rounds train 192 rows.
        steps=7,
    ),
    Comparison(
        "C2",
        "LoRA SFT, Qwen3-0.6B, rank 16",
        QWEN3_06B,
        _LENGTHS,
        (_OURS, replace(_DEFAULTS, aim=6), replace(_BEST, aim=2.5), replace(_PLAIN, aim=None)),
        steps=2,
        batch=4,
    ),
    Comparison(
        "C3",
        "QLoRA SFT (NF4, double quantisation), 0.1B, rank 16",
        SMALL,
        _LENGTHS,
        (_OURS, replace(_DEFAULTS, name="TRL + bitsandbytes", aim=5), replace(_BEST, name="its best", aim=None)),
        steps=3,
        method="qlora",
    ),
    Comparison(
        "C4",
        "full SFT, 0.1B",
        SMALL,
        _LENGTHS,
        # Not over bf16 weights: without fp32 masters most of a step is lost to rounding, which is another training.
        (_OURS, replace(_DEFAULTS, aim=3), Side("TRL best", "trl", {"recompute": False, "padding_free": True})),
        steps=3,
        method="full",
        learning_rate=1e-4,
    ),
    Comparison(
        "C5",
        "DPO with LoRA, 0.1B, prompts are 60 % of a sequence",
        SMALL,
        replace(_LENGTHS, prompt_share=0.6),
        (_OURS, replace(_DEFAULTS, aim=5), Side("TRL best", "trl", {**_BEST_OPTIONS, "precompute": True})),
        steps=3,
        batch=4,
        objective="dpo",
        learning_rate=2e-4,
    ),
)


def shrink(comparison: Comparison) -> Comparison:
    """The same with a model and rows that take a second, to try the benchmark itself."""
    lengths = replace(comparison.lengths, median=24, most=64)
    return replace(comparison, shape=TINY, lengths=lengths, steps=3, batch=4)


def measure(comparison: Comparison, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the aims."""
    chosen = shrink(comparison) if options.quick else comparison
    sides = tuple(replace(side, is_tuned=side.is_tuned or options.tuned) for side in chosen.sides)
    chosen = replace(chosen, steps=options.steps or chosen.steps, sides=sides)
    return tell(chosen, compare(chosen, folder, options.rounds))


def main() -> None:
    """Print every row that was asked for."""
    rows: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
        each.id: (lambda folder, options, each=each: measure(each, folder, options)) for each in COMPARISONS
    }
    rows |= {
        "C9": lambda folder, options: measure_first_step(folder, options.rounds),
        "C10": lambda folder, options: measure_saving(folder, options.rounds, is_quick=options.quick),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(rows), help="rows of the aims, with commas between them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="steps measured in each round, instead of each row's own number")
    parser.add_argument("--quick", action="store_true", help="tiny models: to try the benchmark, not to measure")
    parser.add_argument("--tuned", action="store_true", help="give every peer's process what Luthier sets for its own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there too")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in this folder and leave it")
    options = parser.parse_args()
    wanted = options.rows.split(",")
    if unknown := [row for row in wanted if row not in rows]:
        parser.error(f"no row {unknown[0]}; there are {', '.join(rows)}")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    names = ("luthier", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "numpy")
    print(describe_machine(names))
    folder = options.keep or Path(tempfile.mkdtemp(prefix="luthier-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        found = [rows[row](folder, options) for row in wanted]
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes in all")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    problems = [problem for each in found for problem in each["problems"]]
    if problems:
        sys.exit(f"void: {len(problems)} problems, the first: {problems[0]}")


if __name__ == "__main__":
    main()
