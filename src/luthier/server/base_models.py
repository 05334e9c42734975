"""The base models that a server can name: those in its models folder, and those its allow-list spells out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from luthier.runs.layout import PRACTICE

if TYPE_CHECKING:
    from luthier.server.settings import Settings

_PATTERN_SIGNS = "*?["
_CONFIG = "config.json"


def list_bases(settings: Settings) -> list[str]:
    """Names of base models; a server that takes any hub id lists only those it has, and the practice model."""
    spelt_out = {name for name in settings.allowed_models if not any(sign in name for sign in _PATTERN_SIGNS)}
    found = {*spelt_out, *_in_folder(settings.models), PRACTICE}
    return sorted(name for name in found if settings.allows(name))


def _in_folder(models: Path | None) -> list[str]:
    if models is None or not models.is_dir():
        return []
    return [f"{path.parent.parent.name}/{path.parent.name}" for path in models.glob(f"*/*/{_CONFIG}")]
