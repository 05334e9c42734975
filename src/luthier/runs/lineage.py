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
_PACKAGES_OF = {"trl": ("accelerate", "peft", "trl"), "mlx": ("mlx", "mlx-lm"), "tinker": ("tinker",)}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RACY_SECONDS = 2.0
_PROCESSES = "compute.processes"
_MOST_NAMED = 4


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
def list_versions(engine: str = "torch") -> dict[str, str]:
    """Versions of Luthier, Python and the packages that decide an engine's numbers, as far as they are installed."""
    found = {"luthier": luthier.__version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in (*_PACKAGES, *_PACKAGES_OF.get(engine, ())):
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
        "plan": {
            "hash": plan.hash(),
            "method": spec.method.kind,
            "objective": spec.objective.kind,
            "seed": spec.seed,
            "settings": plan.settings(),
        },
        "processes": spec.compute.processes,
        "versions": list_versions(spec.engine.kind),
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
    """What is no longer as it was when the run in this folder started: data, base, plan, processes; each with how.

    Of a plan the keys are named, of a base the files.
    """
    lineage = read_lineage(folder)
    if not lineage:
        return ["the lineage of the run, which cannot be read"]
    found = {
        "the data": _data_changes(lineage["data"], prepared),
        "the base model": _base_changes(lineage["base"], base_facts(resolved)),
        "the plan": _plan_changes(lineage["plan"], plan),
        "the number of processes": _told(lineage["processes"], plan.spec.compute.processes),
    }
    return [f"{said} ({how})" for said, how in found.items() if how]


def accept_changes(
    run: Run, changes: list[str], plan: RunPlan, prepared: Prepared, resolved: ResolvedModel
) -> dict[str, Any]:
    """What the run stands on from here, and what of it was changed on the way, because a person insisted."""
    lineage = read_lineage(run.folder)
    now = datetime.now().astimezone()
    fresh = build_lineage(run.id, plan, prepared, resolved, created=now, parents=lineage.get("parents", []))
    told = {"time": fresh["created"], "changed": changes}
    kept = {key: fresh[key] for key in ("base", "data", "plan", "processes")}
    return write_lineage(run, {**kept, "changes": [*lineage.get("changes", []), told]})


def list_version_changes(lineage: Mapping[str, Any]) -> list[str]:
    """Packages that decide numbers and are of another version than when the run started."""
    settings = lineage.get("plan", {}).get("settings", {})
    before, now = lineage.get("versions", {}), list_versions(settings.get("engine.kind", "torch"))
    names = [name for name in before if name != "platform" and before[name] != now.get(name)]
    return [f"{name} was {before[name]} and is {now.get(name)}" for name in names]


def _told(before: object, now: object) -> str:
    return "" if before == now else f"it was {before} and is {now}"


def _data_changes(before: Mapping[str, Any], prepared: Prepared) -> str:
    digest = data_hash(prepared)
    if before["hash"] == digest:
        return ""
    counts = [(name, count, prepared.summary[name]) for name, count in before["rows"].items()]
    apart = [f"{name} {was:,} and now {now:,}" for name, was, now in counts if was != now]
    return "; ".join(apart) or f"as many rows with another content: {before['hash'][:12]} and now {digest[:12]}"


def _base_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if is_same_base(before, now):
        return ""
    files = sorted(before["files"].keys() | now["files"].keys())
    apart = [name for name in files if before["files"].get(name) != now["files"].get(name)]
    if [each["hash"] for each in before["adapters"]] != [each["hash"] for each in now["adapters"]]:
        apart.append("the adapter of the run it starts from")
    return f"not the same: {_listed(apart)}"


def _plan_changes(before: Mapping[str, Any], plan: RunPlan) -> str:
    """The keys that changed; the number of processes is told of by itself."""
    digest = plan.hash()
    if before["hash"] == digest:
        return ""
    was, now = before.get("settings", {}), plan.settings()
    keys = [key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)]
    if keys == [_PROCESSES]:
        return ""
    apart = [f"{key} was {_shown(was.get(key))} and is {_shown(now.get(key))}" for key in keys if key != _PROCESSES]
    return _listed(apart) or _told(before["hash"][:12], digest[:12])


def _shown(value: object) -> str:
    text = orjson.dumps(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


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
