"""The `tinker` engine against a server of ours: the run it makes is the one that `torch` makes, whatever dies."""

from __future__ import annotations

import gc
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.cli.main import main
from luthier.engines.tinker.saving import find_place
from luthier.errors import ServerError, UnsupportedError
from luthier.runs import events
from luthier.runs.home import luthier_home
from luthier.runs.manifest import CRASH_VARIABLE
from luthier.runs.resolve import practice_folder
from luthier.runs.run import Run
from luthier.training.session import Work, train
from luthier.training.signals import StopFlag
from luthier.weights.peft import read_adapter
from luthier.workflow import is_complete, reopen
from tests.calling import call
from tests.runs.children import ROOT, start_plainly
from tests.service.process import Server, running
from tests.unit.training.works import Watched, final_hash, make_work, resume, run_whole, stop_after

pytest.importorskip("tinker")
# The SDK leaves its first connection for the collector to close.
_LEFT_OPEN = ("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
pytestmark = [pytest.mark.torch, pytest.mark.slow, *(pytest.mark.filterwarnings(each) for each in _LEFT_OPEN)]
Captured = pytest.CaptureFixture[str]
ROWS = {"rows.train": 10, "rows.valid": 3}
HERE: dict[str, Any] = {"method": {"kind": "lora", "rank": 4, "dropout": 0.0}, **ROWS}
THERE: dict[str, Any] = {"method": {"kind": "lora", "rank": 4}, "engine.kind": "tinker", **ROWS}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`luthier serve` with the practice model, in fp32 so that its numbers can be held against ours."""
    pytest.importorskip("torch").set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # two cores are shared with the client
        with running(tmp_path_factory.mktemp("served"), "--precision", "fp32") as found:
            yield found


def name_server(server: Server, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("TINKER_API_BASE", server.url)
    patch.setenv("TINKER_API_KEY", server.key)
    patch.setenv("TINKER_TELEMETRY", "0")


@pytest.fixture(scope="module")
def whole(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Watched]:
    """A run of six steps on the service, never stopped, with what it told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(tmp_path_factory.mktemp("home")))
        name_server(server, patch)
        return run_whole(tmp_path_factory.mktemp("whole"), THERE)


