"""A service in this process: one that many tests share, and one of a test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.here import Here, service_here


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    """For tests that leave nothing behind which another would trip over."""
    with service_here(tmp_path_factory.mktemp("here")) as found:
        yield found


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Here]:
    """For a test that counts what there is, or changes it for good."""
    with service_here(tmp_path / "own") as found:
        yield found
