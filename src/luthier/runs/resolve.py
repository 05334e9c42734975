"""Resolve a MODEL as people name it: the base folder on this machine, and the adapters to apply over it in order."""

from __future__ import annotations

import difflib
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import ModelError
from luthier.extras import import_extra
from luthier.machine import expand
from luthier.runs.layout import CONFIG, FINAL_LORA_WEIGHTS, PRACTICE
from luthier.runs.model_folder import (
    HUB_ID,
    check_configs,
    check_model_folder,
    find_in_models,
    models_folder,
    read_object,
)
from luthier.runs.models import find_live_adapter, find_model, last_part, list_models
from luthier.spec.method import QloraMethod

if TYPE_CHECKING:
    from luthier.runs.run import Run

ADAPTER_CONFIG = "adapter_config.json"
_TEXT_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
_WEIGHT_FILES = ["*.safetensors"]
_LEFT_OUT = ["*/*", "consolidated*.safetensors"]
_MOST_RUNS = 16


@dataclass(frozen=True)
class AdapterRef:
    """An adapter on disk; `quantised` says that it was trained over quantised values, and how: `torch` takes NF4, `mlx`
    so many bits by mlx_lm's quantiser.
    """

    path: Path
    quantised: bool = False
    double_quant: bool = True
    engine: str = "torch"
    """Whose values those are; else what trained it."""
    bits: int = 4


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model lies: its base folder, adapters in the order they are applied, and the run it came from."""

    folder: Path
    adapters: tuple[AdapterRef, ...] = ()
    name: str = ""
    revision: str | None = None
    parent: str | None = None


@dataclass(frozen=True)
class _Wanted:
    """How a name is resolved; `runs` are those on the way, so that a circle of runs ends."""

    with_weights: bool
    revision: str | None = None
    runs: tuple[str, ...] = ()


def practice_folder() -> Path:
    """The practice model that is shipped with the package."""
    import luthier.testing

    return Path(luthier.testing.__file__).parent / "practice"


def resolve_model(base: str, *, revision: str | None = None) -> Path:
    """The folder of a model's text files: tokenizer, template and configuration."""
    return find_resolved(base, revision).folder


def find_resolved(base: str, revision: str | None = None, *, with_weights: bool = False) -> ResolvedModel:
    """What a name leads to: `practice`, a folder of a model, adapter or run, an `ft:` id, a run's id, or a hub id.

    `with_weights` fetches the weights of a hub id too, and checks every byte of a run's result.
    """
    return _resolve(base, _Wanted(with_weights, revision))


def find_run(resolved: ResolvedModel) -> Run | None:
    """The run whose result the model is, or whose adapter is the last one applied."""
    from luthier.runs.run import Run

    result = resolved.adapters[-1].path if resolved.adapters else resolved.folder
    parent = result.resolve().parent
    return Run(parent) if resolved.parent == parent.name and (parent / CONFIG).is_file() else None


def resolve_start(resolved: ResolvedModel) -> ResolvedModel:
    """What the model started from: the base of its run, or the base that its adapter names; weights included."""
    if run := find_run(resolved):
        revision = run.lineage.get("base", {}).get("revision") or run.spec.model.revision
        return find_resolved(run.spec.model.base, revision, with_weights=True)
    if not resolved.adapters:
        raise ModelError(
            f"{resolved.name} is a base model: nothing is known that it started from",
            hint="name the other model: --against MODEL",
        )
    facts = read_object(resolved.adapters[-1].path / ADAPTER_CONFIG)
    return find_resolved(str(_named_base(facts)), facts.get("revision"), with_weights=True)


