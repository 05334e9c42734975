"""Run folders as a report needs them, written by hand: any course of training, any rows, any evidence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from luthier.reports.model import Report, read_report
from luthier.runs.layout import CONFIG, EVENTS, LEDGER, LINEAGE, REJECTED
from luthier.runs.run import Run

HOSTILE = (
    "<img src=x onerror=alert(1)><script>alert(2)</script></pre></style><style>body{display:none}</style>"
    "&lt;`|\u202e\x1b[31m"
)
TABLES: dict[str, Any] = {
    "model": {"base": "practice"},
    "data": {"train": "rows.jsonl", "valid": 60, "max_length": 96},
    "method": {"kind": "lora", "rank": 8, "alpha": 16, "targets": ["q_proj"]},
    "optim": {"batch": 8, "epochs": 2.0, "learning_rate": 1e-3, "warmup_steps": 2},
    "evaluate": {"every_steps": 10},
    "compute": {"precision": "bf16", "recompute": "never", "micro_batch_tokens": 4096},
}


@dataclass
class Course:
    """What happens in a run: a loss of each step, held-out losses by step, and more events before the last."""

    losses: Sequence[float | None] = tuple(2.0 - 0.015 * step for step in range(100))
    held_out: dict[int, float] = field(
        default_factory=lambda: {step: 2.0 - 0.015 * step for step in range(10, 101, 10)}
    )
    metrics: dict[str, float] = field(default_factory=dict)
    grad_norm: float = 0.5
    of_steps: Callable[[int], dict[str, float]] = lambda step: {}
    """Metrics of a training step."""
    more: Sequence[dict[str, Any]] = ()
    last: dict[str, Any] | None = None


def ledger(
    train: int = 300, valid: int = 60, *, tokens: int = 80, dropped: Iterable[str] = (), **more: Any
) -> list[Any]:
    """Ledger lines: so many rows of each place, and one dropped row for each reason."""
    lines: list[dict[str, Any]] = []
    places = ["train"] * train + ["valid"] * valid
    for place in places:
        entry = {"place": place, "tokens": tokens - len(lines) % 40, "trained_tokens": 20, **more}
        lines.append({"file": "rows.jsonl", "line": len(lines) + 1, **entry})
    for reason in dropped:
        entry = {"place": "dropped", "reason": reason, "tokens": 3 * tokens, "trained_tokens": 0}
        lines.append({"file": "rows.jsonl", "line": len(lines) + 1, **entry})
    return lines


def write_run(folder: Path, course: Course | None = None, rows: list[Any] | None = None, **tables: Any) -> Run:
    """A run folder; `tables` are laid over the spec's."""
    folder.mkdir(parents=True)
    given = {name: {**TABLES.get(name, {}), **tables.get(name, {})} for name in {**TABLES, **tables}}
    (folder / CONFIG).write_text(yaml.safe_dump(given))
    write_lines(folder / LEDGER, ledger() if rows is None else rows)
    write_lines(folder / REJECTED, [])
    write_lines(folder / EVENTS, list_events(folder.name, course or Course()))
    lineage = {
        "run": folder.name,
        "created": "2026-11-20T13:00:00+00:00",
        "finished": "2026-11-20T13:02:00+00:00",
        "base": {"name": "practice", "revision": None, "hash": "b" * 64},
        "data": {"train": "rows.jsonl", "hash": "d" * 64},
        "plan": {"hash": "c" * 64, "method": "lora"},
        "versions": {"luthier": "0.1.0"},
        "parents": [],
    }
    (folder / LINEAGE).write_text(json.dumps(lineage))
    return Run(folder)


def paired(count: int = 60) -> Course:
    """A course of training on pairs: the better answer's reward rises, the other one's falls."""

    def rewards(step: int) -> dict[str, float]:
        share = step / count
        wave = 0.1 * math.sin(step)
        chosen, rejected = 0.5 * share + wave, -1.5 * share + wave
        found = {"reward_accuracy": min(1.0, 0.5 + share), "reward_chosen": chosen}
        return {**found, "reward_margin": chosen - rejected, "reward_rejected": rejected}

    losses = [0.69 - 0.005 * step for step in range(count)]
    return Course(
        losses, {step: losses[step - 1] for step in range(20, count + 1, 20)}, rewards(count), of_steps=rewards
    )


def list_events(name: str, course: Course) -> list[dict[str, Any]]:
    """The events of such a run, a second between each and the next."""
    memory = {
        "items": {"weights": 5_000_000, "activations": 60_000_000},
        "total_bytes": 65_000_000,
        "available_bytes": 8 << 30,
        "device": "a processor",
    }
    plan = {
        "steps": len(course.losses),
        "total_parameters": 2_000_000,
        "trainable_parameters": 50_000,
        "memory": memory,
        "seconds": 90.0,
        "decisions": [],
    }
    events: list[dict[str, Any]] = [
        {"kind": "run_started", "run": name},
        {"kind": "planned", "plan": plan},
        {"kind": "engine_loaded", "seconds": 2.5, "packed": True, "trainable": 50_000, "dtype": "bf16"},
    ]
    for step, loss in enumerate(course.losses, 1):
        events.append(step_done(step, loss, grad_norm=course.grad_norm, metrics=course.of_steps(step)))
        if step in course.held_out:
            events.append(evaluated(step, course.held_out[step], course.metrics))
    events += course.more
    last = {"kind": "finished", "step": len(course.losses), "reason": "finished", "seconds": 100.0}
    events += [{"kind": "memory_measured", "predicted_bytes": 65_000_000, "measured_bytes": 90_000_000}]
    events.append(course.last or last)
    start = datetime(2026, 11, 20, 13, tzinfo=UTC)
    return [
        {"seq": n, "time": (start + timedelta(seconds=n)).isoformat(), **event} for n, event in enumerate(events, 1)
    ]


