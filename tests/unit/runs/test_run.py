"""A run's folder: what is in it from the start, who may train it, and how it stands."""

from __future__ import annotations

import json
import multiprocessing
import re
from pathlib import Path

import orjson
import pytest

from luthier.errors import RunError, RunLockedError, StorageError
from luthier.runs import events
from luthier.runs.lineage import base_hash, data_hash, file_hashes, is_same_base, list_changes, write_lineage
from luthier.runs.manifest import hash_file
from luthier.runs.resolve import find_resolved, practice_folder
from luthier.runs.run import Run, open_run, write_training_log
from luthier.workflow import prepare_data
from tests.unit.runs.made import build_plan, build_spec, finish, make_run, same_spec, step_done, write_rows


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "runs", build_spec(write_rows(tmp_path / "rows.jsonl")))


def test_a_new_run_holds_plan_ledger_and_lineage(run: Run, tmp_path: Path) -> None:
    assert re.fullmatch(r"qlora_luthier_practice_20261120_143000_[a-z0-9]{4}", run.id)
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "finetune_config.yaml",
        "ledger.jsonl",
        "lineage.json",
        "rejected.jsonl",
    ]
    spec = build_spec(tmp_path / "rows.jsonl")
    assert same_spec(run.spec, spec)
    prepared = prepare_data(spec)
    assert (run.folder / "ledger.jsonl").read_bytes() == (prepared.folder / "ledger.jsonl").read_bytes()
    lineage = run.lineage
    assert lineage["data"]["hash"] == data_hash(prepared)
    assert lineage["data"]["rows"] == {"rows": 10, "train": 7, "valid": 2, "dropped": 1}
    assert lineage["plan"]["hash"] == build_plan(spec, prepared).hash()
    assert lineage["base"]["files"]["model.safetensors"] == hash_file(practice_folder() / "model.safetensors")
    assert (lineage["parent"], lineage["parents"], lineage["finished"]) == (None, [], None)
    assert {"luthier", "python", "numpy"} <= set(lineage["versions"])


