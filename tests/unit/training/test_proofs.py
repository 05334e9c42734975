"""A proof that does not hold says where two sides part, and one that was stopped proves nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from luthier.errors import CallError, ProofError
from luthier.training import proofs
from luthier.training.proofs import Compared, prove_resume
from tests.unit.training.works import NEEDS_TORCH, Watched, make_work, stop_after

pytestmark = NEEDS_TORCH


def test_a_proof_that_does_not_hold_says_where() -> None:
    found = [Compared("a", 0.0, 0.0), Compared("b", 2.0, 0.0)]
    with pytest.raises(ProofError, match="the resume proof does not hold: b: 2 apart, 0 allowed") as caught:
        proofs._held(found, "resume")
    assert len(caught.value.details) == 2  # type: ignore[arg-type]
    with pytest.raises(ProofError, match="compared nothing"):
        proofs._held([], "resume")


def test_one_changed_bit_is_a_difference(tmp_path: Path) -> None:
    tensors = {"a": np.ones(3, np.float32), "b": np.zeros(2, np.float32)}
    save_file(tensors, tmp_path / "one")
    save_file({**tensors, "b": np.array([0.0, -0.0], np.float32)}, tmp_path / "two")
    save_file({"a": tensors["a"]}, tmp_path / "three")
    assert proofs._count_differences(tmp_path / "one", tmp_path / "one") == 0
    assert proofs._count_differences(tmp_path / "one", tmp_path / "two") == 1
    assert proofs._count_differences(tmp_path / "one", tmp_path / "three") == 1


def test_a_proof_stopped_by_a_person_proves_nothing(tmp_path: Path) -> None:
    def make(changes: dict[str, object], folder: Path | None) -> object:
        work = make_work(tmp_path / str(len(list(tmp_path.iterdir()))), {"optim.steps": 3})
        return replace(work, watch=Watched(after=stop_after(1, work.stop)))

    with pytest.raises(ProofError, match="stopped by SIGTERM: nothing was proved") as caught:
        prove_resume(make, steps=3, stop_at=2, tell=lambda _: None)  # type: ignore[arg-type]
    assert caught.value.exit_code == 143
    with pytest.raises(CallError):
        prove_resume(make, steps=3, stop_at=3, tell=lambda _: None)  # type: ignore[arg-type]
