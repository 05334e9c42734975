"""Runs the sides of a comparison by turns, each in a process of its own, checks that they trained alike, and tells.

Shared by the training benchmarks. A side that does not train, or whose losses are not those of the others, makes the
comparison void, and the command fails.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from inputs import Lengths, Shape, describe, write_rows, write_text_files
from sides import Job, Measured

_HERE = Path(__file__).parent
# The first steps of a process pay for what later ones reuse (kernels are chosen, memory is taken); on every side.
WARM_STEPS = 1
OURS = "luthier"
# What Luthier sets for itself before torch is loaded, and what a person who knows of it can set for a peer: threads
# that sleep while they wait, as many as there are cores, and freed memory kept for the next step.
TUNED = {
    "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
    "OMP_WAIT_POLICY": "passive",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
}


@dataclass(frozen=True)
class Side:
    """One way to train: a kind of job in sides.py and its options; a tuned process gets the settings of `TUNED`."""

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    is_tuned: bool = False
    aim: float | None = None
    """How many times faster Luthier should be."""


@dataclass(frozen=True)
class Comparison:
    """One row of the aims."""

    id: str
    title: str
    shape: Shape
    lengths: Lengths
    sides: tuple[Side, ...]
    steps: int
    """Steps measured in each round; one more comes before them and is left out."""
    batch: int = 8
    method: str = "lora"
    objective: str = "sft"
    rank: int = 16
    learning_rate: float = 1e-3
    train_on: str = "all"
    save_every_steps: int = 0
    loss_tolerance: float = 0.01
    norm_tolerance: float = 0.1
    seed: int = 7

    @property
    def all_steps(self) -> int:
        """With those that come first and are left out."""
        return self.steps + WARM_STEPS


@dataclass
class Results:
    """Everything measured: for each round, each side's measurement and the round's real tokens step by step."""

    rounds: list[dict[str, Measured]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


# -- running ----------------------------------------------------------------------------------------------------


def run_job(job: Job, folder: Path, *, is_tuned: bool = False) -> Measured:
    """Do a job in a new process and read what it wrote."""
    file = folder / "job.json"
    Path(job.out).unlink(missing_ok=True)
    file.write_text(json.dumps(asdict(job)))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {
        "LUTHIER_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(_HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]),
    }
    environment |= TUNED if is_tuned else {}
    command = [sys.executable, str(_HERE / "sides.py"), str(file)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode or not Path(job.out).exists():
        raise SystemExit(f"{job.kind} failed ({done.returncode}):\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return Measured(**json.loads(Path(job.out).read_text()))


def compare(comparison: Comparison, folder: Path, rounds: int) -> Results:
    """All sides, by turns, for so many rounds; each round has rows of its own."""
    model = make_model(comparison.shape, folder)
    results, work = Results(), folder / comparison.id
    shutil.rmtree(work, ignore_errors=True)
    for number in range(rounds):
        job = prepare_round(comparison, model, work, number)
        examples = json.loads(Path(job.examples).read_text())
        results.tokens.append(count_tokens(examples, comparison.batch))
        found = {}
        for side in comparison.sides:
            forget_measurements(work / "home")
            job.kind, job.options = side.kind, side.options
            found[side.name] = run_job(job, work, is_tuned=side.is_tuned and side.name != OURS)
            print(f"    round {number + 1}: {side.name} done", file=sys.stderr, flush=True)
        results.rounds.append(found)
    results.problems = find_problems(comparison, results)
    return results


def make_model(shape: Shape, folder: Path) -> Path:
    """The model of a shape, made once for all comparisons that use it."""
    model = folder / f"model_{shape.layers}_{shape.width}_{shape.words}"
    if not model.exists():
        write_text_files(model, shape)
        run_job(Job("make", str(folder / "made.json"), str(model)), folder)
    return model


def prepare_round(comparison: Comparison, model: Path, work: Path, number: int) -> Job:
    """Write a round's rows and spec, and let Luthier prepare them; gives the job that every side then does."""
    work.mkdir(parents=True, exist_ok=True)
    rows, spec = work / f"rows{number}.jsonl", work / f"spec{number}.json"
    count = comparison.all_steps * comparison.batch
    write_rows(
        rows,
        count=count,
        lengths=comparison.lengths,
        words=comparison.shape.words,
        seed=comparison.seed + number,
        is_paired=comparison.objective == "dpo",
    )
    spec.write_text(json.dumps(spec_of(comparison, model, rows, work)))
    job = Job(
        kind="prepare",
        out=str(work / "measured.json"),
        model=str(model),
        spec=str(spec),
        examples=str(work / f"examples{number}.json"),
        adapter="" if comparison.method == "full" else str(work / "adapter"),
        method=comparison.method,
        objective=comparison.objective,
        rank=comparison.rank,
        batch=comparison.batch,
        steps=comparison.all_steps,
        learning_rate=comparison.learning_rate,
        save_every_steps=comparison.save_every_steps,
    )
    planned = run_job(job, work).notes["steps"]
    if planned != comparison.all_steps:
        raise SystemExit(f"{comparison.id}: the rows make {planned} steps instead of {comparison.all_steps}")
    return job


