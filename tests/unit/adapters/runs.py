"""Finished runs with a real adapter or a real model in them, for what is done with a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from luthier.errors import ProofError
from luthier.runs import events
from luthier.runs.layout import FINAL_LORA_WEIGHTS, FINAL_MODEL
from luthier.runs.lineage import write_lineage
from luthier.runs.manifest import seal
from luthier.runs.models import register
from luthier.runs.resolve import practice_folder
from luthier.runs.run import Run
from luthier.weights.peft import AdapterConfig, write_adapter
from tests.unit.runs.made import build_spec, make_run, write_rows

MODULES = {"self_attn.q_proj": (256, 192), "mlp.down_proj": (192, 512)}
CONFIG = AdapterConfig("practice", rank=2, alpha=4.0, targets=("q_proj", "down_proj"))


def finished_run(folder: Path, *, kind: str = "lora", base: str = "practice", seed: int = 0, **tables: Any) -> Run:
    """A run of the practice model, trained as far as anybody can tell from its folder."""
    method = {"kind": kind} if kind == "full" else {"kind": kind, "rank": 2, "targets": ["q_proj", "down_proj"]}
    run = make_run(folder / "runs", build_spec(write_rows(folder / "rows.jsonl"), base, method=method, **tables))
    is_full = kind == "full"
    seal(run.folder / (FINAL_MODEL if is_full else FINAL_LORA_WEIGHTS), full_model if is_full else adapter(seed), {})
    run.events.append(events.RunStarted(run.id))
    run.events.append(events.Finished(5, "all steps done", 1.5))
    write_lineage(run, {"metrics": {"train_loss": 0.25, "valid_loss": 0.5}, "steps": 5})
    register(run)
    return run


def full_model(draft: Path) -> None:
    for path in practice_folder().iterdir():
        if path.is_file():
            (draft / path.name).write_bytes(path.read_bytes())


def adapter(seed: int) -> Any:
    source = np.random.default_rng(seed)
    tensors = {}
    for layer in (2, 3):
        for module, (out, into) in MODULES.items():
            name = f"model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A"] = source.normal(size=(2, into)).astype(np.float32)
            tensors[f"{name}.lora_B"] = source.normal(scale=0.02, size=(out, 2)).astype(np.float32)

    def write(draft: Path) -> None:
        write_adapter(draft, CONFIG, tensors)
        (draft / "README.md").write_text("the card of the training")

    return write


def certified(run: Run) -> None:
    """A certificate that holds."""


def uncertified(run: Run) -> None:
    """One that does not."""
    raise ProofError(f"the certificate of {run.id} is not valid")
