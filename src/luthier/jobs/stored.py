"""What is known of a file, of an upload in parts, and of one part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StoredFile:
    """A file of a project. `filename` is only for showing: its content lies under its hash."""

    id: str
    project: str
    purpose: str
    filename: str
    bytes: int
    sha256: str
    status: str
    """uploaded (being checked), ready or error."""
    rows: int | None
    report: Mapping[str, Any] | None
    """What its check found."""
    created_at: float
    expires_at: float | None


@dataclass(frozen=True)
class Upload:
    """A file that comes in parts."""

    id: str
    project: str
    purpose: str
    filename: str
    mime_type: str
    bytes: int
    """How many the parts have to have together."""
    status: str
    """pending, completed, cancelled or expired."""
    file: str | None
    """The id of the file, once it is completed."""
    created_at: float
    expires_at: float


@dataclass(frozen=True)
class Part:
    """A part of an upload."""

    id: str
    upload: str
    bytes: int
    created_at: float