def step_done(step: int, loss: float | None, **more: Any) -> dict[str, Any]:
    """A step as the events tell it."""
    return {
        "kind": "step_done",
        "step": step,
        "loss": loss,
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "tokens": 640,
        "trained_tokens": 160,
        "tokens_per_second": 640.0,
        "seconds": 1.0,
        "memory_bytes": 80_000_000,
        "metrics": {},
        **more,
    }


def evaluated(step: int, loss: float, metrics: dict[str, float] | None = None) -> dict[str, Any]:
    """An evaluation as the events tell it."""
    scores = {"loss": loss, "perplexity": 2.718**loss, "token_accuracy": 0.75, "tokens": 1200, "is_best": True}
    return {"kind": "evaluated", "step": step, **scores, "metrics": metrics or {}}


def write_lines(path: Path, lines: Iterable[Any]) -> None:
    """A JSONL file."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_report(folder: Path, course: Course | None = None, rows: list[Any] | None = None, **tables: Any) -> Report:
    """The same, read."""
    return read_report(write_run(folder, course, rows, **tables))


def comparison(count: int = 12, *, prompt: str = "question", **changes: str) -> dict[str, Any]:
    """A comparison.json with a metric for each change given."""
    results = [
        {
            "prompt": f"{prompt} {number}",
            "lora_response": f"tuned {number}",
            "base_response": f"base {number}",
            "reference": f"right {number}",
            "lora_score": number / count,
            "base_score": 0.1,
        }
        for number in range(count)
    ]
    numbers = {"base": 0.2, "tuned": 0.9, "difference": 0.7, "low": 0.6, "high": 0.8}
    rows = {"wins": 9, "ties": 2, "losses": 1}
    metrics = {name.replace("_", " "): {**numbers, **rows, "verdict": change} for name, change in changes.items()}
    return {"base_model": "practice", "lora_weights": "w", "results": results, "metrics": metrics, "verdict": "as told"}


def looked_for(count: int = 12, **changes: Any) -> dict[str, Any]:
    """What a comparison.json tells beside its metrics, as it is where all is well but the length of the answers."""
    reach = {"difference": 0.0, "low": -0.1, "high": 0.1}
    found: dict[str, Any] = {
        "drift": {
            "words": {"base": 8.0, "tuned": 14.5, "difference": 6.5, "low": 5.0, "high": 8.0, "verdict": "longer"},
            "refusals": {"base": 0.0, "tuned": 0.0, **reach, "verdict": "no detectable difference"},
        },
        "forgetting": {"metric": "general text perplexity", "base": 4.0, "tuned": 4.1, **reach, "verdict": ""},
        "contamination": {"rows": count, "training_rows": 300, "same_row": 0, "same_prompt": 0},
        "parroting": {"base": 0, "tuned": 0, "answers": count},
        "asked": {
            "from": "held.jsonl",
            "prompts": count,
            "max_tokens": 150,
            "temperature": 0.7,
            "seed": 0,
            "cut": {"base": 0, "tuned": 0},
        },
        "notes": [],
    }
    return {
        key: {**value, **changes.get(key, {})} if isinstance(value, dict) else value for key, value in found.items()
    }


def certificate(*, is_valid: bool = True) -> dict[str, Any]:
    """A certificate.json of two claims, the second of which decides."""
    claims = [
        {"claim": "every key matched", "found": "14 of 14", "allowed": "all", "holds": True},
        {"claim": "artefact equals the live model", "found": "0.002", "allowed": "0.01", "holds": is_valid},
    ]
    return {"valid": is_valid, "claims": claims}


def write_hostile(folder: Path) -> Run:
    """A run in which everything that somebody else wrote tries to break out."""
    rows = [
        *ledger(dropped=["not_json", "duplicate", HOSTILE]),
        {"file": HOSTILE, "line": 1, "place": "train", "tokens": 9},
    ]
    run = write_run(folder, Course(more=[{"kind": "warned", "code": "x", "message": HOSTILE}]), rows)
    row = {"file": HOSTILE, "line": 7, "reason": HOSTILE, "message": HOSTILE, "row": f"```\n{HOSTILE}\n````\n# head"}
    write_lines(folder / REJECTED, [row])
    compared = comparison(prompt=HOSTILE, exact_match="better")
    compared["metrics"][HOSTILE] = {"base": 1, "tuned": 2, "difference": 1, "low": 0, "high": 2, "verdict": HOSTILE}
    for result in compared["results"]:
        result |= {"lora_response": HOSTILE, "base_response": HOSTILE, "reference": HOSTILE}
    compared |= {"base_model": HOSTILE, "verdict": HOSTILE, **looked_for(), "notes": [HOSTILE]}
    compared["asked"]["from"] = compared["forgetting"]["metric"] = HOSTILE
    compared["drift"]["words"]["verdict"] = compared["drift"]["refusals"]["verdict"] = HOSTILE
    compared["drift"][HOSTILE] = compared["drift"]["words"]
    (folder / "comparison.json").write_text(json.dumps(compared))
    claims = [{"claim": HOSTILE, "found": HOSTILE, "allowed": HOSTILE, "holds": True}]
    (folder / "certificate.json").write_text(json.dumps({"valid": True, "claims": claims}))
    lineage = json.loads((folder / LINEAGE).read_text())
    lineage["base"]["name"], lineage["versions"] = HOSTILE, {HOSTILE: HOSTILE}
    (folder / LINEAGE).write_text(json.dumps(lineage))
    return run
