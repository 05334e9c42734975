"""What has to be known of a base model to take requests for it, read from its small files alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.errors import LuthierError, UnsupportedError
from luthier.host.place import Place, find_place
from luthier.runs.model_folder import read_object
from luthier.runs.resolve import ResolvedModel, find_resolved

_LONGEST = 4096
_MOST_TOKENS = 1 << 31
_FAILED_SECONDS = 60.0
_MOST_FAILED = 1000


@dataclass(frozen=True)
class Base:
    """A base model that clients name: where it answers, and what its tokens may be."""

    name: str
    resolved: ResolvedModel
    place: Place
    architecture: str
    vocabulary: int
    longest: int

    @property
    def folder(self) -> Path:
        """Its files: configuration and tokenizer."""
        return self.resolved.folder


class Bases:
    """Bases by name, each read once. `check` raises for a name that this server does not give."""

    def __init__(self, check: Callable[[str], None]) -> None:
        self._check = check
        self._known: dict[str, Base] = {}
        self._failed: dict[str, tuple[float, LuthierError]] = {}

    def known(self, name: str) -> Base | None:
        """The base, if it was found before; asks nobody."""
        return self._known.get(name)

    def find(self, name: str) -> Base:
        """The base; raises ModelError where the name leads nowhere, and for a minute does not ask again.

        Reads the disk, and may ask the hub.
        """
        self._check(name)
        if name not in self._known:
            until, error = self._failed.get(name, (0.0, None))
            if error is not None and time.monotonic() < until:
                raise error.with_traceback(None)
            self._known[name] = self._read(name)
        return self._known[name]

    def _read(self, name: str) -> Base:
        try:
            return read_base(name)
        except LuthierError as error:
            if len(self._failed) >= _MOST_FAILED:
                self._failed.clear()
            self._failed[name] = time.monotonic() + _FAILED_SECONDS, error
            raise


def read_base(name: str) -> Base:
    """The base of a name."""
    resolved = find_resolved(name)
    if resolved.adapters:
        raise UnsupportedError(
            f"`{name}` is an adapter over a base model, and models are trained live over base models only",
            hint=f"start from its base, {resolved.folder.name}, or merge it first: `luthier merge`",
            where="base_model",
        )
    config = read_object(resolved.folder / "config.json")
    text = config.get("text_config")
    facts: Mapping[str, Any] = {**config, **(text if isinstance(text, Mapping) else {})}
    return Base(
        name,
        resolved,
        find_place(resolved),
        str(facts.get("model_type", "")),
        _count(facts.get("vocab_size"), _MOST_TOKENS),
        _count(facts.get("max_position_embeddings"), _LONGEST),
    )


def _count(found: object, otherwise: int) -> int:
    return found if isinstance(found, int) and found > 0 else otherwise
