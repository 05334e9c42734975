"""Plain text rows: `text`, for domain adaptation."""

from __future__ import annotations

from typing import Any

from luthier.data.example import Example, Text
from luthier.data.formats.fields import read_text
from luthier.data.reasons import RowError

NAME = "text"


def matches(row: dict[str, Any]) -> bool:
    """Whether the row has a `text`."""
    return "text" in row


def read(row: dict[str, Any]) -> Text:
    """The text as it stands."""
    return Text(read_text(row, "text"))


def write(example: Example) -> dict[str, Any]:
    """The text under its one key."""
    if not isinstance(example, Text):
        raise RowError("wrong_kind", f"the text format holds plain text, not a {example.kind}")
    return {"text": example.text}