def _resolve(base: str, wanted: _Wanted) -> ResolvedModel:
    if base == PRACTICE:
        return ResolvedModel(check_configs(practice_folder()), name=base)
    if served := find_in_models(base, models_folder()):
        return _from_models(served, wanted, base)
    path = expand(base)
    if path.is_dir():
        return _from_folder(path, wanted, base)
    entry = find_model(base) if base.startswith("ft:") or "/" not in base else None
    if not entry and (live := find_live_adapter(base)):
        return _over_named_base(live, wanted, base)
    if entry or base.startswith("ft:"):
        return _from_run(_open(base), wanted)
    if base.startswith((".", "/", "~")) or not HUB_ID.fullmatch(base):
        known = [PRACTICE, *(each.id for each in list_models())]
        close = difflib.get_close_matches(base, known, 1)
        raise ModelError(f"no model at {base}", hint=f"did you mean `{close[0]}`?" if close else _kinds_hint())
    return _from_hub(base, wanted)


def _kinds_hint() -> str:
    return "a model is a folder, a hub id such as Qwen/Qwen3-0.6B, a run or its `ft:` id, or `practice`"


def _open(name: str) -> Run:
    from luthier.errors import RunError
    from luthier.runs.run import open_run

    try:
        return open_run(last_part(name))
    except RunError as error:
        hint = error.hint if find_model(name) else "`luthier models` lists them; a folder can be named instead"
        told = error.message if find_model(name) else f"no run on this machine has the id `{name}`"
        raise ModelError(told, hint=hint) from None


def _from_models(folder: Path, wanted: _Wanted, name: str) -> ResolvedModel:
    """A model of the folder that LUTHIER_MODELS names."""
    if wanted.revision is not None:
        raise ModelError(
            f"{name} lies in the models folder, which has no revisions; asked for {wanted.revision}",
            hint="leave model.revision out",
        )
    check_model_folder(folder, within=models_folder())
    return ResolvedModel(folder, name=name)


def _from_folder(folder: Path, wanted: _Wanted, name: str) -> ResolvedModel:
    from luthier.runs.run import Run

    if (folder / CONFIG).is_file():
        return _from_run(Run(folder), wanted)
    of_run = Run(folder.resolve().parent) if (folder.resolve().parent / CONFIG).is_file() else None
    if (folder / ADAPTER_CONFIG).is_file():
        return _over_base_of_run(of_run, folder, wanted) if of_run else _over_named_base(folder, wanted, name)
    if of_run:
        _check_seal(folder, wanted)
        return ResolvedModel(check_configs(folder), name=name, parent=of_run.id)
    revision = folder.resolve().name if folder.resolve().parent.name == "snapshots" else None
    return ResolvedModel(check_configs(folder), name=name, revision=revision)


def _from_run(run: Run, wanted: _Wanted) -> ResolvedModel:
    final = run.final_weights
    if final is None:
        raise ModelError(
            f"{run.id} has no final weights: it is {run.state}",
            hint=f"`luthier resume {run.folder}` finishes it, or name one of its checkpoints",
        )
    if final.name == FINAL_LORA_WEIGHTS:
        return _over_base_of_run(run, final, wanted)
    _check_seal(final, wanted)
    return ResolvedModel(check_configs(final), name=run.model_id, parent=run.id)


def _over_base_of_run(run: Run, adapter: Path, wanted: _Wanted) -> ResolvedModel:
    """The adapter over what its run started from, which may itself be a run's result."""
    if run.id in wanted.runs or len(wanted.runs) >= _MOST_RUNS:
        raise ModelError(f"{run.id} starts from its own result: {' -> '.join((*wanted.runs, run.id))}")
    _check_seal(adapter, wanted)
    recorded = run.lineage.get("base", {})
    inner = replace(wanted, revision=recorded.get("revision") or run.spec.model.revision, runs=(*wanted.runs, run.id))
    below = _resolve(run.spec.model.base, inner)
    if wanted.with_weights:
        _check_same_base(run, below)
    ref = ref_of_run(run, adapter)
    return replace(below, adapters=(*below.adapters, ref), name=run.model_id, parent=run.id)


def ref_of_run(run: Run, adapter: Path) -> AdapterRef:
    """An adapter of a run, with the values that the run trained it over."""
    method = run.spec.method
    engine = "mlx" if run.spec.engine.kind == "mlx" else "torch"
    if not isinstance(method, QloraMethod):
        return AdapterRef(adapter, engine=engine)
    return AdapterRef(adapter, True, method.double_quant, engine, method.bits)


