"""Events of jobs as server-sent events: no gap, no repetition, and one question to the database for all streams."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import orjson
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from luthier.errors import DatabaseError, NotFoundError
from luthier.jobs.job import JobEvent
from luthier.server.problems import problem

if TYPE_CHECKING:
    from fastapi import Request

    from luthier.jobs.database import Database
    from luthier.jobs.keys import Key
    from luthier.jobs.store import JobStore
    from luthier.server.metrics import Metrics
    from luthier.server.service import Service

log = logging.getLogger("luthier.server")

LOOK_SECONDS = 0.05
KEEP_ALIVE_SECONDS = 15.0
KEEP_ALIVE = b": still here\n\n"
_RETRY_SECONDS = 1.0
_PAGE = 500
_RING = 1000

Render = Callable[[JobEvent], bytes]


class _Feed:
    """The newest events of one job, and those who wait for more."""

    def __init__(self) -> None:
        self.watchers = 0
        self.newest: int | None = None
        """The number of the newest event that is known; None until a stream has caught up."""
        self._ring: deque[JobEvent] = deque(maxlen=_RING)
        self._turn = asyncio.Event()

    def after(self, seq: int) -> list[JobEvent] | None:
        """The events after this one; None where the database must be asked."""
        if self.newest is None:
            return None
        if seq >= self.newest:
            return []
        first = self._ring[0].seq if self._ring else self.newest + 1
        if seq < first - 1:
            return None
        return [self._ring[index] for index in range(seq + 1 - first, len(self._ring))]

    def add(self, events: list[JobEvent]) -> None:
        """More has happened; those who wait get their turn."""
        for event in events:
            if self.newest is None or event.seq <= self.newest:
                continue
            if self._ring and event.seq != self._ring[-1].seq + 1:
                self._ring.clear()
            self._ring.append(event)
            self.newest = event.seq
        self.wake()

    def wake(self) -> None:
        """Let all who wait look again."""
        self._turn.set()
        self._turn = asyncio.Event()

    async def wait(self) -> None:
        """Until something happened, or it is time for a sign of life."""
        await self._turn.wait()


class Feeds:
    """Every job that somebody watches; one task asks the database for all of them."""

    def __init__(self, database: Database, jobs: JobStore, metrics: Metrics) -> None:
        self._database, self._jobs, self.metrics = database, jobs, metrics
        self._feeds: dict[str, _Feed] = {}
        self._task: asyncio.Task[None] | None = None
        self.is_closed = False

    @contextmanager
    def watching(self, job: str) -> Iterator[_Feed]:
        """The feed of a job, kept up while somebody watches it."""
        feed = self._feeds.setdefault(job, _Feed())
        feed.watchers += 1
        self.metrics.streams.inc()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._look())
        try:
            yield feed
        finally:
            self.metrics.streams.dec()
            feed.watchers -= 1
            if not feed.watchers:
                del self._feeds[job]

    def close(self) -> None:
        """End all streams; their clients connect again and go on from the last event they saw."""
        self.is_closed = True
        for feed in self._feeds.values():
            feed.wake()

    async def _look(self) -> None:
        seen = ""
        alive_at = time.monotonic()
        while self._feeds and not self.is_closed:
            await asyncio.sleep(LOOK_SECONDS)
            if time.monotonic() - alive_at >= KEEP_ALIVE_SECONDS:
                alive_at = time.monotonic()
                for feed in self._feeds.values():
                    feed.wake()
            try:
                seen = await self._look_once(seen)
            except DatabaseError as error:
                log.warning("streams wait for the database: %s", error.message)
                await asyncio.sleep(_RETRY_SECONDS)
            except Exception:  # the edge of this task: streams must not stand still for an error of ours
                log.exception("reading new events failed")
                await asyncio.sleep(_RETRY_SECONDS)

    async def _look_once(self, seen: str) -> str:
        mark = await run_in_threadpool(self._database.change_mark)
        wanted = {job: feed.newest for job, feed in self._feeds.items() if feed.newest is not None}
        if wanted and mark != seen:
            found = await run_in_threadpool(self._jobs.new_events, wanted)
            for job, events in found.items():
                if feed := self._feeds.get(job):
                    feed.add(events)
        # Feeds that were not caught up when this was counted are looked at again.
        return mark if len(wanted) == len(self._feeds) else ""


def parse_last_event_id(request: Request) -> int | None:
    """The number in `Last-Event-ID`, which a client sends when it connects again."""
    text = request.headers.get("last-event-id", "").strip()
    if not text:
        return None
    number = text.rpartition("-")[2]
    if not number.isascii() or not number.isdigit() or len(number) > 15:
        raise problem(400, "`Last-Event-ID` is not a number of an event")
    return int(number)


def event_stream(
    service: Service, key: Key, job: str, *, after_seq: int, render: Render, end: Callable[[str], bytes] | None = None
) -> StreamingResponse:
    """Events of a job after `after_seq`, then new ones as they come, until the job is final.

    `render` makes the bytes of one event, `end` those that follow the last one. Whoever calls has found the job.
    """
    if service.is_draining:
        raise problem(503, "the server is about to end", code="unavailable", hint="connect again in a moment")
    service.traffic.check_stream(key)
    source = _follow(service, key, job, after_seq, render, end)
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(source, media_type="text/event-stream", headers=headers)


async def _follow(
    service: Service, key: Key, job: str, seq: int, render: Render, end: Callable[[str], bytes] | None
) -> AsyncIterator[bytes]:
    with service.traffic.streaming(key), service.feeds.watching(job) as feed:
        yield b"retry: 1000\n\n"
        state_is_known = False
        while not service.feeds.is_closed:
            found = feed.after(seq)
            if found is None or (not found and not state_is_known):
                read = await _read(service, key.project, job, seq)
                if read is None:
                    yield KEEP_ALIVE
                    continue
                final, found = read
                state_is_known = not found
                if not found:
                    feed.newest = max(feed.newest or 0, seq)
                    if final:
                        yield end(final) if end else b""
                        return
            if found:
                service.feeds.metrics.events_sent.inc(len(found))
                yield b"".join(render(event) for event in found)
                seq = found[-1].seq
                state_is_known = state_is_known and not any(each.kind == "state_changed" for each in found)
                continue
            if service.feeds.is_closed or feed.after(seq) != []:
                continue  # while the database was asked; whoever was woken then is not woken again
            waited_since = time.monotonic()
            await feed.wait()
            if time.monotonic() - waited_since >= KEEP_ALIVE_SECONDS / 2 and not feed.after(seq):
                yield KEEP_ALIVE


async def _read(service: Service, project: str, job: str, seq: int) -> tuple[str, list[JobEvent]] | None:
    """The final state, if there is one, and what happened up to it; None while the database is away."""

    def read() -> tuple[str, list[JobEvent]]:
        found = service.jobs.find(project, job)  # before the events: a final state is never seen without its event
        page = service.jobs.list_events(project, job, after_seq=seq, limit=_PAGE)
        return str(found.state) if found.is_final else "", list(page.items)

    try:
        return await run_in_threadpool(read)
    except NotFoundError:
        return "deleted", []
    except DatabaseError:
        await asyncio.sleep(_RETRY_SECONDS)
        return None


def sse(event: object, *, seq: int | None = None, name: str = "") -> bytes:
    """One server-sent event; JSON holds no newline, so that one line of data is enough."""
    head = (f"id: {seq}\n" if seq is not None else "") + (f"event: {name}\n" if name else "")
    return head.encode() + b"data: " + orjson.dumps(event) + b"\n\n"
