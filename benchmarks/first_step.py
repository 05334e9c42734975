"""From the command to the first optimizer step, `luthier train` beside `trl sft`: row C9 of the aims."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from inputs import Lengths, write_rows

_ROWS = 8
_TIMEOUT_SECONDS = 180
_AIM = 5


@dataclass(frozen=True)
class Command:
    """A command, what it prints when a step is done, and where it leaves its events, if it has such a file."""

    arguments: list[str]
    printed: re.Pattern[str]
    events: str = ""


@dataclass
class Steps:
    """The seconds until the first step was told, and what was told of both."""

    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)


def measure_first_step(folder: Path, rounds: int) -> dict[str, Any]:
    """C9, cold: nothing cached but what the installation brings; the practice model, LoRA, one batch of all rows."""
    from luthier.runs.resolve import practice_folder

    work = folder / "C9"
    shutil.rmtree(work, ignore_errors=True)
    (work / "rows").mkdir(parents=True)
    rows = work / "rows" / "train.jsonl"
    write_rows(rows, count=_ROWS, lengths=Lengths(30, 0.5, most=60), words=500, seed=3)
    tools = Path(sys.executable).parent
    found: dict[str, list[Steps]] = {"luthier train": [], "trl sft": []}
    for number in range(rounds + 1):
        out = work / f"round{number}"
        for name, command in _commands(tools, rows, practice_folder(), out).items():
            steps = time_first_step(command, out)
            # The first call of each may have to write compiled modules, and brings the files into memory.
            if number:
                found[name].append(steps)
    return _tell(found, rounds)


def _tell(found: dict[str, list[Steps]], rounds: int) -> dict[str, Any]:
    ours, theirs = found.values()
    ratios = [b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True)]
    print(f"\nC9: command to first optimizer step, practice model, LoRA, {_ROWS} rows, {rounds} rounds")
    problems = []
    for name, each in found.items():
        seconds = [steps.seconds for steps in each]
        losses, norms = each[0].losses, each[0].grad_norms
        print(
            f"    {name:16}{statistics.median(seconds):>7.2f} s  ({min(seconds):.2f} to {max(seconds):.2f})  "
            f"losses {_few(losses)}  norms {_few(norms)}"
        )
        if any(steps.losses[1] >= steps.losses[0] for steps in each):
            problems.append(f"C9, {name}: the loss did not fall")
    print(f"    ratio {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f}), aim {_AIM:g}x")
    print("    losses of the first step are of the same tokens and weights; the adapters start each in its own way")
    a, b = ours[0].losses[0], theirs[0].losses[0]
    if abs(a - b) > 0.01 * a:
        problems.append(f"C9: first losses {a:.4f} and {b:.4f} are not of the same tokens")
    for problem in problems:
        print(f"    VOID: {problem}")
    rounds_of = {name: [asdict(steps) for steps in each] for name, each in found.items()}
    return {"id": "C9", "rounds": rounds_of, "ratios": ratios, "problems": problems}


def _few(values: list[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)


def _commands(tools: Path, rows: Path, model: Path, out: Path) -> dict[str, Command]:
    ours = [str(tools / "luthier"), "train", "--model", "practice", "--data", str(rows), "--valid", "0"]
    ours += ["--method", "lora", "--batch", str(_ROWS), "--train-on", "all", "--steps", "2", "--learning-rate", "1e-3"]
    ours += ["--output-dir", str(out / "runs")]
    theirs = [str(tools / "trl"), "sft", "--model_name_or_path", str(model), "--dataset_name", str(rows.parent)]
    theirs += [
        "--use_peft",
        "--lora_target_modules",
        "all-linear",
        "--per_device_train_batch_size",
        str(_ROWS),
        "--max_steps",
        "2",
        "--logging_steps",
        "1",
    ]
    theirs += ["--learning_rate", "1e-3", "--report_to", "none", "--use_cpu", "--output_dir", str(out / "trl")]
    told = r"'loss': '?(?P<loss>[\d.]+)'?.*?'grad_norm': '?(?P<grad_norm>[\d.e-]+)"
    return {
        "luthier train": Command(ours, re.compile(r"step \d/\d +loss (?P<loss>[\d.]+)"), "runs/*/events.jsonl"),
        "trl sft": Command(theirs, re.compile(told)),
    }


def time_first_step(command: Command, out: Path) -> Steps:
    """Start the command, read of its first two steps, and end it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {
        "PYTHONUNBUFFERED": "1",
        "LUTHIER_HOME": str(out / "home"),
        "HF_DATASETS_CACHE": str(out / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    started = time.perf_counter()
    # A group of its own, because `trl sft` starts the process that trains.
    process = subprocess.Popen(
        command.arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout is not None
    said, steps = [], Steps()
    try:
        for line in process.stdout:
            said.append(line)
            match = command.printed.search(line)
            if match:
                steps.seconds = steps.seconds or time.perf_counter() - started
                steps.losses.append(float(match["loss"]))
                if "grad_norm" in match.groupdict():
                    steps.grad_norms.append(float(match["grad_norm"]))
            if len(steps.losses) == 2 or time.perf_counter() - started > _TIMEOUT_SECONDS:
                break
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    if len(steps.losses) < 2:
        raise SystemExit(f"no steps from {' '.join(command.arguments[:2])}:\n{''.join(said)[-3000:]}")
    if command.events:
        file = next(out.glob(command.events))
        told = [json.loads(line) for line in file.read_text().splitlines()]
        steps.grad_norms = [event["grad_norm"] for event in told if event["kind"] == "step_done"]
    return steps