def spec_of(comparison: Comparison, model: Path, rows: Path, work: Path) -> dict[str, Any]:
    """The run spec of Luthier's side; what is not here is left to its defaults."""
    method: dict[str, Any] = {"kind": comparison.method}
    if comparison.method != "full":
        method |= {"rank": comparison.rank, "alpha": 2.0 * comparison.rank, "dropout": 0.0}
    is_paired = comparison.objective == "dpo"
    return {
        "seed": comparison.seed,
        "model": {"base": str(model)},
        "data": {"train": str(rows), "valid": 0, **({} if is_paired else {"train_on": comparison.train_on})},
        "method": method,
        "objective": {"kind": comparison.objective},
        "optim": {
            "batch": comparison.batch,
            "learning_rate": comparison.learning_rate,
            "schedule": "constant",
            "warmup_steps": 0,
        },
        "output": {"dir": str(work / "runs"), "save_every_steps": comparison.save_every_steps},
    }


def forget_measurements(home: Path) -> None:
    """Let every run plan as the first one does, without what the runs before it measured."""
    for name in ("memory.json", "speed.json"):
        (home / name).unlink(missing_ok=True)


def count_tokens(examples: list[dict[str, Any]], batch: int) -> list[int]:
    """Real tokens of each step: those of the rows, with no padding; of a pair, those of both its sequences."""
    lengths = [sum(len(ids) for ids in example["ids"]) for example in examples]
    return [sum(lengths[start : start + batch]) for start in range(0, len(lengths), batch)]


# -- judging ----------------------------------------------------------------------------------------------------


def seconds_of(measured: Measured, steps: int) -> float:
    """Seconds of the measured steps, with their share of a reference pass made before the first."""
    share = steps / (steps + WARM_STEPS)
    return sum(measured.seconds[WARM_STEPS:]) + measured.reference_seconds * share


def find_problems(comparison: Comparison, results: Results) -> list[str]:
    """Why the comparison is void: a side that did not train, or that trained otherwise than ours."""
    problems = []
    for number, found in enumerate(results.rounds, 1):
        ours = found[OURS]
        for side in comparison.sides:
            measured = found[side.name]
            where = f"{comparison.id} round {number}, {side.name}"
            if not measured.losses or not _mean(measured.losses[-2:]) < measured.losses[0]:
                problems.append(f"{where}: the loss did not fall: {_few(measured.losses)}")
            problems += _compare_steps(where, comparison, ours, measured)
    return problems


def _compare_steps(where: str, comparison: Comparison, ours: Measured, theirs: Measured) -> list[str]:
    if len(theirs.losses) != len(ours.losses):
        return [f"{where}: {len(theirs.losses)} steps instead of {len(ours.losses)}"]
    loss, norm = furthest(ours.losses, theirs.losses), furthest(ours.grad_norms, theirs.grad_norms)
    problems = []
    if loss > comparison.loss_tolerance:
        problems.append(f"{where}: a loss is {loss:.2%} away from ours")
    if norm > comparison.norm_tolerance:
        problems.append(f"{where}: a gradient norm is {norm:.1%} away from ours")
    return problems


def furthest(ours: list[float], theirs: list[float]) -> float:
    """The largest difference as a share of our value."""
    return max(abs(b - a) / max(abs(a), 1e-9) for a, b in zip(ours, theirs, strict=True))


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


