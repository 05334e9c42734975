"""Folders of what a live model leaves: adapters as ordinary models, with where they come from written beside them."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from luthier.live.bases import Base
from luthier.live.rows import LiveModel
from luthier.runs.layout import LINEAGE
from luthier.runs.lineage import base_facts, list_versions
from luthier.runs.manifest import MANIFEST, find_facts, find_manifest, seal
from luthier.runs.model_folder import read_object
from luthier.runs.resolve import ADAPTER_CONFIG, ResolvedModel
from luthier.weights.card import CardFacts, write_card

ALPHA = 32
_UNKNOWN = "not known: the rows came over the wire, and no hash was taken of them"


def find_size(folder: Path) -> int | None:
    """The bytes of a folder that is whole; what a crash left unfinished there is removed."""
    found = find_manifest(folder) if folder.is_dir() else None
    if found is None:
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return found.size_bytes


def seal_adapter(made: Path, folder: Path, model: LiveModel, base: Base, *, seq: int, steps: int, ft_id: str) -> int:
    """Put an adapter that a host wrote in its place, with its lineage and its card; returns its bytes."""
    lineage = _build_lineage(model, base, seq=seq, steps=steps, ft_id=ft_id)

    def write(draft: Path) -> None:
        for path in made.iterdir():
            if path.name != MANIFEST:
                path.rename(draft / path.name)
        name_base(draft, base.resolved)
        (draft / LINEAGE).write_bytes(orjson.dumps(lineage, option=orjson.OPT_INDENT_2))
        write_card(draft, _card(lineage, model, ft_id))

    facts = {**find_facts(made), "kind": "live_adapter", "steps": steps}
    size = seal(folder, write, facts).size_bytes
    shutil.rmtree(made, ignore_errors=True)
    return size


def name_base(adapter: Path, base: ResolvedModel) -> None:
    """Have an adapter name its base as its client does; the host that wrote it knows a folder of this disk only."""
    facts = read_object(adapter / ADAPTER_CONFIG)
    named = {**facts, "base_model_name_or_path": base.name, "revision": base.revision}
    (adapter / ADAPTER_CONFIG).write_bytes(orjson.dumps(named, option=orjson.OPT_INDENT_2))


def _build_lineage(model: LiveModel, base: Base, *, seq: int, steps: int, ft_id: str) -> dict[str, Any]:
    return {
        "run": model.id,
        "model": ft_id,
        "created": _moment(model.created_at),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": base_facts(base.resolved),
        "data": {"hash": None, "note": _UNKNOWN},
        "session": model.session,
        "seq": seq,
        "steps": steps,
        "plan": {"method": "lora", "seed": model.seed, "settings": _settings(model)},
        "versions": list_versions(),
        "parent": model.origin,
        "parents": [model.origin] if model.origin else [],
        "metrics": {},
    }


def _settings(model: LiveModel) -> dict[str, Any]:
    return {
        "engine.kind": "torch",
        "method.kind": "lora",
        "method.rank": model.rank,
        "method.alpha": ALPHA,
        "train_mlp": model.train_mlp,
        "train_attn": model.train_attn,
        "train_unembed": model.train_unembed,
        "seed": model.seed,
    }


def _card(lineage: dict[str, Any], model: LiveModel, ft_id: str) -> CardFacts:
    return CardFacts(
        name=ft_id,
        base=lineage["base"]["name"],
        revision=lineage["base"]["revision"],
        method="lora",
        objective="custom",
        parents=lineage["parents"],
        settings=_settings(model),
        evidence={"optimizer steps": str(lineage["steps"])},
        data_hash=_UNKNOWN,
        versions=lineage["versions"],
    )


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
