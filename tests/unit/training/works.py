"""Small real runs of the practice model in this process, and the real engine made to go wrong on demand."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier.engines.registry import find_engine
from luthier.engines.verbs import Computed, Engine, OutOfMemory, Ready
from luthier.runs import events
from luthier.runs.home import luthier_home
from luthier.runs.manifest import hash_file
from luthier.runs.run import Run, open_run
from luthier.spec.load import load_spec_text
from luthier.spec.run import RunSpec
from luthier.training import session
from luthier.training.session import Trained, Work, train
from luthier.training.signals import StopFlag
from luthier.workflow import make_ready, prepare_data, reopen, start_run
from tests.builders import write_jsonl

NEEDS_TORCH = [
    pytest.mark.torch,
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs the torch extra"),
]
ADAPTER = "final_lora_weights/adapter_model.safetensors"
_WORDS = ("red", "green", "blue", "pink", "grey", "black", "white")


def chat_rows(count: int) -> list[dict[str, Any]]:
    """Rows of several lengths, no two alike."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"say {number} " + " ".join(_WORDS[: number % 5])},
                {"role": "assistant", "content": f"{_WORDS[number % 7]} {number}" + " and so on" * (number % 3)},
            ]
        }
        for number in range(count)
    ]


def pair_rows(count: int) -> list[dict[str, Any]]:
    """Pairs that share their prompt and the start of their answers."""
    return [
        {
            "prompt": f"say {number} " + " ".join(_WORDS[: number % 5]),
            "chosen": f"I say {_WORDS[number % 7]} {number}",
            "rejected": f"I say {_WORDS[(number + 1) % 7]}" + " or not" * (number % 3),
        }
        for number in range(count)
    ]


def text_rows(count: int) -> list[dict[str, Any]]:
    """Plain texts."""
    return [{"text": f"{number} " + " ".join(_WORDS[: 1 + number % 7])} for number in range(count)]


_ROWS = {"pretrain": text_rows, "dpo": pair_rows, "simpo": pair_rows, "orpo": pair_rows}


def write_data(folder: Path, objective: str, *, train: int = 12, valid: int = 4) -> dict[str, Any]:
    """Files of rows, and the `[data]` table that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = _ROWS.get(objective, chat_rows)(train + valid)
    table: dict[str, Any] = {"train": str(write_jsonl(folder / "train.jsonl", rows[:train]))}
    return {**table, "valid": str(write_jsonl(folder / "valid.jsonl", rows[train:])) if valid else 0}


def tables_of(folder: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A spec of six steps in fp32, with dropout; `changes` are by dotted key, those of `data.rows` by count."""
    counts = {"train": changes.get("rows.train", 12), "valid": changes.get("rows.valid", 4)}
    tables: dict[str, Any] = {
        "seed": 1,
        "model": {"base": "practice"},
        "data": write_data(folder / "rows", changes.get("objective.kind", "sft"), **counts),
        "method": {"kind": "lora", "rank": 4, "targets": ["q_proj", "v_proj"], "dropout": 0.1},
        "optim": {"batch": 4, "steps": 6, "learning_rate": 5e-3, "warmup_steps": 1},
        "output": {"dir": str(folder / "runs"), "save_every_steps": 2},
        "compute": {"precision": "fp32"},
    }
    if changes.get("method.kind") == "full":
        tables["method"] = {}
    for key, value in changes.items():
        table, _, name = key.partition(".")
        if table == "rows":
            continue
        if name:
            tables.setdefault(table, {})[name] = value
        else:
            tables[table] = value
    return tables


def make_spec(folder: Path, changes: Mapping[str, Any] | None = None) -> RunSpec:
    """The same as a spec."""
    text = yaml.safe_dump(tables_of(folder, changes or {}))
    return load_spec_text(text, "yaml", name="run.yaml", base_dir=folder).spec


