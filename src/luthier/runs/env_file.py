"""Variables in a `.env` file; nothing in it is run or expanded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from luthier.errors import CallError

_LINE = re.compile(r"\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*?)\s*")


def read_env_file(path: Path) -> dict[str, str]:
    """The variables of a `.env` file."""
    if not path.is_file():
        raise CallError(f"no file at {path}", hint="--env-file names a file of NAME=VALUE lines")
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        raise CallError(f"{path}: not UTF-8 text") from None
    found = {}
    for line in lines:
        if not line.lstrip().startswith("#") and (match := _LINE.fullmatch(line)):
            found[match[1]] = _unquoted(match[2])
    return found


def first_variable(variables: Mapping[str, str], names: Sequence[str]) -> str | None:
    """The value of the first of these names that has one."""
    return next((variables[name] for name in names if variables.get(name)), None)


def _unquoted(text: str) -> str:
    for quote in ('"', "'"):
        if len(text) > 1 and text.startswith(quote) and (end := text.find(quote, 1)) > 0:
            return text[1:end]
    return text.partition(" #")[0].rstrip()
