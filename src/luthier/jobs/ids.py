"""Ids that cannot be guessed and are safe as names of folders."""

from __future__ import annotations

import base64
import re
import secrets

_RANDOM_BYTES = 15
_SAFE = re.compile(r"[a-z]{2,10}[-_][a-z2-7]{24}")


def new_id(prefix: str) -> str:
    """The prefix and 24 random letters and digits (120 bits)."""
    return prefix + base64.b32encode(secrets.token_bytes(_RANDOM_BYTES)).decode().lower()


def is_id(text: str) -> bool:
    """Whether this can be one of ours, and so be part of a path."""
    return _SAFE.fullmatch(text) is not None
