"""A service in this process, with keys of two projects, and jobs and files that need no worker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from luthier.jobs.job import Claim, Job, NewEvent, NewJob, Outcome, WorkerRow
from luthier.jobs.keys import create_key
from luthier.server.app import create_app
from luthier.server.service import Service, open_service
from luthier.server.settings import Limits, Settings

ROW = '{"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]}\n'
SCOPES = ("read", "submit", "admin")
BASE_URL = "http://127.0.0.1:8440"


@dataclass
class Here:
    """The service, a client, and a key for each scope of the project `default`, and those of `other`."""

    service: Service
    client: TestClient
    keys: Mapping[str, str]
    others: Mapping[str, str]

    def ask(self, verb: str, path: str, *, scope: str = "admin", other: bool = False, **more: Any) -> Any:
        """A request with a key of the scope."""
        key = (self.others if other else self.keys)[scope]
        headers = {"authorization": f"Bearer {key}", **more.pop("headers", {})}
        return self.client.request(verb, path, headers=headers, **more)

    def send(self, text: str = ROW, **more: Any) -> str:
        """The id of a file that was sent."""
        done = self.ask(
            "POST",
            "/luthier/v1/files",
            content=text.encode(),
            headers={"content-type": "application/octet-stream"},
            **more,
        )
        assert done.status_code == 201, done.text
        return str(done.json()["id"])

    def submit(self, file: str | None = None, **more: Any) -> dict[str, Any]:
        """A job on a file."""
        spec = {"model": {"base": "practice"}, "data": {"train": file or self.send(**more)}}
        done = self.ask("POST", "/luthier/v1/jobs", json={"spec": spec}, **more)
        assert done.status_code == 201, done.text
        found: dict[str, Any] = done.json()
        return found

    def work(self, job: str, outcome: Outcome | None = None, events: int = 0) -> Claim:
        """Be the worker that runs the job: checks it, starts it, reports events, and ends it."""
        worker = WorkerRow("tests", "here", {"slots": 9, "processors": 9}, {"slots": 9, "processors": 9})
        queue = self.service.queue
        while (claim := queue.claim(worker)) is not None and claim.job.id != job:
            pass
        assert claim
        if claim.kind == "check":
            queue.validated(claim, needs={})
            return self.work(job, outcome, events)
        queue.started(claim, pid=1, process_started="1", token="t")
        queue.report(claim, [NewEvent("step_done", f"step {n}", step=n) for n in range(1, events + 1)])
        if outcome:
            queue.finish(claim, outcome)
        return claim


def make_job(service: Service, project: str = "default", count: int = 1) -> list[Job]:
    """Jobs written straight into the store."""
    spec = {"model": {"base": "practice"}, "data": {"train": "none"}}
    return [service.jobs.create(NewJob(project, "own", spec))[0] for _ in range(count)]


@contextmanager
def service_here(home: Path, *, limits: Limits | None = None, **more: Any) -> Iterator[Here]:
    """A service with its application, whose event loop runs as long as the block."""
    home.mkdir(parents=True, exist_ok=True)
    more.setdefault("workers", 0)
    settings = Settings(
        home=home, database=f"sqlite:///{home / 'luthier.db'}", limits=limits or Limits(reserve_bytes=0), **more
    )
    service = open_service(settings)
    made = [
        {scope: create_key(service.database, project, [scope])[1] for scope in SCOPES}
        for project in ("default", "other")
    ]
    with TestClient(create_app(service), base_url=BASE_URL, raise_server_exceptions=False) as client:
        yield Here(service, client, *made)
