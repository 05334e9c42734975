"""The index of results: one small file in LUTHIER_HOME for each run, so that `ft:<base>:<run>` leads to its folder."""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from luthier.errors import RunError
from luthier.runs.home import luthier_home
from luthier.runs.layout import CONFIG, LINEAGE, model_id
from luthier.runs.lineage import read_lineage
from luthier.runs.manifest import storage_errors, write_durably

if TYPE_CHECKING:
    from luthier.runs.run import Run

_LIVE = "live"
"""The folder below LUTHIER_HOME where the server keeps what its clients train."""
_SAFE_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class ModelEntry:
    """One run in the index, and its result once there is one."""

    id: str
    base: str
    method: str
    run_folder: str
    created: str
    final: str | None = None
    parent: str | None = None

    @property
    def name(self) -> str:
        """The id by which specs and commands name the result."""
        return model_id(self.base, self.id)

    @property
    def is_there(self) -> bool:
        """Whether the run folder is still where it was."""
        return (Path(self.run_folder) / CONFIG).is_file()


def last_part(name: str) -> str:
    """The run id in an `ft:` id, or the name itself."""
    return name.rpartition(":")[2]


def register(run: Run) -> ModelEntry:
    """Put a run in the index, or renew what is known of it; its result counts from here on."""
    lineage = read_lineage(run.folder)
    final = run.final_weights
    entry = ModelEntry(
        id=run.id,
        base=run.spec.model.base,
        method=run.spec.method.kind,
        run_folder=str(run.folder.resolve()),
        created=lineage.get("created", ""),
        final=final.name if final else None,
        parent=lineage.get("parent"),
    )
    if not _SAFE_ID.fullmatch(entry.id):
        raise RunError(f"{entry.id!r} cannot be the id of a run", hint="letters, digits, `_`, `.` and `-` can be in it")
    write_durably(_path(entry.id), orjson.dumps(asdict(entry), option=orjson.OPT_INDENT_2))
    return entry


def list_models() -> list[ModelEntry]:
    """All runs in the index, the newest first; entries that cannot be read are left out."""
    found = [entry for path in _folder().glob("*.json") if (entry := _read(path))]
    return sorted(found, key=lambda entry: (entry.created, entry.id), reverse=True)


def find_model(name: str) -> ModelEntry | None:
    """The run of an `ft:` id, or of a run's own id."""
    run = last_part(name)
    return _read(_path(run)) if _SAFE_ID.fullmatch(run) else None


def find_live_adapter(name: str) -> Path | None:
    """The adapter of an `ft:` id that a client trained on this machine's server, step by step and without a run."""
    if not name.startswith("ft:"):
        return None
    for path in luthier_home().glob(f"{_LIVE}/*/*_*/{LINEAGE}"):
        if read_lineage(path.parent).get("model") == name:
            return path.parent
    return None


def list_children(entry: ModelEntry) -> list[ModelEntry]:
    """Runs that started from this one's result."""
    return [each for each in list_models() if each.parent == entry.id]


def remove_model(name: str, *, delete_files: bool = False) -> ModelEntry:
    """Take a run out of the index, and its folder from the disk if asked; never what another run stands on."""
    entry = find_model(name)
    if entry is None:
        raise RunError(f"no run `{last_part(name)}` in the index", hint="`luthier models --all` lists them")
    if delete_files and (children := [each.id for each in list_children(entry) if each.is_there]):
        raise RunError(
            f"{entry.id} is the base of {', '.join(children)}, which cannot be used without it",
            hint="remove those first, or leave out --delete-files",
        )
    with storage_errors(_folder()):
        if delete_files and entry.is_there:
            shutil.rmtree(entry.run_folder)
        _path(entry.id).unlink(missing_ok=True)
    return entry


def _folder() -> Path:
    return luthier_home() / "models"


def _path(run: str) -> Path:
    return _folder() / f"{run}.json"


def _read(path: Path) -> ModelEntry | None:
    try:
        found = orjson.loads(path.read_bytes())
        return ModelEntry(**found)
    except (OSError, ValueError, TypeError):
        return None
