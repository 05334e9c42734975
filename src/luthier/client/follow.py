"""A job as it goes: its events in order, each once, however often the connection breaks."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

import orjson

from luthier.client.connection import Connection, quoted
from luthier.client.submit import ROOT
from luthier.errors import ServerError, ServerGoneError
from luthier.runs import events

FINAL = ("succeeded", "failed", "cancelled")
RESTING = (*FINAL, "paused")
_SILENT_SECONDS = 45.0
"""A stream says something every 15 s, if only that it is there."""
_WORTH_WAITING = (429, 500, 502, 503, 504, 507)


@dataclass(frozen=True)
class JobEvent:
    """One event of a job as the server tells it."""

    seq: int
    kind: str
    message: str
    level: str
    data: dict[str, Any]

    def typed(self) -> events.Event | None:
        """The run's own event, where it is one, so that it is shown as a local run's."""
        kind = events.EVENT_KINDS.get(self.kind)
        if kind is None:
            return None
        wanted = {each.name: self.data[each.name] for each in fields(kind) if each.name in self.data}
        with suppress(TypeError):
            return kind(**wanted)
        return None


def follow(
    connection: Connection, job: str, *, after: int = 0, lost: Callable[[str], None], poll_seconds: float = 5.0
) -> Iterator[JobEvent]:
    """Every event of a job until it rests; `lost` hears that the connection broke, before it is tried again."""
    seen = after
    while True:
        try:
            for event in _stream(connection, job, seen):
                if event.seq > seen:
                    seen = event.seq
                    yield event
            if show(connection, job)["state"] in RESTING:
                yield from _rest(connection, job, seen)
                return
        except (ServerGoneError, OSError, http.client.HTTPException) as error:
            lost(str(error))
        except ServerError as error:
            if error.status not in _WORTH_WAITING:
                raise
            lost(error.message)
        connection.pause(poll_seconds)


def show(connection: Connection, job: str) -> dict[str, Any]:
    """The job as it stands."""
    found: dict[str, Any] = connection.get(f"{ROOT}/jobs/{quoted(job)}")
    return found


def _stream(connection: Connection, job: str, after: int) -> Iterator[JobEvent]:
    headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
    with connection.stream(f"{ROOT}/jobs/{quoted(job)}/events", headers=headers) as reply:
        name, data = "", ""
        while line := reply.readline():
            text = line.decode().rstrip("\r\n")
            if text.startswith("data:"):
                data += text[5:].strip()
            elif text.startswith("event:"):
                name = text[6:].strip()
            elif not text and data:
                if name == "end":
                    return
                yield _event(orjson.loads(data))
                name, data = "", ""


def _rest(connection: Connection, job: str, seen: int) -> Iterator[JobEvent]:
    """What was written between the end of the stream and the look at the state."""
    while page := connection.get(f"{ROOT}/jobs/{quoted(job)}/events", after_seq=seen, limit=1000)["events"]:
        for each in page:
            yield _event(each)
        seen = int(page[-1]["seq"])


def _event(facts: dict[str, Any]) -> JobEvent:
    return JobEvent(int(facts["seq"]), facts["kind"], facts["message"], facts["level"], facts.get("data") or {})
