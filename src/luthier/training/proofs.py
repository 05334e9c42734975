"""Proofs on the user's own spec: stopped and resumed equals never stopped; how a step is cut up changes nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from luthier.engines.registry import REMOTE
from luthier.errors import CallError, ProofError, RunError
from luthier.runs import events
from luthier.runs.models import remove_model
from luthier.runs.run import Run
from luthier.spec.method import AdapterKeys
from luthier.spec.run import IN_ONE_PROCESS
from luthier.training.launch import run_processes
from luthier.training.session import Work, train
from luthier.training.signals import EXIT_CODES, StopFlag

MakeWork = Callable[..., Work]
"""Makes the work of a run: settings by key, whoever watches, and the folder its run folder goes to."""

Tell = Callable[[str], None]
_TOLERANCE = 1e-4
# What a proof leaves of the outside world: nothing.
ALONE: dict[str, object] = {"output.merge": False, "output.model_id_file": None}
IN_FP32: dict[str, object] = {
    "compute.precision": "fp32",
    "compute.parallelism.bf16": None,
    "compute.parallelism.fp16": None,
}


@dataclass(frozen=True)
class Compared:
    """Two ways of doing one thing, and how far apart they came out."""

    what: str
    difference: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether they are as near as was claimed."""
        return self.difference <= self.allowed


def prove_resume(make: MakeWork, *, steps: int, stop_at: int, tell: Tell) -> list[Compared]:
    """Train `steps` steps; train to `stop_at`, stop, and go on to the same end; compare every tensor byte for byte."""
    if not 0 < stop_at < steps:
        raise CallError(f"--stop-at {stop_at} must lie between 1 and {steps - 1}", hint="leave it out for the middle")
    settings = {"optim.steps": steps, "output.save_every_steps": steps, **ALONE}
    with in_scratch() as folder:
        tell(f"{steps} steps without a stop")
        whole = _train(make(settings, folder / "whole"))
        tell(f"to step {stop_at}, stopped there")
        stopping = make(settings, folder / "resumed")
        stop = StopFlag()
        _train(replace(stopping, stop=stop, watch=_stop_after(stop_at, stop)), until=stop_at)
        tell(f"resumed to step {steps}")
        _train(replace(stopping, stop=StopFlag()), resume=True)
        found = _compare_tensors(whole, stopping.run, steps)
    return _held(found, "resume")


def prove_invariance(make: MakeWork, *, steps: int, tell: Tell) -> list[Compared]:
    """The same steps cut into micro-batches in different ways, packed and not, in one process and in two; in fp32."""
    base: dict[str, object] = {
        "optim.steps": steps,
        "compute.processes": 1,
        "output.save_every_steps": 0,
        **IN_FP32,
        **ALONE,
    }
    spec = make(base, None).plan.spec
    batch = spec.optim.batch
    if spec.engine.kind == "trl" and isinstance(spec.method, AdapterKeys):
        tell("without dropout, which TRL draws for each micro-batch anew")
        base |= {"method.kind": spec.method.kind, "method.dropout": 0.0}
    with in_scratch() as folder:
        tell(f"{batch} rows at once")
        whole = _train(make({**base, "optim.micro_batch": batch}, folder / "whole"))
        tell("1 row at once")
        single = _train(make({**base, "optim.micro_batch": 1}, folder / "single"))
        tell("every sequence alone, nothing packed")
        alone = _train(replace(make({**base, "optim.micro_batch": batch}, folder / "alone"), packed=False))
        ways = [(f"{batch} x 1 = 1 x {batch}", single), ("packed = unpacked", alone)]
        if spec.engine.kind in IN_ONE_PROCESS:
            tell(f"engine `{spec.engine.kind}` runs in one process, so two are left out")
        else:
            tell("2 processes")
            ways.append(("1 = 2 processes", _train_in_two(make({**base, "compute.processes": 2}, folder / "two").run)))
        found = [compared for name, run in ways for compared in _compare_steps(name, whole, run)]
    return _held(found, "invariance")


