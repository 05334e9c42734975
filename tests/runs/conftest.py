"""One nursery for all tests here, and a folder with rows and a spec."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.runs.children import Nursery
from tests.unit.training.works import tables_of

MakeSpec = Callable[..., Path]


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Starts children in milliseconds."""
    pytest.importorskip("torch")
    born = Nursery()
    yield born
    born.close()


@pytest.fixture
def write_spec() -> MakeSpec:
    """Write `spec.yaml` and its rows into a folder; changes are by dotted key."""

    def write(folder: Path, changes: dict[str, Any]) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "spec.yaml"
        path.write_text(yaml.safe_dump(tables_of(folder, changes)))
        return path

    return write
