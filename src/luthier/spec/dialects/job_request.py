"""What every dialect makes of a request for a job: the tables of a run spec, the files, and what else it says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from luthier.errors import SpecError

MOST_SUFFIX_LETTERS = 64

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass
class JobRequest:
    """What a request asks for. The tables name no file: the server puts those in once it has found them."""

    tables: dict[str, Any]
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What was decided for the person, and what was understood and changes nothing."""


def read_table(parent: Mapping[str, Any], key: str, prefix: str = "") -> dict[str, Any]:
    """An object inside another, as a copy; an empty one where it is not there."""
    value = parent.get(key)
    if value is not None and not isinstance(value, dict):
        raise SpecError(f"`{prefix}{key}`: expected an object, found {value!r}", where=f"{prefix}{key}")
    return dict(value or {})


def read_name(parent: Mapping[str, Any], key: str) -> str:
    """A text that must be there."""
    value = parent.get(key)
    if not isinstance(value, str) or not value.strip():
        raise SpecError(f"`{key}`: expected text, found {value!r}", where=key)
    return value.strip()


def share_among_processes(tables: dict[str, Any]) -> None:
    """Each accelerator asked for gets a process that takes its share of every step."""
    compute = tables.get("compute", {})
    count = compute.get("gpu_count")
    if isinstance(count, int) and count > 1 and "processes" not in compute:
        tables["compute"] = {**compute, "processes": count}


def read_metadata(metadata: Any) -> dict[str, str]:
    """The pairs as text; what is no text is shown as JSON."""
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise SpecError(f"`metadata`: expected an object, found {metadata!r}", where="metadata")
    return {key: value if isinstance(value, str) else orjson.dumps(value).decode() for key, value in metadata.items()}


def plain_suffix(suffix: Any) -> str | None:
    """A suffix as it can stand in a model's name, where a colon parts the name."""
    if suffix is None:
        return None
    if not isinstance(suffix, str) or len(suffix) > MOST_SUFFIX_LETTERS:
        raise SpecError(f"`suffix`: expected at most {MOST_SUFFIX_LETTERS} letters, found {suffix!r}", where="suffix")
    return _UNSAFE.sub("-", suffix).strip("-._") or None
