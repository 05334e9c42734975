"""The proof that one spec means the same on every engine: same tokens, same mask, same losses, step by step in fp32."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from luthier.engines.registry import ENGINES, LOCAL, find_missing
from luthier.engines.surroundings import release_memory
from luthier.engines.verbs import Ints
from luthier.errors import CallError, ProofError, SpecError, UnsupportedError
from luthier.runs import events
from luthier.spec.method import AdapterKeys
from luthier.training.proofs import ALONE, IN_FP32, MakeWork, Tell, in_scratch, train_until
from luthier.training.session import Work
from luthier.training.signals import StopFlag

# How far a loss may lie from that of the first engine. TRL is transformers over torch too; others have other products.
_ALLOWED = {"torch": 1e-4, "trl": 1e-4}
_ALLOWED_ELSEWHERE = 1e-3
_SHOWN = 12


@dataclass
class Trace:
    """What an engine was given and what it made of it, over the first steps of a run."""

    engine: str
    losses: list[float] = field(default_factory=list)
    most: int | None = None
    """How many steps are looked at; an engine that runs ahead may take one more."""
    _tokens: dict[int, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    _mask: dict[int, set[bytes]] = field(default_factory=lambda: defaultdict(set))

    def hear(self, step: int, tokens: Ints, trained: Ints) -> None:
        """A sequence of a step, as it was handed to the engine: its token ids and which of them are trained."""
        if self.most is not None and step >= self.most:
            return
        ids = hashlib.sha256(np.asarray(tokens, "<i8").tobytes()).digest()
        self._tokens[step].add(ids)
        self._mask[step].add(hashlib.sha256(ids + np.sort(np.asarray(trained, "<i8")).tobytes()).digest())

    def watch(self, event: events.Event) -> None:
        """Take the loss of each step."""
        if isinstance(event, events.StepDone) and (self.most is None or len(self.losses) < self.most):
            self.losses.append(event.loss)

    @property
    def token_hash(self) -> str:
        """One hash of all sequences, step by step, however a step was cut up."""
        return _hash_steps(self._tokens)

    @property
    def mask_hash(self) -> str:
        """The same of which tokens are trained."""
        return _hash_steps(self._mask)


def _hash_steps(steps: dict[int, set[bytes]]) -> str:
    whole = hashlib.sha256()
    for step in sorted(steps):
        whole.update(step.to_bytes(8, "little") + b"".join(sorted(steps[step])))
    return whole.hexdigest()[:_SHOWN]


@dataclass(frozen=True)
class Comparison:
    """One engine beside the first one."""

    trace: Trace
    difference: float
    allowed: float
    parted: str
    """What is not equal, in words; empty where the proof holds."""


@dataclass(frozen=True)
class Equivalence:
    """All engines that could be asked, and why others could not."""

    steps: int
    first: Trace
    others: tuple[Comparison, ...]
    left_out: dict[str, str]

    @property
    def holds(self) -> bool:
        """Whether every engine did the same."""
        return not any(each.parted for each in self.others)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        traces = [(self.first, 0.0, 0.0), *((each.trace, each.difference, each.allowed) for each in self.others)]
        return {
            "holds": self.holds,
            "steps": self.steps,
            "engines": [
                {
                    "engine": trace.engine,
                    "tokens": trace.token_hash,
                    "mask": trace.mask_hash,
                    "losses": trace.losses,
                    "difference": difference,
                    "allowed": allowed,
                }
                for trace, difference, allowed in traces
            ],
            "left_out": self.left_out,
        }


def prove_engines(make: MakeWork, engines: Sequence[str] | None, *, steps: int, tell: Tell) -> Equivalence:
    """Train the first steps of a spec on each engine that is installed, and hold what they did beside each other."""
    if unknown := [name for name in engines or () if name not in ENGINES]:
        raise CallError(f"--engines: no engine `{unknown[0]}`", hint=f"there is: {', '.join(ENGINES)}")
    if steps < 1:
        raise CallError(f"--steps {steps} must be at least 1", hint="leave it out for 20")
    changes = _settle(make)
    traces: list[Trace] = []
    left_out: dict[str, str] = {}
    with in_scratch() as folder:
        for name in engines or LOCAL:
            if missing := find_missing(name):
                left_out[name] = f"not installed; run: {missing}"
                continue
            if name == "mlx" and changes["method.kind"] == "qlora":
                left_out[name] = "holds a base in 4 bits of its own; compare it by --set method.kind=lora"
                continue
            try:
                work = make({**changes, "engine.kind": name}, folder / name)
            except (SpecError, UnsupportedError) as error:
                left_out[name] = f"cannot train this spec: {error.message}"
                continue
            tell(f"{min(steps, work.plan.steps)} steps on {name}")
            traces.append(_trace(work, min(steps, work.plan.steps)))
            release_memory()
    if len(traces) < 2:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise ProofError(
            f"two engines are needed to compare, and {len(traces)} could be asked ({reasons})",
            hint="install another one: pip install 'luthier[trl]'",
        )
    first, *others = traces
    return Equivalence(len(first.losses), first, tuple(_compare(first, each) for each in others), left_out)


def _settle(make: MakeWork) -> dict[str, object]:
    """What is the same for all: fp32, no dropout, one process, and the method that the plan chose."""
    changes: dict[str, object] = {**IN_FP32, **ALONE, "compute.processes": 1}
    method = make(changes, None).plan.spec.method
    changes["method.kind"] = method.kind
    return changes | ({"method.dropout": 0.0} if isinstance(method, AdapterKeys) else {})


def _trace(work: Work, steps: int) -> Trace:
    trace, stop = Trace(work.plan.spec.engine.kind, most=steps), StopFlag()

    def watch(event: events.Event) -> None:
        trace.watch(event)
        if len(trace.losses) == steps:
            stop.reason = stop.reason or "SIGTERM"

    train_until(replace(work, watch=watch, stop=stop, hear=trace.hear), steps)
    return trace


def _compare(first: Trace, other: Trace) -> Comparison:
    allowed = _ALLOWED.get(other.engine, _ALLOWED_ELSEWHERE)
    both = len(first.losses) == len(other.losses)
    difference = float(np.abs(np.array(first.losses) - np.array(other.losses)).max()) if both else float("inf")
    checks = (
        (first.token_hash == other.token_hash, "the tokens are not the same"),
        (first.mask_hash == other.mask_hash, "the trained tokens are not the same"),
        (difference <= allowed, f"the losses are {difference:.2g} apart, {allowed:.0e} allowed"),
    )
    return Comparison(other, difference, allowed, "; ".join(words for holds, words in checks if not holds))


def check_equivalence(found: Equivalence) -> None:
    """ProofError where an engine did something else."""
    for each in found.others:
        if each.parted:
            raise ProofError(
                f"{each.trace.engine} does not do what {found.first.engine} does: {each.parted}",
                hint="please report it, with the spec and `luthier doctor`",
                details=found.as_dict(),
            )
