"""Where a run's result comes from: base, data, plan, versions and parents, by hashes that can be checked later."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
import time
from collections.abc import Mapping
from datetime import datetime
from fnmatch import fnmatch
from functools import cache as remember
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

import luthier
from luthier.runs.home import luthier_home
from luthier.runs.layout import LINEAGE
from luthier.runs.manifest import hash_file, write_durably

if TYPE_CHECKING:
    from luthier.data.prepared import Prepared
    from luthier.runs.resolve import ResolvedModel
    from luthier.runs.run import Run
    from luthier.spec.plan import RunPlan

_BASE_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model")
_NOT_BASE = ("manifest.json", "certificate.json", "consolidated*.safetensors")
_PACKAGES = ("torch", "transformers", "bitsandbytes", "numpy", "safetensors", "tokenizers")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RACY_SECONDS = 2.0
_CHANGES = {
    "data": "the data",
    "base": "the base model",
    "plan": "the plan",
    "processes": "the number of processes",
}


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a model folder that decides what the model does; remembered while a file is unchanged."""
    found_names = {path.name for pattern in _BASE_FILES for path in folder.glob(pattern)}
    names = sorted(name for name in found_names if not any(fnmatch(name, pattern) for pattern in _NOT_BASE))
    known = _read_known()
    fresh: dict[str, list[object]] = {}
    found = {name: _hash_once(folder / name, known, fresh) for name in names if (folder / name).is_file()}
    if fresh:
        kept = {path: entry for path, entry in known.items() if Path(path).exists()}
        write_durably(_known_path(), orjson.dumps({**kept, **fresh}))
    return found


def base_hash(folder: Path) -> str:
    """One hash over all of them."""
    return _hash_of(file_hashes(folder))


def data_hash(prepared: Prepared) -> str:
    """A hash of every token, what of it is trained, and which examples are trained and held out."""
    hashes = prepared.summary.get("hashes", {})
    whole = hashlib.sha256(orjson.dumps(hashes, option=orjson.OPT_SORT_KEYS))
    for examples in (prepared.train, prepared.valid):
        whole.update(len(examples).to_bytes(8, "little") + examples.tobytes())
    return whole.hexdigest()


@remember
def list_versions() -> dict[str, str]:
    """Versions of Luthier, Python and the packages that decide numbers, as far as they are installed."""
    found = {"luthier": luthier.__version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def base_facts(resolved: ResolvedModel) -> dict[str, Any]:
    """The base as the lineage names it: files with their hashes, adapters under the new one, and one hash of both."""
    files = file_hashes(resolved.folder)
    adapters = [
        {"path": str(each.path), "quantised": each.quantised, "hash": base_hash(each.path)}
        for each in resolved.adapters
    ]
    return {
        "name": resolved.name,
        "revision": resolved.revision,
        "files": files,
        "adapters": adapters,
        "hash": _hash_of({**files, **{f"adapter {n}": str(each["hash"]) for n, each in enumerate(adapters)}}),
    }


def is_same_base(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two bases compute the same; of one commit on the hub, more files may have been fetched since."""
    if before["hash"] == now["hash"]:
        return True
    is_pinned = before["revision"] == now["revision"] and _COMMIT.fullmatch(str(now["revision"]))
    adapters = [[each["hash"] for each in facts["adapters"]] for facts in (before, now)]
    if not is_pinned or adapters[0] != adapters[1]:
        return False
    files = now["files"]
    return all(files.get(name, digest) == digest for name, digest in before["files"].items())


def build_lineage(
    run: str, plan: RunPlan, prepared: Prepared, resolved: ResolvedModel, *, created: datetime, parents: list[str]
) -> dict[str, Any]:
    """What is known when a run starts; metrics and the time it finished come later."""
    spec = plan.spec
    return {
        "run": run,
        "created": created.isoformat(timespec="seconds"),
        "finished": None,
        "base": base_facts(resolved),
        "data": {
            "train": spec.data.train,
            "valid": spec.data.valid,
            "hash": data_hash(prepared),
            "cache": prepared.folder.name,
            "rows": {name: prepared.summary[name] for name in ("rows", "train", "valid", "dropped")},
        },
        "plan": {"hash": plan.hash(), "method": spec.method.kind, "objective": spec.objective.kind, "seed": spec.seed},
        "processes": spec.compute.processes,
        "versions": list_versions(),
        "parent": resolved.parent,
        "parents": parents,
        "metrics": {},
    }


def read_lineage(folder: Path) -> dict[str, Any]:
    """The lineage in a run folder; empty when there is none that can be read."""
    try:
        found = orjson.loads((folder / LINEAGE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_lineage(run: Run, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Add facts to the lineage of a run, whole or not at all; tables such as `metrics` are merged."""
    lineage = read_lineage(run.folder)
    for key, value in facts.items():
        before = lineage.get(key)
        lineage[key] = {**before, **value} if isinstance(before, dict) and isinstance(value, Mapping) else value
    write_durably(run.folder / LINEAGE, orjson.dumps(lineage, option=orjson.OPT_INDENT_2))
    return lineage


def list_parents(parent_folder: Path | None) -> list[str]:
    """The run in this folder and the runs it came from in turn, the nearest first."""
    if parent_folder is None:
        return []
    return [parent_folder.name, *read_lineage(parent_folder).get("parents", [])]


def list_changes(folder: Path, plan: RunPlan, prepared: Prepared, resolved: ResolvedModel) -> list[str]:
    """What is no longer as it was when the run in this folder started: data, base, plan, processes; each with how."""
    lineage = read_lineage(folder)
    if not lineage:
        return ["the lineage of the run, which cannot be read"]
    base = base_facts(resolved)
    before = {
        "data": lineage["data"]["hash"],
        "base": base["hash"] if is_same_base(lineage["base"], base) else lineage["base"]["hash"],
        "plan": lineage["plan"]["hash"],
        "processes": lineage["processes"],
    }
    now = {
        "data": data_hash(prepared),
        "base": base["hash"],
        "plan": plan.hash(),
        "processes": plan.spec.compute.processes,
    }
    return [
        f"{said} (it was {_short(before[key])} and is {_short(now[key])})"
        for key, said in _CHANGES.items()
        if before[key] != now[key]
    ]


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _hash_of(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256(orjson.dumps(dict(hashes), option=orjson.OPT_SORT_KEYS)).hexdigest()


def _known_path() -> Path:
    return luthier_home() / "hashes.json"


def _read_known() -> dict[str, list[object]]:
    try:
        known = orjson.loads(_known_path().read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _hash_once(path: Path, known: dict[str, list[object]], fresh: dict[str, list[object]]) -> str:
    real = path.resolve()
    if path.is_symlink() and real.parent.name == "blobs" and _SHA256.fullmatch(real.name):
        return real.name  # the hub's cache names each large file by its SHA-256
    stamp = _stamp(real)
    entry = known.get(str(real))
    if isinstance(entry, list) and entry[:-1] == stamp:
        return str(entry[-1])
    found = hash_file(real)
    # A file written a moment ago may be written again without its times telling, so it is not remembered yet.
    if _stamp(real) == stamp and time.time() - real.stat().st_mtime > _RACY_SECONDS:
        fresh[str(real)] = [*stamp, found]
    return found


def _stamp(path: Path) -> list[object]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]
