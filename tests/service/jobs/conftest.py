"""One nursery for all tests here, and a desk of one's own for each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.jobs.desk import HASTY, Desk
from tests.service.jobs.nursery import Nursery


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Forks workers and trainers in milliseconds."""
    pytest.importorskip("torch")
    born = Nursery(tmp_path_factory.mktemp("nursery"))
    yield born
    born.close()


@pytest.fixture
def desk(tmp_path: Path, nursery: Nursery) -> Iterator[Desk]:
    """A home with a database, whose workers end with the test."""
    opened = Desk(tmp_path / "service", nursery)
    yield opened
    opened.close()


@pytest.fixture
def hasty_desk(tmp_path: Path, nursery: Nursery) -> Iterator[Desk]:
    """One where patience is over after seconds."""
    opened = Desk(tmp_path / "service", nursery, HASTY)
    yield opened
    opened.close()