def _train_in_two(run: Run) -> Run:
    code = run_processes(["-m", "luthier.cli.rank", str(run.folder), "--json"], 2, run.folder, quiet=True)
    if code:
        raise ProofError(f"the run of 2 processes ended with exit code {code}", hint="`luthier doctor` may say why")
    return run


def train_until(work: Work, step: int) -> Run:
    """Train to the end, or to the step at which the proof stops it."""
    return _train(work, until=step)


def _train(work: Work, *, resume: bool = False, until: int | None = None) -> Run:
    """Train to the end, or to the step at which the proof stops it; a person may stop it anywhere.

    An engine that runs ahead has one more step on its way when it is stopped.
    """
    outcome = train(work, resume=resume).outcome
    ahead = int(work.plan.spec.engine.kind in REMOTE)
    expected = () if until is None else range(until, until + ahead + 1)
    if not outcome.is_done and outcome.step not in expected:
        error = ProofError(f"stopped by {outcome.reason}: nothing was proved")
        error.exit_code = EXIT_CODES[outcome.reason]
        raise error
    return work.run


def _stop_after(step: int, stop: StopFlag) -> Callable[[events.Event], None]:
    def watch(event: events.Event) -> None:
        if isinstance(event, events.StepDone) and event.step == step:
            stop.reason = "SIGTERM"

    return watch


@contextmanager
def in_scratch() -> Iterator[Path]:
    """A folder for the runs of a proof, gone with all that knows of them when it ends."""
    with tempfile.TemporaryDirectory(prefix="luthier-proof-") as folder:
        try:
            yield Path(folder)
        finally:
            for run in Path(folder).glob("*/*"):
                with suppress(RunError):
                    remove_model(run.name)


def _compare_tensors(one: Run, other: Run, step: int) -> list[Compared]:
    """Weights, optimizer state and final weights of two runs, tensor by tensor."""
    found = []
    for mine in sorted(one.folder.rglob("*.safetensors")):
        name = mine.relative_to(one.folder)
        if name.parts[0] not in ("training_state", f"checkpoint_step_{step}", "final_lora_weights", "final_model"):
            continue
        found.append(Compared(name.as_posix(), _count_differences(mine, other.folder / name), 0.0))
    return found


def _count_differences(mine: Path, theirs: Path) -> float:
    """How many tensors differ in any byte; all of them where the other file is not there."""
    if mine.read_bytes() == theirs.read_bytes():
        return 0.0
    ours, others = load_file(mine), load_file(theirs)
    return float(sum(name not in others or ours[name].tobytes() != others[name].tobytes() for name in ours)) or 1.0


def _compare_steps(name: str, one: Run, other: Run) -> list[Compared]:
    mine, theirs = _steps(one), _steps(other)
    if len(mine) != len(theirs):
        raise ProofError(f"{name}: {len(mine)} steps on one side, {len(theirs)} on the other")
    return [
        Compared(f"{name}: {key}", _distance([a[key] for a in mine], [b[key] for b in theirs]), _TOLERANCE)
        for key in ("loss", "grad_norm")
    ]


def _steps(run: Run) -> list[dict[str, Any]]:
    return [event for event in run.read_events() if event["kind"] == "step_done"]


def _distance(mine: list[float], theirs: list[float]) -> float:
    a, b = np.array(mine), np.array(theirs)
    return float((np.abs(a - b) / np.maximum(np.abs(a), 1e-6)).max())


def _held(found: list[Compared], proof: str) -> list[Compared]:
    broken = [each for each in found if not each.holds]
    if not found:
        raise ProofError(f"the {proof} proof compared nothing")
    if broken:
        first = broken[0]
        raise ProofError(
            f"the {proof} proof does not hold: {first.what}: {first.difference:.3g} apart, {first.allowed:.0g} allowed",
            hint="please report it, with the spec and `luthier doctor`",
            details=[each.__dict__ for each in found],
        )
    return found
