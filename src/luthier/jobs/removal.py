"""Deleting what a job left on the disk."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

from luthier.jobs.ids import is_id
from luthier.runs.layout import (
    FINAL_LORA_WEIGHTS,
    FINAL_MODEL,
    MERGED_MODEL,
    TRAINING_STATE,
    checkpoint_name,
)
from luthier.runs.manifest import storage_errors

_MODELS = (FINAL_LORA_WEIGHTS, FINAL_MODEL, MERGED_MODEL, TRAINING_STATE, checkpoint_name("*"))


def remove_run(home: Path, job: str) -> None:
    """Remove everything of a job."""
    assert is_id(job)
    _remove(home, home / "runs" / job)
    _remove(home, home / "attempts" / job)


def remove_models(home: Path, job: str) -> None:
    """Remove weights and checkpoints, and leave the run's logs and reports."""
    assert is_id(job)
    for pattern in _MODELS:
        for path in (home / "runs" / job).glob(pattern):
            _remove(home, path)


def _remove(home: Path, path: Path) -> None:
    """Out of sight by one rename, then gone; what a crash leaves in `tmp` is removed at the next start."""
    with storage_errors(path):
        if not path.exists():
            return
        (home / "tmp").mkdir(exist_ok=True, mode=0o700)
        aside = home / "tmp" / f"removed-{secrets.token_hex(8)}"
        path.rename(aside)
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
