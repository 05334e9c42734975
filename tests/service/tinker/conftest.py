"""A store of live models, where nothing but the database is asked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from luthier.jobs.database import Database
from luthier.live.store import LiveStore


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStore]:
    home = tmp_path_factory.mktemp("live")
    database = Database.at_home(home)
    database.migrate()
    yield LiveStore(database, home)
    database.close()