def _few(values: list[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)


# -- telling ----------------------------------------------------------------------------------------------------


def tell(comparison: Comparison, results: Results) -> dict[str, Any]:
    """Print a comparison's table; gives the same as plain values."""
    tokens = [sum(each[WARM_STEPS:]) for each in results.tokens]
    print(f"\n{comparison.id}: {comparison.title}")
    print(
        f"    {describe(comparison.shape)}; {len(results.rounds)} rounds of {comparison.steps} steps of "
        f"{comparison.batch} rows after {WARM_STEPS} left out; {min(tokens):,} to {max(tokens):,} real tokens a round"
    )
    head = f"    {'':24}{'tok/s':>7}{'seconds':>9}{'cpu s':>8}  {'ours is faster by':22}{'aim':>5}{'peak MB':>9}"
    print(f"{head}{'training':>9}")
    found: dict[str, Any] = {"id": comparison.id, "title": comparison.title, "sides": {}}
    for side in comparison.sides:
        facts = _facts(comparison, results, side, tokens)
        found["sides"][side.name] = facts
        ratio = "" if side.name == OURS else "{:.2f}x ({:.2f} to {:.2f})".format(*facts["ratio"])
        aim = "" if side.aim is None else f"{side.aim:g}x"
        print(
            f"    {side.name:24}{facts['tokens_per_second']:>7,.0f}{facts['seconds']:>9.2f}{facts['cpu_seconds']:>8.1f}"
            f"  {ratio:22}{aim:>5}{facts['peak_mb']:>9,.0f}{facts['training_mb']:>9,.0f}"
        )
    if any(side.is_tuned for side in comparison.sides):
        print("    tuned: with the thread and memory settings that Luthier gives its own process")
    if comparison.objective == "sft":
        operations = (6 if comparison.method == "full" else 4) * comparison.shape.computed_weights
        rate = found["sides"][OURS]["tokens_per_second"] * operations / 1e9
        print(f"    {OURS} at {operations / 1e6:,.0f}M operations a token: {rate:,.0f} GFLOP/s")
    print_steps(comparison, results)
    for problem in results.problems:
        print(f"    VOID: {problem}")
    found["problems"] = results.problems
    found["rounds"] = [{name: asdict(each) for name, each in one.items()} for one in results.rounds]
    found["tokens"] = results.tokens
    return found


def _facts(comparison: Comparison, results: Results, side: Side, tokens: list[int]) -> dict[str, Any]:
    taken = [seconds_of(each[side.name], comparison.steps) for each in results.rounds]
    ours = [seconds_of(each[OURS], comparison.steps) for each in results.rounds]
    ratios = [theirs / mine for theirs, mine in zip(taken, ours, strict=True)]
    all_of = [each[side.name] for each in results.rounds]
    return {
        "tokens_per_second": statistics.median(count / each for count, each in zip(tokens, taken, strict=True)),
        "seconds": statistics.median(taken),
        "cpu_seconds": statistics.median(sum(each.cpu_seconds[WARM_STEPS:]) for each in all_of),
        "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
        "peak_mb": max(each.peak_bytes for each in all_of) / 1e6,
        "training_mb": max(each.training_bytes for each in all_of) / 1e6,
        "load_seconds": statistics.median(each.load_seconds for each in all_of),
        "notes": all_of[0].notes,
    }


def print_steps(comparison: Comparison, results: Results) -> None:
    """Losses and gradient norms step by step of the first round, and how far apart they are in all of them."""
    first = results.rounds[0]
    print("    first round, loss and gradient norm of each step:")
    for side in comparison.sides:
        measured = first[side.name]
        losses = " ".join(f"{value:8.4f}" for value in measured.losses)
        norms = " ".join(f"{value:8.4f}" for value in measured.grad_norms)
        print(f"      {side.name:24} loss {losses}\n      {'':24} norm {norms}")
    for side in comparison.sides:
        if side.name == OURS:
            continue
        pairs = [(each[OURS], each[side.name]) for each in results.rounds]
        if any(len(a.losses) != len(b.losses) for a, b in pairs):
            continue
        loss = max(furthest(a.losses, b.losses) for a, b in pairs)
        norm = max(furthest(a.grad_norms, b.grad_norms) for a, b in pairs)
        print(f"    furthest from ours in any step: {side.name}: loss {loss:.2%}, gradient norm {norm:.1%}")
    told = "; ".join(f"{side.name}: {_told(first[side.name].notes)}" for side in comparison.sides)
    print(f"    {told}")


def _told(notes: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in notes.items())


def describe_machine(names: tuple[str, ...]) -> str:
    """Date, processor and versions."""
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} absent")
    cpu = next((line for line in _cpu_lines("model name")), platform.machine())
    flags = set(next(_cpu_lines("flags"), "").split())
    has = [flag for flag in ("avx512_bf16", "amx_bf16", "avx512_vnni") if flag in flags]
    load = os.getloadavg()[0]
    cores = len(os.sched_getaffinity(0))
    return (
        f"{date.today()}, {cores} cores of {cpu} ({', '.join(has) or 'no bf16'}), load {load:.1f} at the start\n"
        + ", ".join([f"python {platform.python_version()}", *found])
    )


def _cpu_lines(key: str) -> Any:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return (line.partition(":")[2].strip() for line in lines if line.startswith(key))
