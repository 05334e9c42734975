"""Names inside a run folder, and the name of the folder itself."""

from __future__ import annotations

import re
import secrets
from datetime import datetime
from pathlib import Path

from luthier.machine import expand

CONFIG = "finetune_config.yaml"
LEDGER = "ledger.jsonl"
REJECTED = "rejected.jsonl"
EVENTS = "events.jsonl"
TRAINING_LOG = "training_log.json"
LINEAGE = "lineage.json"
PROBE = "probe.safetensors"
LOCK = "run.lock"
FINAL_LORA_WEIGHTS = "final_lora_weights"
FINAL_MODEL = "final_model"
MERGED_MODEL = "merged_model"
TRAINING_STATE = "training_state"
PRACTICE = "practice"

_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_MAX_NAME = 80


def checkpoint_name(step: int | str) -> str:
    """The folder of a checkpoint's weights; `*` gives the pattern of all."""
    return f"checkpoint_step_{step}"


def state_name(step: int | str) -> str:
    """The folder of a checkpoint's training state, inside `training_state`."""
    return f"step_{step}"


def base_label(base: str) -> str:
    """A base model in short: its hub id, the name of its folder, or the base that an `ft:` id names."""
    while base.startswith("ft:"):
        base = base.removeprefix("ft:").rpartition(":")[0]
    is_path = base.startswith((".", "/", "~")) or Path(base).is_dir()
    return f"local/{expand(base).resolve().name}" if is_path and base != PRACTICE else base


def run_id(method: str, base: str, now: datetime, random: str = "") -> str:
    """The name of a run folder: method, base, date, time and four random letters, in safe characters only."""
    label = base_label(base)
    named = "luthier/practice" if label == PRACTICE else label
    safe = _UNSAFE.sub("_", named).strip("._")[:_MAX_NAME] or "model"
    return f"{method}_{safe}_{now:%Y%m%d_%H%M%S}_{random or ''.join(secrets.choice(_LETTERS) for _ in range(4))}"


def model_id(base: str, run: str) -> str:
    """The `ft:` id of a run's result; its last colon part is the run's id."""
    return f"ft:{base_label(base)}:{run}"