@pytest.fixture(autouse=True)
def named(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment names the server."""
    name_server(server, monkeypatch)
    yield
    gc.collect()


def steps_of(watched: Watched) -> tuple[np.ndarray, np.ndarray]:
    done = watched.of(events.StepDone)
    return np.array([each.loss for each in done]), np.array([each.grad_norm for each in done])


def assert_same_steps(found: tuple[Run, Watched], expected: tuple[Run, Watched]) -> None:
    """Losses, norms, held-out losses and final weights of two runs are the same, but for the order of additions."""
    (losses, norms), (own_losses, own_norms) = (steps_of(watched) for _, watched in (found, expected))
    assert len(losses) == 6
    assert np.abs(losses - own_losses).max() < 1e-5
    np.testing.assert_allclose(norms, own_norms, rtol=1e-4)
    held_out = [[each.loss for each in watched.of(events.Evaluated)] for _, watched in (found, expected)]
    np.testing.assert_allclose(*held_out, atol=1e-5)
    adapters = [read_adapter(run.folder / "final_lora_weights") for run, _ in (found, expected)]
    (config, tensors), (own_config, own_tensors) = adapters
    assert (config.rank, config.scale) == (own_config.rank, own_config.scale)
    assert tensors.keys() == own_tensors.keys()
    # Adam turns the rounding of a gradient near zero into a part of a step.
    assert max(float(np.abs(tensors[name] - own_tensors[name]).max()) for name in tensors) < 1e-3


def test_each_step_is_the_step_of_the_torch_engine(whole: tuple[Run, Watched], tmp_path: Path) -> None:
    assert_same_steps(whole, run_whole(tmp_path, HERE))


def test_a_loss_whose_slope_is_known_late_is_that_of_the_torch_engine(tmp_path: Path) -> None:
    pairs = {"objective.kind": "dpo", "optim.weight_decay": 0.1, "output.save_every_steps": 0}
    there = run_whole(tmp_path / "there", {**THERE, **pairs})
    assert_same_steps(there, run_whole(tmp_path / "here", {**HERE, **pairs}))


def test_every_checkpoint_lies_on_the_service(whole: tuple[Run, Watched]) -> None:
    run, watched = whole
    saved = watched.of(events.SavedOnService)
    assert [event.name for event in saved] == ["step_0002", "step_0004", "step_0006", "final", "final"]
    for step, event in zip((2, 4, 6), saved, strict=False):
        place = find_place(run.folder / f"checkpoint_step_{step}")
        assert place is not None
        assert dict(place.paths) == dict(event.paths)
    assert find_place(run.folder / "training_state" / "step_6") == place
    final = find_place(run.folder / "final_lora_weights")
    assert final is not None
    assert set(final.paths) == {"weights", "sampler_weights", "external_weights"}
    assert all(path.startswith("tinker://") for path in final.paths.values())


def test_the_best_weights_come_back_from_the_service(tmp_path: Path) -> None:
    more = {"evaluate.every_steps": 2, "evaluate.keep": "best", "evaluate.min_improvement": 1e6, "optim.steps": 4}
    run, watched = run_whole(tmp_path, {**THERE, **more})
    assert [event.step for event in watched.of(events.Evaluated) if event.is_best] == [2]
    place = find_place(run.folder / "final_lora_weights")
    assert place is not None
    assert ":train:1/" in place.paths["weights"]  # another model of the session, which began from the best one


def test_a_run_that_was_stopped_goes_on_from_the_service(whole: tuple[Run, Watched], tmp_path: Path) -> None:
    watched = Watched()
    work = make_work(tmp_path, THERE, watch=watched)
    watched.after = stop_after(3, work.stop)
    assert not train(work).outcome.is_done
    trained, later = resume(work)
    assert trained.outcome.is_done
    # Step 4 had to wait for a checkpoint to be saved, so it was not on its way when the signal came.
    assert [event.step for event in watched.of(events.StepDone)] == [1, 2, 3, 4][: watched.of(events.Stopped)[0].step]
    steps = [event.step for event in (*watched.of(events.StepDone), *later.of(events.StepDone))]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert final_hash(work.run) == final_hash(whole[0])


def test_a_client_that_was_killed_goes_on_to_the_same_weights(whole: tuple[Run, Watched], tmp_path: Path) -> None:
    config = whole[0].folder / "finetune_config.yaml"
    source = str(ROOT / "src")
    # Steps run ahead of what is saved, so the moment is named: as the checkpoint of step 6 begins to be written here.
    crash = {CRASH_VARIABLE: "before_write:5"}
    child = start_plainly("train", config, "--output-dir", "runs", folder=tmp_path, PYTHONPATH=source, **crash)
    child.ends(137)
    run = Run(child.run)
    assert run.state == "stopped"
    ready = reopen(run)
    assert train(
        Work(run, ready.plan, ready.prepared, ready.resolved, luthier_home(), Watched(), StopFlag()), resume=True
    )
    assert final_hash(run) == final_hash(whole[0])
    assert [event["step"] for event in run.read_events() if event["kind"] == "resumed"] == [4]
    assert [entry["step"] for entry in json.loads((run.folder / "training_log.json").read_text())] == [1, 2, 3, 4, 5, 6]


def test_the_example_of_the_guide(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare, train with a checkpoint every few steps, compare on the service: seed 004's whole example, in short."""
    monkeypatch.chdir(tmp_path)
    source = ROOT / "examples" / "demo" / "train.jsonl"
    call(capsys, "data", "prepare", str(source), "-o", "data/chat.jsonl", "--max-examples", "60")
    assert main(["recipes", "copy", "sft-lora-tinker", "."]) == 0
    short = ["--model", "practice", "--data", "data/chat.jsonl", "--steps", "4", "--batch", "4"]
    more = ["--save-every-steps", "2", "--learning-rate", "5e-3", "--precision", "fp32", "--valid", "3"]
    done = call(capsys, "train", "sft-lora-tinker.toml", *short, *more)
    assert done["certificate"]["valid"]
    names = [path.rpartition("/")[2] for path in done["service_paths"]]
    assert names == ["step_0002"] * 2 + ["step_0004"] * 2 + ["final"] * 3
    asked = ["--on-service", "-n", "3", "--max-tokens", "8"]
    there = call(capsys, "compare", done["folder"], *asked)
    assert there["asked"]["prompts"] == 3
    loss = there["metrics"]["held-out loss"]
    assert loss["tuned"] == pytest.approx(done["valid"]["loss"], rel=1e-3)
    assert loss["tuned"] < loss["base"]


def test_a_run_without_the_base_here_is_complete_and_says_why_it_is_not_certified(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(practice_folder() / name, folder / name)
    rows = str(ROOT / "examples" / "demo" / "train.jsonl")
    short = ["--examples", "30", "--valid", "3", "--steps", "2", "--batch", "4", "--learning-rate", "5e-3"]
    here = ["--model", str(folder), "--engine", "tinker", "--set", "engine.model=practice", "--precision", "fp32"]
    done = call(capsys, "train", "--data", rows, *short, *here)
    assert (Path(done["final"]) / "adapter_model.safetensors").is_file()
    assert done["certificate"] is None
    run = Run(Path(done["folder"]))
    assert is_complete(run)
    why = "the weights of .* are not on this machine"
    report = (run.folder / "finetune_report.md").read_text()
    assert re.search(f"Not certified: {why}", report)
    assert "memory" not in report, "of the service's nobody knows, and this machine's says nothing"
    compared = call(capsys, "compare", done["folder"], "-n", "2", "--max-tokens", "4")
    assert compared["base_model"] == "practice"


def test_inspect_tells_models_limits_and_methods(capsys: Captured) -> None:
    found = call(capsys, "tinker", "inspect", "--try", "practice")
    assert [each["name"] for each in found["models"]] == ["practice"]
    assert found["limits"]["fwdbwd_max_chunk_len"] > 0
    assert len(found["methods"]) > 20
    assert [each["method"] for each in found["methods"] if not each["works"]] == []


def test_a_base_that_the_service_does_not_have_is_named_with_those_it_has(tmp_path: Path) -> None:
    work = make_work(tmp_path, {**THERE, "engine.model": "nobody/nothing"})
    with pytest.raises(ServerError) as told:
        train(work)
    assert "nobody/nothing" in told.value.message
    assert "practice" in told.value.hint


def test_a_base_that_is_an_adapter_is_refused(whole: tuple[Run, Watched], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="adapter over another model"):
        train(make_work(tmp_path, {**THERE, "model.base": str(whole[0].folder)}))
