"""The end of a run: a folder that is complete, a plan that runs again to the same bytes, and weights that did learn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from luthier.errors import NonFiniteError, NothingLearnedError
from luthier.runs import events
from luthier.runs.home import luthier_home
from luthier.runs.layout import MERGED_MODEL
from luthier.runs.manifest import check_manifest
from luthier.runs.models import find_model
from luthier.runs.resolve import find_resolved
from luthier.runs.run import Run
from luthier.spec.load import load_spec
from luthier.training.memory import MEMORY_FILE, SPEED_FILE
from luthier.training.session import Work, train
from luthier.training.signals import StopFlag
from luthier.workflow import Ready, make_ready, plan_run, prepare_data, start_run, train_run
from tests.unit.training.works import (
    ADAPTER,
    NEEDS_TORCH,
    Faulty,
    Watched,
    final_hash,
    make_spec,
    make_work,
    run_whole,
    with_faults,
)

pytestmark = NEEDS_TORCH
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Work, Path]:
    """A whole run with everything asked for, and the home it was in."""
    folder = tmp_path_factory.mktemp("done")
    patch = pytest.MonkeyPatch()
    patch.setenv("LUTHIER_HOME", str(folder / "home"))
    changes = {"evaluate.every_steps": 3, "output.merge": True, "output.model_id_file": str(folder / "ft_model_id.txt")}
    work = make_work(folder, changes)
    train_run(work.run, Ready(work.plan, work.prepared, work.resolved), watch=Watched(), stop=StopFlag())
    patch.undo()
    return work.run, work, folder


def test_the_run_folder_is_complete(done: tuple[Run, Work, Path]) -> None:
    run, _, folder = done
    names = {path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*") if path.is_file()}
    assert names == {
        "finetune_config.yaml",
        "ledger.jsonl",
        "rejected.jsonl",
        "events.jsonl",
        "training_log.json",
        "lineage.json",
        "certificate.json",
        "probe.safetensors",
        "run.lock",
        *(
            f"checkpoint_step_{step}/{name}"
            for step in (2, 4, 6)
            for name in ("adapter_config.json", "adapter_model.safetensors", "manifest.json")
        ),
        *(
            f"training_state/step_{step}/{name}"
            for step in (4, 6)
            for name in ("optimizer.safetensors", "manifest.json")
        ),
        *(
            f"final_lora_weights/{name}"
            for name in ("adapter_config.json", "adapter_model.safetensors", "README.md", "manifest.json")
        ),
        *(f"merged_model/{name}" for name in _model_files()),
    }
    for sealed in ("final_lora_weights", "merged_model", "checkpoint_step_6", "training_state/step_6"):
        check_manifest(run.folder / sealed)
    assert (folder / "ft_model_id.txt").read_text() == f"ft:practice:{run.id}\n"


def _model_files() -> list[str]:
    from luthier.runs.resolve import practice_folder

    return ["manifest.json", *(path.name for path in practice_folder().iterdir())]


def test_what_the_files_say_agrees(done: tuple[Run, Work, Path]) -> None:
    run, work, _ = done
    told = run.read_events()
    log = json.loads((run.folder / "training_log.json").read_bytes())
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in log if "eval" in entry] == [3, 6]
    assert [entry["loss"] for entry in log] == [event["loss"] for event in told if event["kind"] == "step_done"]
    lineage = run.lineage
    assert lineage["steps"] == 6
    assert lineage["plan"]["hash"] == work.plan.hash()
    assert lineage["metrics"]["train_loss"] == log[-1]["loss"]
    assert lineage["metrics"]["valid_loss"] == log[-1]["eval"]["loss"]
    assert lineage["versions"].keys() >= {"luthier", "torch", "transformers", "python"}
    assert lineage["base"]["files"].keys() >= {"model.safetensors", "config.json"}
    assert lineage["finished"]
    card = (run.folder / "final_lora_weights" / "README.md").read_text()
    assert work.plan.hash()[:12] in card
    assert lineage["data"]["hash"][:12] in card
    order = [event["kind"] for event in told]
    assert order[:4] == ["run_started", "planned", "data_ready", "engine_loaded"]
    assert order[-2:] == ["memory_measured", "finished"]
    assert [event["seq"] for event in told] == list(range(1, len(told) + 1))


def test_the_plan_in_the_folder_runs_again_to_the_same_bytes(done: tuple[Run, Work, Path], tmp_path: Path) -> None:
    run, _, _ = done
    spec = load_spec(run.folder / "finetune_config.yaml").spec
    output = spec.output.model_copy(update={"dir": str(tmp_path), "merge": False, "model_id_file": None})
    spec = spec.model_copy(update={"output": output})
    ready = make_ready(spec, prepare_data(spec))
    second = start_run(ready)
    train_run(second, ready, watch=Watched(), stop=StopFlag())
    assert final_hash(second) == final_hash(run)
    assert second.id != run.id
    probes = [load_file(each.folder / "probe.safetensors") for each in (run, second)]
    assert {name: each.tobytes() for name, each in probes[0].items()} == {
        name: each.tobytes() for name, each in probes[1].items()
    }


@pytest.mark.slow
def test_the_merged_model_gives_the_probe_in_plain_transformers(done: tuple[Run, Work, Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    run, _, _ = done
    model = AutoModelForCausalLM.from_pretrained(run.folder / MERGED_MODEL, dtype=torch.float32, local_files_only=True)
    probe = load_file(run.folder / "probe.safetensors")
    prompts = sorted(name for name in probe if name.startswith("tokens_"))
    assert len(prompts) == 4
    for name in prompts:
        kept = probe[name.replace("tokens", "logprobs")]
        with torch.no_grad():
            logits = model(torch.from_numpy(probe[name])[None]).logits[0, -len(kept) :]
        found = torch.log_softmax(logits.float(), -1).numpy()
        # Merged weights are rounded to the base's bf16 once more.
        np.testing.assert_allclose(found, kept, atol=0.15)
        assert float(np.abs(found - kept).mean()) < 0.02


def test_the_index_knows_the_run(done: tuple[Run, Work, Path], patch: Patch) -> None:
    run, _, folder = done
    patch.setenv("LUTHIER_HOME", str(folder / "home"))
    entry = find_model(run.model_id)
    assert entry is not None
    assert (entry.id, entry.final, entry.run_folder) == (run.id, "final_lora_weights", str(run.folder.resolve()))
    assert [ref.path.name for ref in find_resolved(run.model_id, with_weights=True).adapters] == ["final_lora_weights"]


def test_memory_and_speed_are_remembered_for_the_next_plan(done: tuple[Run, Work, Path], patch: Patch) -> None:
    run, work, folder = done
    home = folder / "home"
    told = next(event for event in run.read_events() if event["kind"] == "memory_measured")
    assert told["predicted_bytes"] == work.plan.memory.total_bytes
    corrections = json.loads((home / MEMORY_FILE).read_bytes())
    speeds = json.loads((home / SPEED_FILE).read_bytes())
    assert list(corrections) == [work.plan.memory_key]
    ratio = told["measured_bytes"] / sum(work.plan.memory.items.values())
    assert corrections[work.plan.memory_key] == pytest.approx(min(4.0, max(0.25, ratio)))
    assert speeds[work.plan.speed_key] > 0
    patch.setenv("LUTHIER_HOME", str(home))
    next_plan = plan_run(work.plan.spec, work.prepared)
    assert next_plan.memory.correction == corrections[work.plan.memory_key]


def test_memory_on_a_cpu_is_that_of_all_processes(tmp_path: Path, patch: Patch) -> None:
    engines = with_faults(patch)
    patch.setattr(Faulty, "peak_memory_bytes", lambda self: 1000, raising=False)
    patch.setattr(Faulty, "sum_over_processes", lambda self, values: values * 2, raising=False)
    work = make_work(tmp_path, {"rows.valid": 0})
    train(work)
    assert engines
    measured = next(event for event in work.run.read_events() if event["kind"] == "memory_measured")
    assert measured["measured_bytes"] == 2000


def test_weights_have_moved_by_what_the_steps_say(done: tuple[Run, Work, Path]) -> None:
    run, _, _ = done
    first, last = (
        load_file(run.folder / name / "adapter_model.safetensors")
        for name in ("checkpoint_step_2", "final_lora_weights")
    )
    moved = {name: float(np.abs(first[name] - last[name]).mean()) for name in first}
    assert len(moved) == 16  # A and B of two modules in four layers
    assert all(distance > 1e-4 for distance in moved.values())
    assert all(np.isfinite(values).all() for values in last.values())


@pytest.mark.slow
def test_full_training_moves_nearly_every_weight(tmp_path: Path) -> None:
    from luthier.runs.resolve import practice_folder

    run, _ = run_whole(
        tmp_path, {"method.kind": "full", "optim.learning_rate": 1e-4, "optim.steps": 3, "compute.precision": "bf16"}
    )
    before = _floats(practice_folder() / "model.safetensors")
    after = _floats(run.folder / "final_model" / "model.safetensors")
    assert before.keys() == after.keys()
    masters = _floats(run.folder / "training_state" / "step_3" / "masters.safetensors", optional=True)
    share = np.mean([float(np.mean(before[name] != after[name])) for name in before if "proj" in name])
    assert share > 0.2  # of the published bf16 weights; the masters move every step
    assert not masters or all(np.mean(masters[name] != before[name]) > 0.9 for name in masters if "proj" in name)
    assert json.loads((run.folder / "final_model" / "config.json").read_bytes())["model_type"] == "qwen3"
    assert (run.folder / "final_model" / "tokenizer.json").is_file()


def _floats(path: Path, *, optional: bool = False) -> dict[str, Any]:
    from safetensors.torch import load_file as load_tensors

    if optional and not path.exists():
        return {}
    return {name: tensor.float().numpy() for name, tensor in load_tensors(path).items()}


def test_a_rate_too_small_to_learn_anything_fails_the_run(tmp_path: Path) -> None:
    work = make_work(tmp_path, {"optim.learning_rate": 1e-45})
    with pytest.raises(NothingLearnedError, match="those the run started with: nothing was learned"):
        train(work)
    assert work.run.state == "failed"
    assert work.run.final_weights is None
    assert not list(work.run.folder.glob("final*"))


def test_weights_that_are_not_finite_are_never_published(tmp_path: Path, patch: Patch) -> None:
    engines: list[Faulty] = []
    with_faults(patch, into=engines)

    def ruin(event: events.Event) -> None:
        if isinstance(event, events.StepDone) and event.step == 6:
            engines[0].engine._masters.masters[0].data[0] = float("nan")  # type: ignore[attr-defined]

    work = make_work(tmp_path, {"rows.valid": 0, "output.save_every_steps": 4})
    with pytest.raises(NonFiniteError, match=r"after step 6 the weights cannot be saved: `model\.layers.* not finite"):
        train(replace(work, watch=Watched(after=ruin)))
    assert not list(work.run.folder.glob("final*"))


@pytest.mark.slow
def test_an_evaluation_that_is_not_finite_is_no_gain_and_no_end(tmp_path: Path, patch: Patch) -> None:
    from luthier.engines.verbs import Computed, Ready

    class Blind(Faulty):
        def forward(self, batch: Any) -> Any:
            found = super().forward(batch).result()
            wrong = self.calls["forward"] == 2
            return Ready(lambda: Computed(found.logprobs * (np.nan if wrong else 1.0), hits=found.hits))

    patch.setattr("tests.unit.training.works.Faulty", Blind)
    with_faults(patch)
    run, watched = run_whole(tmp_path, {"evaluate.every_steps": 2, "evaluate.keep": "best", "rows.valid": 2})
    scores = watched.of(events.Evaluated)
    assert [np.isfinite(score.loss) for score in scores] == [True, False, True]
    assert not scores[1].is_best
    assert run.lineage["metrics"]["valid_loss"] == scores[2].loss


@pytest.mark.slow
def test_a_run_that_starts_from_a_run(tmp_path: Path) -> None:
    first, _ = run_whole(tmp_path / "sft", {"optim.learning_rate": 0.02})
    changes = {"objective.kind": "dpo", "model.base": first.model_id}
    work = make_work(tmp_path / "dpo", changes)
    watched = Watched()
    train(replace(work, watch=watched))
    assert work.run.lineage["parent"] == first.id
    assert work.run.lineage["parents"] == [first.id]
    assert watched.of(events.StepDone)[0].loss == pytest.approx(
        np.log(2), abs=1e-6
    )  # the policy starts as the reference
    resolved = find_resolved(work.run.model_id, with_weights=True)
    assert [ref.path.parent.name for ref in resolved.adapters] == [first.id, work.run.id]
    alone = make_work(tmp_path / "alone", {"objective.kind": "dpo"})
    train(alone)
    assert _reference(work.run) != pytest.approx(_reference(alone.run), abs=0.1)


def _reference(run: Run) -> list[float]:
    return [float(value) for value in load_file(run.folder / "reference" / "reference.safetensors")["logprobs"]]


@pytest.mark.slow
def test_a_run_on_top_starts_at_base_plus_adapter(tmp_path: Path) -> None:
    first, watched = run_whole(tmp_path / "first", {"optim.learning_rate": 0.02, "optim.schedule": "constant"})
    spec = make_spec(tmp_path / "second", {"model.base": first.model_id, "optim.learning_rate": 1e-6})
    ready = make_ready(spec, prepare_data(spec))
    second = Watched()
    train_run(start_run(ready), ready, watch=second, stop=StopFlag())
    ends, starts = watched.of(events.Evaluated)[-1], second.of(events.Evaluated)[-1]
    assert starts.loss == pytest.approx(ends.loss, abs=2e-3)
    assert watched.losses[0] - second.losses[0] > 0.1
    assert luthier_home().name == "home"
    assert (first.folder / ADAPTER).is_file()
