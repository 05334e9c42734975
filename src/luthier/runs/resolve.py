"""Resolve a MODEL as people name it to a folder on this machine."""

from __future__ import annotations

import difflib
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from luthier.errors import ModelError
from luthier.extras import import_extra

PRACTICE = "practice"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TEXT_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]


def practice_folder() -> Path:
    """The practice model that is shipped with the package."""
    import luthier.testing

    return Path(luthier.testing.__file__).parent / "practice"


def resolve_model(base: str, *, revision: str | None = None) -> Path:
    """The folder of a model: `practice`, a folder, or a hub id (its text files are fetched if need be)."""
    if base == PRACTICE:
        return _checked(practice_folder())
    path = Path(base).expanduser()
    if path.is_dir():
        return _checked(path)
    if base.startswith("ft:"):
        raise ModelError(f"no run on this machine has the id `{base}`", hint="name its folder instead")
    if base.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(base):
        is_close = difflib.get_close_matches(base, [PRACTICE], 1)
        raise ModelError(f"no model at {base}", hint=f"did you mean `{PRACTICE}`?" if is_close else _practice_hint())
    return _checked(_from_hub(base, revision))


def _practice_hint() -> str:
    return "a model is a folder, a hub id such as Qwen/Qwen3-0.6B, or `practice`"


def _from_hub(name: str, revision: str | None) -> Path:
    hub = import_extra("huggingface_hub", "torch")
    arguments: dict[str, Any] = {"repo_id": name, "revision": revision, "allow_patterns": _TEXT_FILES}
    with suppress(Exception):  # not in the local cache yet, which the hub's client says in many ways
        return Path(hub.snapshot_download(**arguments, local_files_only=True))
    try:
        return Path(hub.snapshot_download(**arguments))
    except Exception as error:  # no network, no such model, no right to it: the client's own words tell
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{name}: not on this machine, and the hub did not give it: {said}",
            hint="check the name and the network, or give a folder; `practice` needs neither",
        ) from None


def _checked(folder: Path) -> Path:
    """Refuse a model that wants code of its own run: choosing a base model must never run code."""
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        try:
            facts = orjson.loads(path.read_bytes()) if path.is_file() else {}
        except ValueError as error:
            raise ModelError(f"{path}: not JSON: {error}") from None
        if isinstance(facts, dict) and facts.get("auto_map"):
            raise ModelError(
                f"{folder.name}: {name} asks to run code of its own (`auto_map`), which Luthier never does",
                hint="use a model whose architecture transformers knows",
            )
    return folder
