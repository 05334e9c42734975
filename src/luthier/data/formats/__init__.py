"""The formats rows come in: each reads a row into an Example and writes an Example back.

To add one: a module with `NAME`, `matches(row)`, `read(row)` and `write(example)`, its name in `FORMATS` below and in
`spec/data.py`. `tests/unit/data/test_formats.py` walks this list and fails until the round trip holds.
"""

from __future__ import annotations

from typing import Any, Protocol

from luthier.data.example import Example
from luthier.data.formats import alpaca, chat, completion, preference, sharegpt, text
from luthier.data.reasons import RowError
from luthier.errors import CallError


class Format(Protocol):
    """What a format module offers."""

    NAME: str

    def matches(self, row: dict[str, Any]) -> bool:
        """Whether the row's keys are those of this format."""

    def read(self, row: dict[str, Any]) -> Example:
        """The row as an Example; raises RowError."""

    def write(self, example: Example) -> dict[str, Any]:
        """The Example as a row; raises RowError for what the format cannot hold."""


# In this order: a preference pair may carry `messages` or `prompt` too.
FORMATS: dict[str, Format] = {module.NAME: module for module in (preference, chat, sharegpt, alpaca, completion, text)}


def find_format(row: dict[str, Any]) -> Format:
    """The format whose keys the row has."""
    for known in FORMATS.values():
        if known.matches(row):
            return known
    keys = ", ".join(f"`{key}`" for key in list(row)[:8]) or "none"
    raise RowError("unknown_format", f"the keys are those of no known format; found {keys}")


def get_format(name: str) -> Format | None:
    """The format of that name; None for `auto`, which is told row by row."""
    if name == "auto":
        return None
    if name not in FORMATS:
        raise CallError(f"no format `{name}`", hint="formats: " + ", ".join(["auto", *FORMATS]))
    return FORMATS[name]