def _over_named_base(adapter: Path, wanted: _Wanted, name: str) -> ResolvedModel:
    """An adapter from elsewhere, over the base that its own file names."""
    facts = read_object(adapter / ADAPTER_CONFIG)
    base = _named_base(facts)
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{adapter}: {ADAPTER_CONFIG} names no base model",
            hint="`base_model_name_or_path` is missing, or `model` of an adapter of mlx_lm",
        )
    if expand(base).resolve() == adapter.resolve() or name in wanted.runs:
        raise ModelError(f"{adapter}: {ADAPTER_CONFIG} names the adapter itself as its base model")
    if wanted.with_weights and not list(adapter.glob("*.safetensors")):
        raise ModelError(f"{adapter}: no .safetensors file in it", hint="other formats of weights are never loaded")
    revision = facts.get("revision")
    below = _resolve(
        base,
        replace(wanted, revision=revision if isinstance(revision, str) else None, runs=(*wanted.runs, name)),
    )
    ref = AdapterRef(adapter, engine="mlx" if _is_of_mlx(facts) else "torch")
    return replace(below, adapters=(*below.adapters, ref), name=name)


def _named_base(facts: dict[str, Any]) -> Any:
    """The base that an adapter's file names, as PEFT writes it or as mlx_lm does."""
    return facts.get("model") if _is_of_mlx(facts) else facts.get("base_model_name_or_path")


def _is_of_mlx(facts: dict[str, Any]) -> bool:
    return "lora_parameters" in facts and "peft_type" not in facts


def _check_seal(folder: Path, wanted: _Wanted) -> None:
    """Every byte of a run's result, where it is going to be used."""
    from luthier.errors import CheckpointError
    from luthier.runs.manifest import check_manifest

    if not wanted.with_weights:
        return
    try:
        check_manifest(folder)
    except CheckpointError as error:
        raise ModelError(
            f"{folder}: damaged: {error.message}", hint="name an earlier checkpoint of the run, or train it again"
        ) from None


def _check_same_base(run: Run, below: ResolvedModel) -> None:
    """An adapter over another base than it was trained on loads without a word and answers nonsense."""
    from luthier.runs.lineage import base_facts, is_same_base

    recorded = run.lineage.get("base")
    if recorded and not is_same_base(recorded, base_facts(below)):
        raise ModelError(
            f"the base of {run.id} is no longer the model that it was trained on: {below.folder}",
            hint="the run's lineage.json lists its files with their hashes",
        )


def _from_hub(name: str, wanted: _Wanted) -> ResolvedModel:
    hub = import_extra("huggingface_hub", "torch")
    folder = _snapshot(hub, name, wanted)
    found = _from_folder(folder, wanted, name)
    return replace(found, revision=folder.name) if not found.adapters else found


def _snapshot(hub: Any, name: str, wanted: _Wanted) -> Path:
    patterns = [*_TEXT_FILES, *(_WEIGHT_FILES if wanted.with_weights else [])]
    arguments: dict[str, Any] = {
        "repo_id": name,
        "revision": wanted.revision,
        "allow_patterns": patterns,
        "ignore_patterns": _LEFT_OUT,
    }
    with suppress(Exception):  # not in the local cache yet, which the hub's client says in many ways
        folder = Path(hub.snapshot_download(**arguments, local_files_only=True))
        if not wanted.with_weights or _has_weights(folder):
            return folder
    try:
        return Path(hub.snapshot_download(**arguments))
    except Exception as error:  # no network, no such model, no right to it: the client's own words tell
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{name}: not on this machine, and the hub did not give it: {said}",
            hint="check the name and the network, or give a folder; `practice` needs neither",
        ) from None


def _has_weights(folder: Path) -> bool:
    """Whether the weights are there in full: each file that an index names, or the one file without an index."""
    for index in folder.glob("*.safetensors.index.json"):
        shards = set(read_object(index).get("weight_map", {}).values())
        return bool(shards) and all((folder / str(shard)).is_file() for shard in shards)
    return any(folder.glob("*.safetensors"))
