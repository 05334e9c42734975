"""Model folders that are made once for all tests of engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.engines.tiny import save_shape

Shaped = Callable[..., Path]


@pytest.fixture(scope="session")
def shaped(tmp_path_factory: pytest.TempPathFactory) -> Shaped:
    """The folder of an architecture, made when it is first asked for."""
    made: dict[str, Path] = {}

    def find(kind: str, **settings: object) -> Path:
        key = "_".join([kind, *(f"{name}-{value}" for name, value in sorted(settings.items()))])
        if key not in made:
            made[key] = save_shape(tmp_path_factory.mktemp(kind), kind, **settings)
        return made[key]

    return find
