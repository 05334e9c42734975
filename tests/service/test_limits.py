"""What one key may do at a time; whoever does more is told when to come again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from luthier.jobs.keys import Key, check_key
from luthier.server.settings import Limits
from tests.service.here import ROW, Here, service_here


def _refused(answer: Any) -> None:
    assert answer.status_code == 429
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert answer.json()["error"]["code"] == "quota_exceeded"


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[Here]:
    """A service with small limits."""
    limits = Limits(
        requests_per_second=0.001, requests_at_once=20, uploads=1, queued_jobs=2, streams=0, reserve_bytes=0
    )
    with service_here(tmp_path / "home", limits=limits) as here:
        yield here


def test_a_burst_is_refused_and_another_key_is_not(narrow: Here) -> None:
    answers = [narrow.ask("GET", "/luthier/v1/whoami") for _ in range(21)]
    assert [each.status_code for each in answers] == [200] * 20 + [429]
    _refused(answers[-1])
    assert narrow.ask("GET", "/luthier/v1/whoami", scope="read").status_code == 200
    assert narrow.client.get("/luthier/v1/health").status_code == 200


def test_a_project_has_so_many_unfinished_jobs(narrow: Here) -> None:
    file = narrow.send()
    for _ in range(2):
        narrow.submit(file)
    spec = {"model": {"base": "practice"}, "data": {"train": file}}
    _refused(narrow.ask("POST", "/luthier/v1/jobs", json={"spec": spec}))
    v1 = narrow.ask("POST", "/v1/fine_tuning/jobs", json={"model": "practice", "training_file": file})
    assert v1.status_code == 429
    job = narrow.ask("GET", "/luthier/v1/jobs").json()["jobs"][0]["id"]
    narrow.ask("POST", f"/luthier/v1/jobs/{job}/cancel")
    narrow.submit(file)


def test_a_key_has_so_many_streams(narrow: Here) -> None:
    job = narrow.submit()["id"]
    _refused(narrow.ask("GET", f"/luthier/v1/jobs/{job}/events", headers={"accept": "text/event-stream"}))


def test_a_key_sends_so_many_files_at_a_time(narrow: Here) -> None:
    # The client here hands a body over whole, so the first file is one that the service counts by itself.
    with narrow.service.traffic.uploading(_key(narrow)):
        headers = {"content-type": "application/octet-stream"}
        _refused(narrow.ask("POST", "/luthier/v1/files", content=ROW.encode(), headers=headers))
    assert narrow.send()


def _key(here: Here) -> Key:
    return check_key(here.service.database, here.keys["admin"])
