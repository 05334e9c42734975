"""Runs of the mlx engine through the loop: stopped and resumed equals never stopped, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier.errors import SpecError
from luthier.runs.manifest import hash_file
from luthier.training.proofs import prove_resume
from luthier.training.session import train
from tests.unit.adapters.trained import save_model
from tests.unit.training.works import NEEDS_TORCH, Watched, make_spec, make_work, resume, run_whole, stop_after

pytest.importorskip("mlx_lm")
pytestmark = [*NEEDS_TORCH, pytest.mark.slow]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method.dropout": 0.2},
    "qlora": {"method.kind": "qlora"},
    "full": {"method.kind": "full"},
    "dpo": {"objective.kind": "dpo"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("method", METHODS)
def test_stopped_and_resumed_is_never_stopped(method: str, base: Path, tmp_path: Path) -> None:
    changes = {"engine.kind": "mlx", "model.base": str(base), "data.max_length": 128, **METHODS[method]}
    whole, watched = run_whole(tmp_path / "whole", changes)
    assert len(watched.losses) == 6
    first = Watched()
    work = make_work(tmp_path / "stopped", changes, watch=first)
    first.after = stop_after(3, work.stop)
    assert not train(work).outcome.is_done
    done, second = resume(work)
    assert done.outcome.is_done
    assert first.losses + second.losses == watched.losses
    names = ["final_model/model.safetensors"] if method == "full" else ["final_lora_weights/adapter_model.safetensors"]
    for name in names:
        assert hash_file(work.run.folder / name) == hash_file(whole.folder / name)


def test_it_is_proved_on_one_s_own_spec(base: Path, tmp_path: Path) -> None:
    changes = {"engine.kind": "mlx", "model.base": str(base)}
    numbers = iter(range(9))

    def make(more: dict[str, object], folder: Path | None) -> Any:
        return make_work(tmp_path / str(next(numbers)), {**changes, **more})

    found = prove_resume(make, steps=4, stop_at=2, tell=lambda _: None)
    assert len(found) >= 3
    assert all(each.difference == 0 for each in found)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"optim.kind": "adamw_8bit"}, "`optim.kind` engine `mlx`"),
        ({"optim.kind": "adafactor"}, "`optim.kind` engine `mlx`"),
        ({"compute.processes": 2}, "one process"),
        ({"compute.precision": "fp16"}, "fp16"),
        ({"engine.kind": "torch", "method.kind": "qlora", "method.bits": 8}, "NF4"),
    ],
)
def test_what_an_engine_cannot_honour_is_an_error_of_the_spec(
    changes: dict[str, Any], what: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=what):
        make_spec(tmp_path, {"engine.kind": "mlx", "model.base": str(base), **changes})
