"""What the routes stand on: the stores, the settings, and what the process knows besides; no route opens its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from luthier.errors import NotFoundError
from luthier.host.hosts import Hosts
from luthier.jobs.database import Database
from luthier.jobs.files import FileStore, Incoming, StoredFile
from luthier.jobs.job import WorkerRow
from luthier.jobs.queue import Queue
from luthier.jobs.store import JobStore
from luthier.live.rows import SCHEME, WEIGHTS, Checkpoint
from luthier.live.store import LiveStore
from luthier.runs.layout import checkpoint_name
from luthier.server.auth import Keyring
from luthier.server.checks import FileChecks
from luthier.server.limits import Traffic
from luthier.server.live import Live, open_live
from luthier.server.metrics import Metrics
from luthier.server.problems import problem
from luthier.server.settings import Settings
from luthier.server.stream import Feeds

if TYPE_CHECKING:
    from fastapi import FastAPI

    from luthier.errors import LuthierError

_CHECKPOINT = "ckpt-step-"
_WORKERS_SECONDS = 1.0


@dataclass
class Service:
    """One server process. Routes get it by `service_of(request)`."""

    settings: Settings
    database: Database
    files: FileStore
    jobs: JobStore
    queue: Queue
    keyring: Keyring
    traffic: Traffic
    feeds: Feeds
    metrics: Metrics
    checks: FileChecks
    hosts: Hosts = field(init=False)
    """Opened with the event loop. The model processes that answer chats; see `luthier.host`."""
    live: Live = field(init=False)
    """Opened with it. Models that clients train step by step."""
    is_draining: bool = field(default=False)
    _workers: Sequence[WorkerRow] = field(default=(), init=False)
    _workers_at: float = field(default=float("-inf"), init=False)

    @property
    def home(self) -> Path:
        """The folder of the server."""
        return self.settings.home

    def list_workers(self) -> Sequence[WorkerRow]:
        """The workers as they were a second ago at most."""
        now = time.monotonic()
        if now - self._workers_at > _WORKERS_SECONDS:
            self._workers, self._workers_at = self.queue.list_workers(), now
        return self._workers

    def find_live(self, project: str, model: str) -> Checkpoint | None:
        """The weights that a client of the live service saved under this `ft:` id or `tinker://` path, if it is one."""
        store = LiveStore(self.database, self.home)
        try:
            if model.startswith(SCHEME):
                return store.find_checkpoint(project, model)
            if model.startswith("ft:"):
                return store.find_checkpoint_model(project, model)
        except NotFoundError:
            return None
        return None

    def find_weights(self, project: str, model: str) -> Path:
        """The folder of a result of the project: its job's run folder, or the checkpoint that `:ckpt-step-N` names.

        What a client trained live is one, too.
        """
        if live := self.find_live(project, model):
            if live.kind == WEIGHTS:
                raise problem(
                    400,
                    f"`{model[:200]}` is a state to train on from, not a model to ask",
                    hint="save it with `save_weights_for_sampler`",
                    param="model",
                )
            return self.home / live.folder
        name, colon, checkpoint = model.rpartition(":")
        step = checkpoint.removeprefix(_CHECKPOINT) if colon and checkpoint.startswith(_CHECKPOINT) else ""
        try:
            found = self.jobs.find_model(project, name if step else model)
        except NotFoundError:
            raise _no_model(model) from None
        folder = self.home / "runs" / found.job
        if not step:
            return folder
        weights = folder / checkpoint_name(int(step)) if step.isascii() and step.isdigit() else None
        if weights is None or not weights.is_dir():
            raise _no_model(model)
        return weights

    def open_hosts(self) -> None:
        """Called inside the event loop, to which they belong."""
        settings = self.settings
        self.hosts = Hosts(
            settings.home,
            models=settings.models,
            idle_seconds=settings.host_idle_seconds,
            most=settings.hosts,
            precision=settings.precision,
        )
        self.live = open_live(self)

    async def close(self) -> None:
        """After the last answer."""
        await run_in_threadpool(self.checks.close)
        await self.live.close()
        await self.hosts.close()
        self.database.close()

    async def keep(self, incoming: Incoming) -> StoredFile:
        """A file that came whole: kept durably, then checked."""
        stored = await run_in_threadpool(incoming.finish)
        self.metrics.bytes_received.inc(stored.bytes)
        self.checks.schedule(stored)
        return stored

    def drain(self) -> None:
        """Asked to end: streams are closed, so that their clients go on elsewhere; other requests are finished."""
        self.is_draining = True
        self.feeds.close()
        if "live" in vars(self):  # a signal may come before the event loop does
            self.live.drain()


def _no_model(model: str) -> LuthierError:
    return problem(
        404,
        f"no model `{model[:200]}` here",
        code="model_not_found",
        hint="`GET /v1/models` lists those there are",
        param="model",
    )


def open_service(settings: Settings) -> Service:
    """Open the database (made or brought up to date where needed) and what lies on it."""
    settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    database = Database(settings.database)
    database.migrate()
    files, jobs = FileStore(database, settings.home), JobStore(database, settings.home)
    queue = Queue(database, settings.timings)
    metrics = Metrics(jobs, queue)
    return Service(
        settings=settings,
        database=database,
        files=files,
        jobs=jobs,
        queue=queue,
        keyring=Keyring(database),
        traffic=Traffic(settings.limits),
        feeds=Feeds(database, jobs, metrics),
        metrics=metrics,
        checks=FileChecks(files),
    )


def service_of(request: Request) -> Service:
    """The service of the process that answers this request."""
    app: FastAPI = request.app
    found: Service = app.state.service
    return found
