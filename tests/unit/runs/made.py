"""Runs as the tests need them: real rows, real preparation and a real folder; only the training is left out."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from luthier.data.prepared import Prepared
from luthier.runs import events
from luthier.runs.layout import FINAL_LORA_WEIGHTS, FINAL_MODEL
from luthier.runs.manifest import seal
from luthier.runs.models import register
from luthier.runs.resolve import find_resolved, practice_folder
from luthier.runs.run import Run, create_run
from luthier.spec.load import dump_spec, load_spec_text
from luthier.spec.plan import Memory, RunPlan
from luthier.spec.run import RunSpec
from luthier.workflow import prepare_data

NOON = datetime(2026, 11, 20, 14, 30, tzinfo=UTC)


def write_rows(path: Path, count: int = 10) -> Path:
    """Chat rows, the last but one a copy of the first."""
    rows = [f"question {number}" for number in range(count - 1)]
    rows.insert(count - 2, rows[0])
    lines = [
        json.dumps({"messages": [{"role": "user", "content": row}, {"role": "assistant", "content": "yes"}]})
        for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def build_spec(rows: Path, base: str = "practice", **tables: Any) -> RunSpec:
    """A resolved spec over these rows."""
    given = {
        "model": {"base": base},
        "data": {"train": str(rows), "valid": 2},
        "method": {"kind": "qlora", "targets": ["q_proj"]},
        "optim": {"batch": 3, "epochs": 2.0, "learning_rate": 1e-3, "warmup_steps": 0},
        **tables,
    }
    return load_spec_text(yaml.safe_dump(given), "yaml", name="run.yaml", base_dir=rows.parent).spec


def build_plan(spec: RunSpec, prepared: Prepared) -> RunPlan:
    """A plan of the spec as it stands; what it costs is of no interest here."""
    return RunPlan(
        spec=spec,
        decisions=(),
        steps=5,
        train_examples=len(prepared.train),
        stream_end=None,
        tokens_per_epoch=1,
        trained_tokens_per_epoch=1,
        total_parameters=1,
        trainable_parameters=1,
        memory=Memory({}, 0, "cpu"),
        seconds=None,
        device="cpu",
    )


def make_run(parent: Path, spec: RunSpec, *, now: datetime = NOON) -> Run:
    """A run that has just been made."""
    prepared = prepare_data(spec)
    resolved = find_resolved(spec.model.base, spec.model.revision)
    return create_run(parent, build_plan(spec, prepared), prepared, resolved, now=now)


def finish(run: Run) -> Path:
    """Put final weights into the run: an adapter, or for a full run a model folder."""
    is_full = run.spec.method.kind == "full"

    def write(folder: Path) -> None:
        if is_full:
            for path in practice_folder().iterdir():
                (folder / path.name).write_bytes(path.read_bytes())
            return
        config = {"base_model_name_or_path": run.spec.model.base, "r": 8, "peft_type": "LORA"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "adapter_model.safetensors").write_bytes(run.id.encode())

    final = run.folder / (FINAL_MODEL if is_full else FINAL_LORA_WEIGHTS)
    seal(final, write, {"step": 5})
    run.events.append(events.RunStarted(run.id))
    run.events.append(events.Finished(5, "all steps done", 1.5))
    register(run)
    return final


def step_done(step: int, loss: float = 1.0, **more: Any) -> events.StepDone:
    """A step as the loop reports it."""
    facts: dict[str, Any] = {
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "tokens": 30,
        "trained_tokens": 12,
        "tokens_per_second": 100.0,
        "seconds": 0.3,
        "memory_bytes": 1,
    }
    return events.StepDone(step=step, loss=loss, **{**facts, **more})


def same_spec(first: RunSpec, second: RunSpec) -> bool:
    """Whether every key is equal."""
    return dump_spec(first) == dump_spec(second)
