"""The end of a run: final weights checked and sealed, probe, card, log, lineage and what was learnt for plans."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from luthier.data.prepared import Prepared
from luthier.engines.tinker.saving import find_place
from luthier.engines.verbs import Trainee
from luthier.errors import NothingLearnedError, ServerError
from luthier.runs import events
from luthier.runs.checkpoints import CheckpointStore
from luthier.runs.layout import FINAL_LORA_WEIGHTS, FINAL_MODEL, PROBE
from luthier.runs.lineage import list_versions, write_lineage
from luthier.runs.manifest import read_manifest, seal, write_durably
from luthier.runs.models import register
from luthier.runs.resolve import ADAPTER_CONFIG, ResolvedModel
from luthier.runs.run import Run, write_training_log
from luthier.spec.method import AdapterKeys
from luthier.spec.plan import RunPlan
from luthier.training.course import Outcome, Progress
from luthier.training.memory import remember_correction, remember_speed
from luthier.training.passes import Watch
from luthier.training.probe import read_text_facts, write_probe
from luthier.weights.card import CardFacts, write_card
from luthier.weights.peft import read_adapter
from luthier.weights.shards import read_model_files
from luthier.weights.tensors import read_config
from luthier.weights.text_files import copy_text_files


def write_results(
    run: Run, plan: RunPlan, prepared: Prepared, resolved: ResolvedModel, engine: Trainee, progress: Progress
) -> Path:
    """Final weights and everything that tells of them; the weights as they now stand in the engine."""
    is_adapter = isinstance(plan.spec.method, AdapterKeys)
    final = run.folder / (FINAL_LORA_WEIGHTS if is_adapter else FINAL_MODEL)
    weights = engine.save("final")
    metrics = find_metrics(progress)

    def write(draft: Path) -> None:
        weights.write(draft)
        if not is_adapter or (draft / ADAPTER_CONFIG).is_file():
            check_learned(draft, None if is_adapter else resolved.folder)
        if not is_adapter:
            copy_text_files(resolved.folder, draft)
            copy_template(plan.spec.model.chat_template, draft)
        write_card(draft, _card(run, plan, resolved, metrics))

    seal(final, write, {"step": progress.step, "kind": final.name})
    if is_adapter and not (final / ADAPTER_CONFIG).is_file():
        place = find_place(final)
        write_lineage(
            run, {"uncertified": f"the weights are on the service alone: {place.not_fetched if place else ''}"}
        )
        return final
    template = Path(plan.spec.model.chat_template) if plan.spec.model.chat_template else None
    text = read_text_facts(resolved.folder, template)
    try:
        write_probe(run.folder / PROBE, engine, prepared, _vocabulary(resolved.folder), text)
    except ServerError as error:
        write_lineage(run, {"uncertified": f"the service did not say how likely every token is: {error.message}"})
    return final


def find_metrics(progress: Progress) -> dict[str, float]:
    """What is known of the result: the last loss and the last scores on the held-out part."""
    found: dict[str, float] = {}
    if progress.last_loss is not None:
        found["train_loss"] = progress.last_loss
    scores = dict(progress.last_scores or {})
    more = scores.pop("metrics", {})
    measured = {name: value for name, value in {**scores, **more}.items() if name != "tokens" and value is not None}
    return found | {f"valid_{name}": float(value) for name, value in measured.items()}


def close_run(
    run: Run, plan: RunPlan, home: Path, outcome: Outcome, progress: Progress, peak_bytes: int, watch: Watch
) -> None:
    """Log, lineage and index; what the run took is remembered for the plans of others like it.

    The event that it is finished comes last: until then a resume does all of this again.
    """
    if plan.memory.items:
        watch(events.MemoryMeasured(plan.memory.total_bytes, peak_bytes))
    write_training_log(run)
    finished = events.utc_now().isoformat(timespec="seconds")
    more: dict[str, Any] = {"metrics": find_metrics(progress), "finished": finished, "steps": outcome.step}
    write_lineage(run, more)
    register(run)
    if named := plan.spec.output.model_id_file:
        write_durably(Path(named), f"{run.model_id}\n".encode())
    if plan.memory_key:
        remember_correction(home, plan.memory_key, sum(plan.memory.items.values()), peak_bytes)
    if plan.speed_key and progress.seconds > 0:
        remember_speed(home, plan.speed_key, progress.tokens / progress.seconds)
    watch(events.Finished(outcome.step, outcome.reason, progress.seconds))


def check_learned(folder: Path, base: Path | None) -> None:
    """Refuse weights that are not finite, or that are what the run started with."""
    if base is None:
        tensors = read_adapter(folder)[1]
        broken = [name for name, values in tensors.items() if not np.isfinite(values).all()]
        has_moved = any(values.any() for name, values in tensors.items() if name.endswith(".lora_B"))
    else:
        broken, has_moved = _compare(folder, base)
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise NothingLearnedError(
            f"the final weights are not finite: {broken[0]}{more}",
            hint="lower optim.learning_rate; the last checkpoint is untouched",
        )
    if not has_moved:
        raise NothingLearnedError(
            "the final weights are those the run started with: nothing was learned",
            hint="raise optim.learning_rate or optim.epochs, and look at the losses in events.jsonl",
        )


def _compare(folder: Path, base: Path) -> tuple[list[str], bool]:
    before = {name: file for file in read_model_files(base).values() for name in file.entries}
    broken, has_moved = [], False
    for file in read_model_files(folder).values():
        for name in file.entries:
            values = file.read_floats(name)
            if not np.isfinite(values).all():
                broken.append(name)
            if not has_moved and name in before:
                has_moved = not np.array_equal(values, before[name].read_floats(name))
    return broken, has_moved


def copy_template(template: str | None, folder: Path) -> None:
    """The chat template that a run was trained with, where it is not the base's own: it is the result's own now."""
    if template:
        shutil.copyfile(template, folder / "chat_template.jinja")


def _vocabulary(folder: Path) -> int:
    config = read_config(folder)
    return int((config.get("text_config") or config)["vocab_size"])


def _card(run: Run, plan: RunPlan, resolved: ResolvedModel, metrics: dict[str, float]) -> CardFacts:
    spec, lineage = plan.spec, run.lineage
    settings = {"learning_rate": spec.optim.learning_rate, "steps": plan.steps, "batch": spec.optim.batch}
    if isinstance(spec.method, AdapterKeys):
        settings |= {"rank": spec.method.rank, "alpha": spec.method.alpha}
    return CardFacts(
        name=run.id,
        base=resolved.name,
        method=spec.method.kind,
        objective=spec.objective.kind,
        revision=resolved.revision,
        is_adapter=isinstance(spec.method, AdapterKeys),
        parents=lineage.get("parents", []),
        settings=settings,
        metrics=metrics,
        data_hash=lineage.get("data", {}).get("hash", ""),
        plan_hash=plan.hash(),
        versions=list_versions(spec.engine.kind),
    )


def keep_best(engine: Trainee, store: CheckpointStore, plan: RunPlan, progress: Progress) -> None:
    """Bring the best weights back where the spec keeps those, and they are not the last."""
    best = progress.best_step
    if plan.spec.evaluate.keep == "best" and best is not None and best != progress.step:
        read_manifest(store.weights_path(best))
        engine.load(store.weights_path(best))
