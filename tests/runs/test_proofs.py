"""`luthier prove` on a spec of one's own: it holds, and it leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from tests.runs.children import Nursery
from tests.runs.conftest import MakeSpec
from tests.unit.training.works import NEEDS_TORCH

pytestmark = NEEDS_TORCH

SMALL = {"optim.steps": 3, "rows.train": 6, "rows.valid": 2, "optim.batch": 3}


@pytest.mark.slow
def test_resume_is_proved(nursery: Nursery, write_spec: MakeSpec, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, {**SMALL, "output.model_id_file": str(tmp_path / "id.txt"), "output.merge": True})
    child = nursery.start("prove", "resume", spec, folder=tmp_path).ends(0)
    for name in (
        "checkpoint_step_3/adapter_model.safetensors",
        "final_lora_weights/adapter_model.safetensors",
        "training_state/step_3/optimizer.safetensors",
    ):
        assert re.search(rf"{re.escape(name)} +equal\n", child.out)
    assert "proved: stopped and resumed equals never stopped, over 3 steps" in child.out
    assert not (tmp_path / "id.txt").exists()
    assert not (tmp_path / "runs").exists()
    assert list(Path(os.environ["LUTHIER_HOME"], "models").glob("*.json")) == []
    refused = nursery.start("prove", "resume", spec, "--stop-at", 3, folder=tmp_path).ends(2)
    assert "--stop-at 3 must lie between 1 and 2" in refused.err


@pytest.mark.slow
def test_invariance_is_proved(nursery: Nursery, write_spec: MakeSpec, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, SMALL)
    child = nursery.start(
        "prove", "invariance", spec, "--json", folder=tmp_path, hook="tests.runs.hooks:fork_ranks"
    ).ends(0)
    found = json.loads(child.out)
    assert found["holds"] is True
    said = {each["what"]: each["difference"] for each in found["compared"]}
    assert list(said) == [
        f"{way}: {key}"
        for way in ("3 x 1 = 1 x 3", "packed = unpacked", "1 = 2 processes")
        for key in ("loss", "grad_norm")
    ]
    assert max(said.values()) < 1e-4


@pytest.mark.slow
def test_invariance_leaves_two_processes_out_where_an_engine_has_one(
    nursery: Nursery, write_spec: MakeSpec, tmp_path: Path
) -> None:
    pytest.importorskip("mlx_lm")
    spec = write_spec(tmp_path, {**SMALL, "engine.kind": "mlx"})
    child = nursery.start("prove", "invariance", spec, folder=tmp_path).ends(0)
    assert "engine `mlx` runs in one process, so two are left out" in child.out + child.err
    assert "packed = unpacked" in child.out
    assert "2 processes: " not in child.out
