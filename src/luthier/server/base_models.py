"""The base models that a server can name: those in its models folder, those given by path, and what is allowed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.errors import LuthierError
from luthier.runs.layout import PRACTICE
from luthier.runs.model_folder import read_object
from luthier.runs.resolve import resolve_model

if TYPE_CHECKING:
    from luthier.server.settings import Settings

_PATTERN_SIGNS = "*?["
_CONFIG = "config.json"
_CONTEXT = "max_position_embeddings"


@dataclass(frozen=True)
class BaseModel:
    """A base model on this machine, by the name that clients use for it."""

    name: str
    folder: Path
    context: int | None
    """Tokens that it was made for, as far as its configuration says."""


def list_bases(settings: Settings) -> list[str]:
    """Names of base models; a server that takes any hub id lists only those it has, and the practice model."""
    spelt_out = {name for name in settings.allowed_models if not any(sign in name for sign in _PATTERN_SIGNS)}
    found = {*spelt_out, *settings.folders, *_in_folder(settings.models), PRACTICE}
    return sorted(name for name in found if settings.allows(name))


def list_base_models(settings: Settings) -> list[BaseModel]:
    """Those of the list that lie on this machine."""
    found = []
    for name in list_bases(settings):
        if (folder := _find_here(settings, name)) is not None:
            found.append(BaseModel(name, folder, _context_of(folder)))
    return found


def _find_here(settings: Settings, name: str) -> Path | None:
    """Its folder, without asking a hub for it."""
    if name in settings.folders:
        return Path(settings.folders[name])
    if name == PRACTICE or (settings.models and (settings.models / name).is_dir()):
        try:
            return resolve_model(name)
        except LuthierError:  # a folder that must not be loaded is not offered
            return None
    return None


def _context_of(folder: Path) -> int | None:
    config = read_object(folder / _CONFIG)
    text = config.get("text_config")
    found = config.get(_CONTEXT) or (text.get(_CONTEXT) if isinstance(text, dict) else None)
    return found if isinstance(found, int) else None


def _in_folder(models: Path | None) -> list[str]:
    if models is None or not models.is_dir():
        return []
    return [f"{path.parent.parent.name}/{path.parent.name}" for path in models.glob(f"*/*/{_CONFIG}")]