@dataclass
class Watched:
    """Events as they came."""

    events: list[events.Event] = field(default_factory=list)
    after: Callable[[events.Event], None] | None = None

    def __call__(self, event: events.Event) -> None:
        self.events.append(event)
        if self.after:
            self.after(event)

    def of(self, kind: type[events.Event]) -> list[Any]:
        """Those of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [event.loss for event in self.of(events.StepDone)]


def make_work(folder: Path, changes: Mapping[str, Any] | None = None, *, watch: Watched | None = None) -> Work:
    """A new run, ready to train in this process."""
    spec = make_spec(folder, changes)
    ready = make_ready(spec, prepare_data(spec))
    return Work(
        start_run(ready), ready.plan, ready.prepared, ready.resolved, luthier_home(), watch or Watched(), StopFlag()
    )


def again(work: Work, *, watch: Watched | None = None) -> Work:
    """The same run in what could be a new process: everything read from its folder."""
    run = open_run(work.run.folder)
    ready = reopen(run)
    return replace(
        work,
        run=run,
        plan=ready.plan,
        prepared=ready.prepared,
        resolved=ready.resolved,
        watch=watch or Watched(),
        stop=StopFlag(),
    )


def run_whole(folder: Path, changes: Mapping[str, Any] | None = None) -> tuple[Run, Watched]:
    """A run trained without a stop."""
    watched = Watched()
    work = make_work(folder, changes, watch=watched)
    assert train(work).outcome.reason in ("finished", "early_stop")
    return work.run, watched


def resume(work: Work, **more: Any) -> tuple[Trained, Watched]:
    """Go on with a run."""
    watched = Watched()
    return train(again(work, watch=watched), resume=True, **more), watched


def final_hash(run: Run) -> str:
    """The hash of the final adapter."""
    return hash_file(run.folder / ADAPTER)


def stop_after(step: int, stop: StopFlag, reason: str = "SIGTERM") -> Callable[[events.Event], None]:
    """Ask to stop once a step is done, by a real signal."""

    def after(event: events.Event) -> None:
        if isinstance(event, events.StepDone) and event.step == step:
            signal.raise_signal(signal.Signals[reason])

    return after


@dataclass
class Faulty:
    """The real engine with faults: by the number of the call (from 1), or by what the batch holds."""

    engine: Engine
    before_backward: Callable[[int, Any], None] | None = None
    before_forward: Callable[[int, Any], None] | None = None
    poison: Callable[[int, Any], bool] | None = None
    """Whether the loss of a micro-batch becomes NaN."""
    calls: dict[str, int] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def _count(self, name: str) -> int:
        self.calls[name] = self.calls.get(name, 0) + 1
        return self.calls[name]

    def forward_backward(self, batch: Any, loss: Any) -> Any:
        number = self._count("backward")
        if self.before_backward:
            self.before_backward(number, batch)
        if self.poison and self.poison(number, batch):
            return Ready(lambda: Computed(_nans(batch), float("nan")))
        return self.engine.forward_backward(batch, loss)

    def forward(self, batch: Any) -> Any:
        number = self._count("forward")
        if self.before_forward:
            self.before_forward(number, batch)
        return self.engine.forward(batch)


def _nans(batch: Any) -> Any:
    import numpy as np

    return np.full(len(batch.targets), np.nan)


def with_faults(patch: pytest.MonkeyPatch, into: list[Faulty] | None = None, **faults: Any) -> list[Faulty]:
    """Engines that are loaded from now on have these faults; they appear in the list."""
    made: list[Faulty] = [] if into is None else into

    def find(kind: str) -> Any:
        build = find_engine(kind)

        def build_faulty(*args: Any, **options: Any) -> Faulty:
            made.append(Faulty(build(*args, **options), **faults))
            return made[-1]

        return build_faulty

    patch.setattr(session, "find_engine", find)
    return made


def memory_for(tokens: int) -> Callable[[int, Any], None]:
    """Memory that holds so many tokens and no more."""

    def check(_: int, batch: Any) -> None:
        if len(batch.tokens) > tokens:
            raise OutOfMemory(f"no room for {len(batch.tokens)} tokens")

    return check


def signal_at(numbers: Iterable[int], name: str = "SIGTERM") -> Callable[[int, Any], None]:
    """A real signal at these calls."""
    chosen = set(numbers)

    def send(number: int, _: Any) -> None:
        if number in chosen:
            signal.raise_signal(signal.Signals[name])

    return send
