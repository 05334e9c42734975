"""The journal is computed, and agrees with the order that training follows."""

from __future__ import annotations

import math
import tempfile
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.prepared import Prepared
from luthier.errors import CallError
from luthier.runs.journal import (
    find_file,
    find_in_ledger,
    planned_steps,
    read_records,
    rows_of_step,
    steps_of_row,
    stream_end,
)
from luthier.workflow import prepare_data
from tests.unit.runs.made import build_spec, write_rows


@cache
def rows() -> Path:
    return write_rows(Path(tempfile.mkdtemp()) / "rows.jsonl", 12)


@pytest.fixture
def prepared() -> Prepared:
    return prepare_data(build_spec(rows()))


@given(batch=st.integers(1, 12), epochs=st.floats(0.1, 3.5), steps=st.integers(0, 9), seed=st.integers(0, 9))
def test_steps_and_rows_agree_with_each_other(batch: int, epochs: float, steps: int, seed: int) -> None:
    optim = {"batch": batch, "epochs": epochs, "steps": steps, "learning_rate": 1e-3}
    spec = build_spec(rows(), seed=seed, optim=optim)
    prepared = prepare_data(build_spec(rows()))
    total = planned_steps(spec, prepared)
    by_step = {step: [row.where for row in rows_of_step(spec, prepared, step)] for step in range(1, total + 1)}
    trained = sum(len(each) for each in by_step.values())
    assert trained == (steps * batch if steps else max(1, round(9 * epochs)))
    assert all(len(each) == batch for each in list(by_step.values())[:-1])
    for line in range(1, 13):
        found = steps_of_row(spec, prepared, "rows.jsonl", line)
        assert found == [step for step, each in by_step.items() if f"rows.jsonl:{line}" in each]


def test_the_stream_ends_where_the_epochs_say() -> None:
    assert stream_end(build_spec(rows(), optim={"epochs": 1.5}), 9) == round(13.5)
    assert stream_end(build_spec(rows(), optim={"epochs": 0.01}), 9) == 1
    assert stream_end(build_spec(rows(), optim={"steps": 3}), 9) is None


def test_a_step_that_is_not_of_the_run_is_refused(prepared: Prepared) -> None:
    spec = build_spec(rows())
    total = math.ceil(18 / 3)
    for step in (0, total + 1):
        with pytest.raises(CallError, match=f"the run has the steps 1 to {total}"):
            rows_of_step(spec, prepared, step)


def test_rows_held_out_dropped_or_unknown_have_no_steps(prepared: Prepared) -> None:
    spec = build_spec(rows())
    places = {}
    for line in range(1, 13):
        entry = find_in_ledger(prepared.folder / "ledger.jsonl", "rows.jsonl", line)
        assert entry is not None
        places[line] = entry["place"]
        assert bool(steps_of_row(spec, prepared, "rows.jsonl", line)) == (entry["place"] == "train")
    assert sorted(places.values()) == ["dropped", *["train"] * 9, "valid", "valid"]
    assert steps_of_row(spec, prepared, "rows.jsonl", 99) == []
    assert steps_of_row(spec, prepared, "other.jsonl", 1) == []
    assert find_in_ledger(prepared.folder / "ledger.jsonl", "rows.jsonl", 99) is None


def test_files_are_named_by_name_or_path() -> None:
    assert find_file(["rows.jsonl"], "data/rows.jsonl") == "rows.jsonl"
    assert find_file(["a/rows.jsonl", "b/rows.jsonl"], "a/rows.jsonl") == "a/rows.jsonl"
    with pytest.raises(CallError, match="several files are called") as caught:
        find_file(["a/rows.jsonl", "b/rows.jsonl"], "rows.jsonl")
    assert "a/rows.jsonl, b/rows.jsonl" in caught.value.hint
    with pytest.raises(CallError, match="no rows were read from"):
        find_file(["rows.jsonl"], "other.jsonl")


def test_what_a_resume_threw_away_is_forgotten() -> None:
    def said(kind: str, step: int) -> dict[str, object]:
        return {"kind": kind, "step": step, "reason": "x"}

    records = read_records(
        [
            said("step_done", 1),
            said("step_replayed", 2),
            said("step_done", 2),
            said("step_done", 3),
            said("step_skipped", 4),
            said("resumed", 2),
            said("step_skipped", 3),
        ]
    )
    assert sorted(records) == [1, 2, 3]
    assert (records[1].is_done, records[1].deviations) == (True, [])
    assert (records[2].is_done, [each["kind"] for each in records[2].deviations]) == (True, ["step_replayed"])
    assert (records[3].is_done, [each["kind"] for each in records[3].deviations]) == (False, ["step_skipped"])