def test_a_run_opens_by_folder_id_and_ft_id(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (run.folder, str(run.folder), run.id, f"ft:practice:{run.id}", run.model_id):
        assert open_run(name).folder.resolve() == run.folder.resolve()
    monkeypatch.chdir(tmp_path)
    assert open_run(run.id).folder == Path("runs") / run.id


def test_what_is_no_run_says_so(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run `nowhere`") as caught:
        open_run("nowhere")
    assert "luthier models" in caught.value.hint
    with pytest.raises(RunError) as caught:
        open_run(run.id[:-1])
    assert caught.value.hint == f"did you mean `{run.id}`?"
    with pytest.raises(RunError, match="not a run folder"):
        open_run(tmp_path)
    run.folder.rename(tmp_path / "moved")
    with pytest.raises(RunError, match="is gone") as caught:
        open_run(run.id)
    assert f"luthier models remove {run.id}" in caught.value.hint
    assert open_run(tmp_path / "moved").spec.seed == 0


def test_the_state_follows_the_events(run: Run) -> None:
    assert run.state == "stopped"
    run.events.append(events.RunStarted(run.id))
    assert run.state == "stopped"  # nobody holds the lock: its process died
    with run.lock():
        assert run.state == "running"
        for event, state in (
            (events.Paused(3, "disk full"), "paused"),
            (events.Resumed(2), "running"),
            (events.Stopped(4, "SIGTERM"), "stopped"),
            (events.Failed("non_finite_loss", "x"), "failed"),
            (events.Finished(5, "done", 1.0), "finished"),
        ):
            run.events.append(event)
            assert run.state == state
    assert run.state == "finished"


def test_final_weights_count_once_they_are_sealed(run: Run) -> None:
    (run.folder / "final_lora_weights").mkdir()
    assert run.final_weights is None
    assert finish(run) == run.final_weights


def test_the_rows_held_out_are_those_of_the_ledger(run: Run) -> None:
    held = run.held_out_rows()
    assert len(held) == 2
    entries = [json.loads(line) for line in (run.folder / "ledger.jsonl").read_text().splitlines()]
    assert held == {("rows.jsonl", entry["line"]) for entry in entries if entry["place"] == "valid"}


def _hold(folder: Path, ready: object, done: object) -> None:
    with Run(folder).lock():
        ready.set()  # type: ignore[attr-defined]
        done.wait(20)  # type: ignore[attr-defined]


def test_only_one_process_trains_a_run(run: Run) -> None:
    spawn = multiprocessing.get_context("spawn")
    ready, done = spawn.Event(), spawn.Event()
    child = spawn.Process(target=_hold, args=(run.folder, ready, done))
    child.start()
    assert ready.wait(20)
    assert run.is_locked
    with pytest.raises(RunLockedError, match=rf"being trained by another process \(pid {child.pid}\)"), run.lock():
        pass
    child.kill()
    child.join()
    assert not run.is_locked
    with run.lock():
        assert run.is_locked
    assert not run.is_locked


def test_the_lock_leaves_errors_of_training_alone(run: Run) -> None:
    with pytest.raises(PermissionError) as caught, run.lock():
        raise PermissionError(13, "Permission denied")
    assert not isinstance(caught.value, StorageError)


def test_the_training_log_has_one_entry_a_step(run: Run) -> None:
    said = [
        step_done(1, 3.0),
        step_done(2, 2.5, metrics={"margin": 0.1}),
        events.Evaluated(2, 2.4, 11.0, 0.5, 40, True),
        step_done(3, 9.9),
        events.Evaluated(3, 9.9, 11.0, 0.5, 40, False),
        events.Resumed(2),
        events.StepSkipped(3, "loss is not finite", ["rows.jsonl:4"]),
        step_done(4, 2.0),
    ]
    for event in said:
        run.events.append(event)
    log = write_training_log(run)
    assert json.loads((run.folder / "training_log.json").read_text()) == log
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert log[1]["eval"] == {"loss": 2.4, "perplexity": 11.0, "token_accuracy": 0.5, "tokens": 40, "is_best": True}
    assert (log[1]["margin"], log[0]["loss"], log[0]["learning_rate"]) == (0.1, 3.0, 1e-3)
    assert log[2] == {"step": 3, "skipped": "loss is not finite"}
    assert "seq" not in log[0]


def test_lineage_grows_with_what_is_learnt(run: Run) -> None:
    write_lineage(run, {"metrics": {"loss": 1.0}, "finished": "now"})
    write_lineage(run, {"metrics": {"accuracy": 0.5}})
    assert run.lineage["metrics"] == {"loss": 1.0, "accuracy": 0.5}
    assert run.lineage["finished"] == "now"
    assert run.lineage["run"] == run.id


def test_what_changed_since_the_start_is_named(run: Run, tmp_path: Path) -> None:
    resolved = find_resolved("practice")
    spec, prepared = run.spec, prepare_data(run.spec)
    assert list_changes(run.folder, build_plan(spec, prepared), prepared, resolved) == []
    other = build_spec(write_rows(tmp_path / "other" / "rows.jsonl", 11), seed=3)
    told = list_changes(run.folder, build_plan(other, prepare_data(other)), prepare_data(other), resolved)
    assert [line.partition(" (")[0] for line in told] == ["the data", "the plan"]
    copied = tmp_path / "copy"
    copied.mkdir()
    for path in practice_folder().iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    assert list_changes(run.folder, build_plan(spec, prepared), prepared, find_resolved(str(copied))) == []
    (copied / "config.json").write_bytes((copied / "config.json").read_bytes() + b"\n")
    told = list_changes(run.folder, build_plan(spec, prepared), prepared, find_resolved(str(copied)))
    assert [line.partition(" (")[0] for line in told] == ["the base model"]
    (run.folder / "lineage.json").write_bytes(b"{")
    assert list_changes(run.folder, build_plan(spec, prepared), prepared, resolved) == [
        "the lineage of the run, which cannot be read"
    ]


def test_a_hash_is_remembered_until_the_file_changes(
    tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    folder = tmp_path / "model"
    folder.mkdir()
    path = folder / "model.safetensors"
    path.write_bytes(b"1")
    (folder / "README.md").write_text("not of the model")
    first = file_hashes(folder)
    assert list(first) == ["model.safetensors"]
    assert not (own_home / "hashes.json").exists()  # written a moment ago
    os.utime(path, (1, 1))
    assert file_hashes(folder) == first
    assert list(orjson.loads((own_home / "hashes.json").read_bytes())) == [str(path.resolve())]
    with monkeypatch.context() as patched:
        patched.setattr("luthier.runs.lineage.hash_file", lambda path: pytest.fail("hashed again"))
        assert file_hashes(folder) == first
    path.write_bytes(b"2")
    os.utime(path, (1, 1))
    assert file_hashes(folder) != first
    assert base_hash(folder) != ""


def test_the_hub_cache_names_large_files_by_their_hash(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    digest = "a" * 64
    (tmp_path / "blobs" / digest).write_bytes(b"large")
    (tmp_path / "snapshots" / "model.safetensors").symlink_to(f"../blobs/{digest}")
    assert file_hashes(tmp_path / "snapshots") == {"model.safetensors": digest}


def test_more_files_of_one_commit_are_the_same_base() -> None:
    commit = "c" * 40

    def base(revision: str | None, **files: str) -> dict[str, object]:
        return {"revision": revision, "files": files, "adapters": [], "hash": repr((revision, files))}

    first = base(commit, config="1", weights="2")
    assert is_same_base(first, base(commit, config="1", weights="2", licence="3"))
    assert not is_same_base(first, base(commit, config="1", weights="3"))
    assert not is_same_base(first, base("d" * 40, config="1", weights="2", licence="3"))
    assert not is_same_base(base(None, config="1"), base(None, config="1", licence="3"))
    assert not is_same_base(first, {**base(commit, config="1"), "adapters": [{"hash": "x"}]})
