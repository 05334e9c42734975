"""Stopped and resumed equals never stopped, wherever the stop comes; and what cannot be resumed says why."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file

from luthier.adapters import merge
from luthier.errors import CheckpointError, DiskFullError, ResumeError, RunLockedError
from luthier.runs import events
from luthier.runs.layout import CONFIG, MERGED_MODEL
from luthier.runs.run import Run, open_run
from luthier.training import session
from luthier.training.session import Work, train
from luthier.training.signals import StopFlag
from luthier.workflow import Ready, complete_run, is_complete, needs_merge, train_run
from tests.unit.runs.folders import DAMAGES
from tests.unit.training.works import (
    NEEDS_TORCH,
    Watched,
    again,
    final_hash,
    make_work,
    resume,
    run_whole,
    signal_at,
    stop_after,
    with_faults,
)

pytestmark = NEEDS_TORCH
Patch = pytest.MonkeyPatch
BEST = {"evaluate.every_steps": 1, "evaluate.keep": "best", "optim.learning_rate": 0.05, "output.keep_checkpoints": 1}
DPO = {"objective.kind": "dpo"}
PATIENT = {**BEST, "evaluate.early_stop_patience": 2, "optim.steps": 12, "optim.schedule": "constant"}
CASES: dict[str, dict[str, Any]] = {
    "sft": {},
    "best": BEST,
    "patient": PATIENT,
    "dpo": DPO,
    "simpo": {"objective.kind": "simpo"},
    "orpo": {"objective.kind": "orpo"},
    "pretrain": {"objective.kind": "pretrain"},
    "qlora": {"method.kind": "qlora"},
    "bf16": {"compute.precision": "bf16"},
    "whole modules": {"method.also_train": ["embed_tokens"], "optim.learning_rate": 1e-3},
    "8bit": {"optim.kind": "adamw_8bit"},
    "adafactor": {"optim.kind": "adafactor"},
    "full": {"method.kind": "full", "optim.learning_rate": 1e-3, "optim.steps": 3, "output.save_every_steps": 1},
}


def weights_of(run: Run) -> dict[str, bytes]:
    """Every tensor of the result."""
    folder = run.final_weights
    assert folder is not None
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {name: tensor.tobytes() for name, tensor in load_file(path).items()}
    assert found
    return found


@pytest.mark.parametrize(
    "name", ["sft", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "sft")]
)
def test_stopped_and_resumed_twice_equals_never_stopped(name: str, tmp_path: Path) -> None:
    whole, watched = run_whole(tmp_path / "whole", CASES[name])
    work = make_work(tmp_path / "stopped", CASES[name])
    watch = Watched(after=stop_after(1, work.stop))
    assert train(replace(work, watch=watch)).outcome.step == 1
    assert work.run.state == "stopped"
    second = Watched()
    once_more = again(work, watch=second)
    second.after = stop_after(2, once_more.stop)
    assert train(once_more, resume=True).outcome.step == 2
    ended, last = resume(work)
    assert ended.outcome.is_done
    assert [event.step for event in last.of(events.Resumed)] == [2]
    assert weights_of(work.run) == weights_of(whole)
    assert watch.losses + second.losses + last.losses == watched.losses
    log = json.loads((work.run.folder / "training_log.json").read_bytes())
    assert [entry["loss"] for entry in log] == watched.losses


@pytest.mark.slow
def test_early_stopping_and_the_best_weights_are_really_tried(tmp_path: Path) -> None:
    run, watched = run_whole(tmp_path, PATIENT)
    scores = watched.of(events.Evaluated)
    assert len(watched.losses) < 12
    assert [event["reason"] for event in run.read_events() if event["kind"] == "finished"] == ["early_stop"]
    best = [score for score in scores if score.is_best][-1]
    assert best.step == len(watched.losses) - 2
    final = load_file(run.folder / "final_lora_weights" / "adapter_model.safetensors")
    kept = load_file(run.folder / f"checkpoint_step_{best.step}" / "adapter_model.safetensors")
    assert {name: tensor.tobytes() for name, tensor in final.items()} == {
        name: tensor.tobytes() for name, tensor in kept.items()
    }


def test_a_run_that_never_got_to_a_checkpoint_starts_over(tmp_path: Path, patch: Patch) -> None:
    whole, _ = run_whole(tmp_path / "whole")
    work = make_work(tmp_path / "died")
    with patch.context() as once:
        with_faults(once, before_backward=_die_at(2))
        with pytest.raises(ZeroDivisionError):
            train(work)
    assert work.run.state == "failed"
    ended, watched = resume(work)
    assert ended.outcome.reason == "finished"
    assert [event.step for event in watched.of(events.Resumed)] == [0]
    assert [event["attempt"] for event in work.run.read_events() if event["kind"] == "run_started"] == [1, 2]
    assert final_hash(work.run) == final_hash(whole)


def _die_at(number: int) -> Any:
    def die(call: int, _: object) -> None:
        assert call <= number
        if call == number:
            raise ZeroDivisionError

    return die


# -- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_ends_the_run_within_one_micro_step(name: str, tmp_path: Path, patch: Patch) -> None:
    changes = {"optim.micro_batch": 1}
    whole, _ = run_whole(tmp_path / "whole", changes)
    work = make_work(tmp_path / "asked", changes)
    with patch.context() as once:
        engines = with_faults(once, before_backward=signal_at([10], name))  # the second micro-batch of the third step
        ended = train(work)
    assert (ended.outcome.step, ended.outcome.reason) == (2, name)
    assert engines[0].calls["backward"] == 10
    assert work.run.checkpoints().find_newest()[0].step == 2  # type: ignore[union-attr]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    resume(work)
    assert final_hash(work.run) == final_hash(whole)


@pytest.mark.slow
def test_a_signal_ends_an_evaluation_within_one_micro_step(tmp_path: Path, patch: Patch) -> None:
    changes = {"evaluate.every_steps": 2, "rows.valid": 8, "compute.micro_batch_tokens": 70}
    whole, _ = run_whole(tmp_path / "whole", changes)
    work = make_work(tmp_path / "asked", changes)
    with patch.context() as once:
        engines = with_faults(once, before_forward=signal_at([2]))
        ended = train(work)
    assert (ended.outcome.step, ended.outcome.reason) == (2, "SIGTERM")
    assert engines[0].calls["forward"] == 2
    assert work.run.checkpoints().find_newest()[0].step == 2  # type: ignore[union-attr]
    _, watched = resume(work)
    assert [event.step for event in watched.of(events.Evaluated)] == [2, 4, 6]
    assert final_hash(work.run) == final_hash(whole)


@pytest.mark.slow
def test_a_signal_ends_the_pass_of_the_reference(tmp_path: Path, patch: Patch) -> None:
    changes = {**DPO, "compute.micro_batch_tokens": 70}
    whole, _ = run_whole(tmp_path / "whole", changes)
    work = make_work(tmp_path / "asked", changes)
    with patch.context() as once:
        engines = with_faults(once, before_forward=signal_at([3]))
        ended = train(work)
    assert (ended.outcome.step, ended.outcome.reason) == (0, "SIGTERM")
    assert engines[0].calls == {"forward": 3}
    assert work.run.state == "stopped"
    resume(work)
    assert final_hash(work.run) == final_hash(whole)


def test_a_signal_while_the_model_is_loaded_waits_for_nothing(tmp_path: Path, patch: Patch) -> None:
    work = make_work(tmp_path)

    def build(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the loading went on")

    patch.setattr(session, "find_engine", lambda _: build)
    ended = train(work)
    assert (ended.outcome.step, ended.outcome.reason, ended.final) == (0, "SIGTERM", None)
    assert [event["kind"] for event in work.run.read_events()][-1] == "stopped"


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, patch: Patch) -> None:
    work = make_work(tmp_path)
    with_faults(patch, before_backward=lambda number, _: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        train(work)
    assert work.run.state == "stopped"
    assert work.run.checkpoints().find_newest()[0] is None
    patch.undo()
    assert resume(work)[0].outcome.reason == "finished"


def test_a_signal_while_merging_leaves_the_adapter_and_a_resume_merges(tmp_path: Path, patch: Patch) -> None:
    work = make_work(tmp_path, {"output.merge": True})
    polled = []

    def poll(job: Any) -> None:
        polled.append(job)
        if len(polled) == 3:
            signal.raise_signal(signal.SIGTERM)
        ask(job)

    ask = merge._poll
    patch.setattr(merge, "_poll", poll)
    stop = StopFlag()
    ready = Ready(work.plan, work.prepared, work.resolved)
    trained = train_run(work.run, ready, watch=Watched(), stop=stop)
    assert (trained.outcome.reason, trained.merged, stop.reason) == ("finished", None, "SIGTERM")
    assert len(polled) == 3
    assert not list(work.run.folder.glob(f"{MERGED_MODEL}*"))
    assert (work.run.state, needs_merge(work.run), is_complete(work.run)) == ("finished", True, False)
    assert complete_run(work.run, watch=Watched(), stop=StopFlag()) == work.run.folder / MERGED_MODEL
    assert is_complete(work.run)


# -- checkpoints that break -------------------------------------------------------------------------------------------

FILES = (
    "checkpoint_step_5/adapter_config.json",
    "checkpoint_step_5/adapter_model.safetensors",
    "checkpoint_step_5/manifest.json",
    "training_state/step_5/optimizer.safetensors",
    "training_state/step_5/manifest.json",
)
BREAKS = ("delete", "truncate to half", "empty", "zero bytes")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Work, str]:
    """A run stopped at step 5, with checkpoints of steps 2, 4 and 5; and the hash it should end with."""
    folder = tmp_path_factory.mktemp("stopped")
    patch = pytest.MonkeyPatch()
    patch.setenv("LUTHIER_HOME", str(folder / "home"))
    whole, _ = run_whole(folder / "whole")
    work = make_work(folder / "stopped")
    train(replace(work, watch=Watched(after=stop_after(5, work.stop))))
    patch.undo()
    assert sorted(path.name for path in (work.run.folder / "training_state").iterdir()) == ["step_4", "step_5"]
    return work, final_hash(whole)


def copied(work: Work, folder: Path) -> Work:
    """The same run in a folder of its own."""
    shutil.copytree(work.run.folder, folder / work.run.id)
    return replace(work, run=open_run(folder / work.run.id))


@pytest.mark.parametrize(
    "damage", ["flip a byte in the middle", *(pytest.param(each, marks=pytest.mark.slow) for each in BREAKS)]
)
@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_named_and_the_run_goes_on_from_before(
    name: str, damage: str, stopped: tuple[Work, str], tmp_path: Path
) -> None:
    work = copied(stopped[0], tmp_path)
    DAMAGES[damage](work.run.folder / name)
    ended, watched = resume(work)
    broken = watched.of(events.CheckpointBroken)
    assert len(broken) == 1
    assert f"`{Path(name).name}`" in broken[0].reason
    assert Path(broken[0].path).name in ("checkpoint_step_5", "step_5")
    assert [event.step for event in watched.of(events.Resumed)] == [4]
    assert ended.outcome.reason == "finished"
    assert final_hash(work.run) == stopped[1]


def test_the_files_of_a_checkpoint_are_all_tried(stopped: tuple[Work, str]) -> None:
    folder = stopped[0].run.folder
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*step_5/*")}
    assert there == set(FILES)


@pytest.mark.slow
def test_all_checkpoints_broken_starts_over(stopped: tuple[Work, str], tmp_path: Path) -> None:
    work = copied(stopped[0], tmp_path)
    for path in work.run.folder.rglob("manifest.json"):
        path.unlink()
    _, watched = resume(work)
    assert len(watched.of(events.CheckpointBroken)) == 3
    assert [event.step for event in watched.of(events.Resumed)] == [0]
    assert final_hash(work.run) == stopped[1]


@pytest.mark.slow
def test_the_best_weights_broken_at_the_end_are_never_used(tmp_path: Path) -> None:
    whole, watched = run_whole(tmp_path / "whole", PATIENT)
    last = len(watched.losses)
    best = [event.step for event in watched.of(events.Evaluated) if event.is_best][-1]
    assert best < last
    work = make_work(tmp_path / "broken", PATIENT)

    def break_best(event: events.Event) -> None:
        if isinstance(event, events.Evaluated) and event.step == last:
            (work.run.folder / f"checkpoint_step_{best}" / "adapter_model.safetensors").write_bytes(b"")

    with pytest.raises(CheckpointError, match=f"checkpoint_step_{best}: `adapter_model.safetensors` has 0 bytes"):
        train(replace(work, watch=Watched(after=break_best)))
    assert work.run.state == "failed"
    _, later = resume(work)
    assert later.of(events.CheckpointBroken)
    assert final_hash(work.run) == final_hash(whole)


# -- what changed -----------------------------------------------------------------------------------------------------


def test_nothing_changed_is_nothing_refused(stopped: tuple[Work, str], tmp_path: Path) -> None:
    ended, watched = resume(copied(stopped[0], tmp_path))
    assert ended.outcome.reason == "finished"
    assert watched.of(events.Warned) == []


def edit(run: Run, key: str, value: object) -> None:
    """Change the plan in the run folder, as a person might."""
    path = run.folder / CONFIG
    tables = yaml.safe_load(path.read_text())
    table, _, name = key.partition(".")
    tables[table][name] = value
    path.write_text(yaml.safe_dump(tables))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("optim.learning_rate", 1e-3, "the plan (optim.learning_rate was 0.005 and is 0.001)"),
        ("method.rank", 8, "the plan (method.rank was 4 and is 8)"),
        ("compute.processes", 2, "the number of processes (it was 1 and is 2)"),
        ("optim.batch", 2, "the plan (optim.batch was 4 and is 2)"),
    ],
)
def test_a_changed_plan_is_refused_by_the_key(
    key: str, value: object, told: str, stopped: tuple[Work, str], tmp_path: Path
) -> None:
    work = copied(stopped[0], tmp_path)
    edit(work.run, key, value)
    with pytest.raises(ResumeError) as caught:
        resume(work)
    assert caught.value.message.endswith(f"this is not as it was: {told}")
    assert caught.value.details == [told]
    assert "--allow-changed" in caught.value.hint
    assert work.run.state == "stopped"
    assert (work.run.folder / "events.jsonl").read_bytes() == (stopped[0].run.folder / "events.jsonl").read_bytes()


@pytest.mark.slow
def test_what_was_insisted_on_is_told_and_stays_in_the_lineage(stopped: tuple[Work, str], tmp_path: Path) -> None:
    work = copied(stopped[0], tmp_path)
    edit(work.run, "optim.learning_rate", 1e-3)
    stop_again = again(work)
    train(replace(stop_again, watch=Watched()), resume=True, allow_changed=True)
    lineage = work.run.lineage
    assert lineage["changes"][0]["changed"] == ["the plan (optim.learning_rate was 0.005 and is 0.001)"]
    assert lineage["plan"]["settings"]["optim.learning_rate"] == 1e-3
    assert lineage["plan"]["hash"] == stop_again.plan.hash()
    assert [each["code"] for each in work.run.read_events() if each["kind"] == "warned"] == ["changed"]


def test_changed_rows_are_refused(tmp_path: Path) -> None:
    work = make_work(tmp_path)
    train(replace(work, watch=Watched(after=stop_after(2, work.stop))))
    rows = tmp_path / "rows" / "train.jsonl"
    lines = rows.read_bytes().splitlines(keepends=True)
    rows.write_bytes(b"".join([lines[0].replace(b"say 0", b"say 9"), *lines[1:]]))
    with pytest.raises(ResumeError, match=r"the data .as many rows with another content"):
        resume(work)
    rows.write_bytes(b"".join(lines[1:]))
    with pytest.raises(ResumeError, match=r"the data .rows 16 and now 15; train 12 and now 11"):
        resume(work)
    ended, watched = resume(work, allow_changed=True)
    assert ended.outcome.reason == "finished"
    assert watched.of(events.Resumed)[0].step == 2
    rows.write_bytes(b"".join(lines))


def test_another_base_is_refused_by_its_files(tmp_path: Path) -> None:
    from luthier.runs.resolve import practice_folder

    base = tmp_path / "base"
    shutil.copytree(practice_folder(), base)
    work = make_work(tmp_path, {"model.base": str(base)})
    train(replace(work, watch=Watched(after=stop_after(2, work.stop))))
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    with pytest.raises(ResumeError, match=r"the base model \(not the same: model.safetensors\)"):
        resume(work)


def test_a_run_in_use_is_left_alone(tmp_path: Path) -> None:
    work = make_work(tmp_path)
    with work.run.lock(), pytest.raises(RunLockedError):
        resume(work)
    assert work.run.read_events() == []


# -- a full disk ------------------------------------------------------------------------------------------------------


def test_a_full_disk_pauses_the_run(tmp_path: Path, patch: Patch) -> None:
    whole, _ = run_whole(tmp_path / "whole")
    work = make_work(tmp_path / "full")
    usage = shutil.disk_usage(tmp_path)

    def fill(event: events.Event) -> None:
        if isinstance(event, events.StepDone) and event.step == 3:
            patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))

    with pytest.raises(DiskFullError) as caught:
        train(replace(work, watch=Watched(after=fill)))
    assert caught.value.hint == f"free some space, then: luthier resume {work.run.folder}"
    assert work.run.state == "paused"
    assert [event["reason"] for event in work.run.read_events() if event["kind"] == "paused"] == ["disk_full"]
    assert work.run.checkpoints().find_newest()[0].step == 2  # type: ignore[union-attr]
    patch.undo()
    assert resume(work)[0].outcome.reason == "finished"
    assert final_hash(work.run) == final_hash(whole)
