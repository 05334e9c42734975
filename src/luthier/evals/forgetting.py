"""Forgetting: how well a model still foretells a general text that has nothing to do with its task."""

from __future__ import annotations

from pathlib import Path

import luthier
from luthier.errors import DataError, MissingPathError
from luthier.runs.resolve import ResolvedModel, practice_folder

METRIC = "general text perplexity"
MAX_LENGTH = 1024
_MOST_CHARACTERS = 1 << 16


def find_general(resolved: ResolvedModel, named: Path | None) -> Path:
    """The text to measure by: the named one, that of the practice model for it, or the sample that is shipped."""
    if named is not None:
        return named
    if resolved.folder.resolve() == practice_folder().resolve():
        return _demo_folder() / "general.txt"
    return Path(__file__).parent / "general.txt"


def read_general(path: Path) -> list[str]:
    """Paragraphs where empty lines part them, else lines; the beginning of a long text."""
    if not path.is_file():
        raise MissingPathError(f"no text at {path}", hint="--general names a file of plain text")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text", hint="--general names a file of plain text") from None
    parts = text.split("\n\n") if "\n\n" in text.strip() else text.splitlines()
    found, size = [], 0
    for part in (" ".join(part.split()) for part in parts):
        if part and size < _MOST_CHARACTERS:
            found.append(part)
            size += len(part)
    if not found:
        raise DataError(f"{path}: holds no text", hint="--general names a file of plain text")
    return found


def _demo_folder() -> Path:
    """Inside an installed package, or at the top of a checkout."""
    package = Path(luthier.__file__).parent
    installed = package / "examples" / "demo"
    return installed if installed.is_dir() else package.parents[1] / "examples" / "demo"
