"""The durable log of commands: one row for each (model, seq), on the disk before it is acknowledged."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, bindparam, case, delete, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from luthier.errors import CallError, DatabaseError, LuthierError, StorageError
from luthier.jobs.database import Database
from luthier.jobs.ids import new_id
from luthier.jobs.tables import live_commands, live_models
from luthier.live.futures import Outcome
from luthier.live.rows import LiveModel

log = logging.getLogger("luthier.live")

WAITING, DONE, FAILED, REJECTED = "waiting", "done", "failed", "rejected"
_NAMES = ("seq", "request", "kind", "facts", "state", "answer")
_COLUMNS = tuple(live_commands.c[name] for name in _NAMES)
# What every command needs is put together once: that takes longer than running it.
_INSERTS = {
    "sqlite": sqlite.insert(live_commands).on_conflict_do_nothing(),
    "postgresql": postgresql.insert(live_commands).on_conflict_do_nothing(),
}
_AT = (live_commands.c.model == bindparam("of"), live_commands.c.seq == bindparam("at"))
_BY_SEQ = select(*_COLUMNS).where(*_AT)
_END = (
    update(live_commands)
    .where(*_AT)
    .values({name: bindparam(name) for name in ("state", "answer", "result", "facts", "ended_at")})
)
_FREE = update(live_commands).where(*_AT).values(body=None)
_AGAIN_SECONDS = 1.0
_AT_ONCE = 64

Run = Callable[..., Awaitable[Any]]


@dataclass
class Command:
    """One command of a model, as its row has it; the body only while it is at hand."""

    seq: int
    request: str
    kind: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    state: str = WAITING
    answer: Mapping[str, Any] | None = None
    body: bytes | None = None

    @property
    def is_over(self) -> bool:
        """Whether its number was used up: by work that was done or failed, or by a request that was refused."""
        return self.state != WAITING


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what else is true from the same moment on."""

    model: int
    command: Command
    outcome: Outcome
    also: Callable[[Connection], None] | None = None

    @property
    def state(self) -> str:
        """The state of its row."""
        return FAILED if self.outcome.is_failure else DONE

    @property
    def is_never_repeated(self) -> bool:
        """Whether a model that is rebuilt does without what it carried."""
        return self.outcome.is_failure or bool(self.command.facts.get("forward_only"))


class CommandLog:
    """Reads and writes the rows; every method waits for the disk."""

    def __init__(self, database: Database, *, now: Callable[[], float] = time.time) -> None:
        self._database, self._now = database, now

    def add(
        self,
        model: LiveModel,
        seq: int,
        kind: str,
        facts: Mapping[str, Any],
        body: bytes | None = None,
        *,
        refusal: Mapping[str, Any] | None = None,
    ) -> Command:
        """The new command, or the one that has this number already. With a refusal the number is only used up."""
        now = self._now()
        values: dict[str, Any] = {
            "model": model.number,
            "seq": seq,
            "project": model.project,
            "request": new_id("future-"),
            "kind": kind,
            "facts": dict(facts),
            "body": body,
            "state": WAITING if refusal is None else REJECTED,
            "answer": refusal,
            "created_at": now,
            "ended_at": None if refusal is None else now,
        }
        insert = _INSERTS["sqlite" if self._database.is_sqlite else "postgresql"]
        with self._database.write() as connection:
            if connection.execute(insert, values).rowcount == 1:
                return Command(**{name: values[name] for name in (*_NAMES, "body")})
            row = connection.execute(_BY_SEQ, {"of": model.number, "at": seq}).one()
        found = Command(*row)
        if found.kind != kind:
            raise CallError(
                f"seq_id {seq} of this model was a {found.kind} before, and now it is a {kind}",
                hint="each request of a model takes a number of its own",
                where="seq_id",
            )
        return found

    def refuse_forgotten(self, model: LiveModel, seq: int) -> Command:
        """The command of a number that is used up; one whose row was dropped long ago is refused, not done again."""
        answer = {"error": "it is used up, and its result is forgotten", "category": "user"}
        stale = update(live_commands).where(
            live_commands.c.model == model.number, live_commands.c.seq == seq, live_commands.c.state == WAITING
        )
        with self._database.write() as connection:
            connection.execute(stale.values(state=REJECTED, answer=answer, body=None, ended_at=self._now()))
            return Command(*connection.execute(_BY_SEQ, {"of": model.number, "at": seq}).one())

    def read(self, model: LiveModel, after: int) -> list[Command]:
        """The commands behind a number, in order, without their bodies."""
        where = (live_commands.c.model == model.number, live_commands.c.seq > after)
        with self._database.read() as connection:
            rows = connection.execute(select(*_COLUMNS).where(*where).order_by(live_commands.c.seq))
            return [Command(*row) for row in rows]

    def read_body(self, model: LiveModel, seq: int) -> bytes:
        """What one command carried."""
        where = (live_commands.c.model == model.number, live_commands.c.seq == seq)
        with self._database.read() as connection:
            return bytes(connection.scalar(select(live_commands.c.body).where(*where)) or b"")

    def count_bytes(self, model: LiveModel, after: int) -> int:
        """What the commands behind a number carried that were done and may have to be done again."""
        where = (live_commands.c.model == model.number, live_commands.c.seq > after, live_commands.c.state == DONE)
        with self._database.read() as connection:
            return int(connection.scalar(select(func.sum(func.length(live_commands.c.body))).where(*where)) or 0)

    def find(self, project: str, request: str) -> tuple[str, Command, Outcome | None] | None:
        """The model and the command of a request of this project, and its outcome if it has ended."""
        query = select(live_models.c.id, live_commands.c.result, *_COLUMNS).join(live_models)
        where = (live_commands.c.request == request, live_commands.c.project == project)
        with self._database.read() as connection:
            row = connection.execute(query.where(*where)).one_or_none()
        if row is None:
            return None
        command = Command(*row[2:])
        return row[0], command, _outcome(command, row[1])

    def end(self, ended: Sequence[Ended]) -> None:
        """Write how commands ended, all of them in one transaction."""
        now = self._now()
        with self._database.write() as connection:
            for each in ended:
                if each.also:
                    each.also(connection)
                values = {
                    "of": each.model,
                    "at": each.command.seq,
                    "state": each.state,
                    "answer": dict(each.outcome.answer),
                    "result": each.outcome.body,
                    "facts": dict(each.command.facts),
                    "ended_at": now,
                }
                connection.execute(_END, values)
                if each.is_never_repeated:
                    connection.execute(_FREE, {"of": each.model, "at": each.command.seq})

    def note_snapshot(self, model: LiveModel, seq: int, steps: int) -> None:
        """A snapshot holds everything up to `seq`: what those commands carried is needed no more."""
        with self._database.write() as connection:
            mine = update(live_models).where(live_models.c.number == model.number)
            connection.execute(mine.values(snapshot_seq=seq, snapshot_steps=steps))
            past = (
                live_commands.c.model == model.number,
                live_commands.c.seq <= seq,
                live_commands.c.body.is_not(None),
            )
            connection.execute(update(live_commands).where(*past).values(body=None))

    def note_request(self, model: LiveModel) -> None:
        """Note that its client is still there."""
        with self._database.write() as connection:
            mine = update(live_models).where(live_models.c.number == model.number)
            connection.execute(mine.values(last_request_at=self._now()))

    def note_corruption(self, model: LiveModel, why: str) -> None:
        """Its state can no longer be trusted, and says so from now on."""
        with self._database.write() as connection:
            mine = update(live_models).where(live_models.c.number == model.number)
            connection.execute(
                mine.values(corrupted=case((live_models.c.corrupted.is_(None), why), else_=live_models.c.corrupted))
            )

    def forget(self, before: float) -> int:
        """Drop commands that ended long ago and that no model is rebuilt from; returns how many."""
        snapshots = select(live_models.c.snapshot_seq).where(live_models.c.number == live_commands.c.model)
        old = delete(live_commands).where(
            live_commands.c.ended_at < before, live_commands.c.seq <= snapshots.scalar_subquery()
        )
        with self._database.write() as connection:
            return int(connection.execute(old).rowcount)


def _outcome(command: Command, result: bytes | None) -> Outcome | None:
    if command.state == WAITING:
        return None
    return Outcome(command.answer or {}, None if result is None else bytes(result), command.state != DONE)


class ResultWriter:
    """Writes endings in the order in which they came, as many at a time as wait; the future says that one is durable.

    A disk that is full or a database that is away is asked again: what was acknowledged is in the log already, so
    that nothing is lost meanwhile.
    """

    def __init__(self, log_of_commands: CommandLog, run: Run) -> None:
        self._log, self._run = log_of_commands, run
        self._pending: list[tuple[Ended, asyncio.Future[None]]] = []
        self._task: asyncio.Task[None] | None = None
        self._last: asyncio.Future[None] | None = None

    def put(self, ended: Ended) -> asyncio.Future[None]:
        """Have it written; the future raises what kept it from being true, where that was not the disk."""
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        durable.add_done_callback(_consume)
        self._pending.append((ended, durable))
        self._last = durable
        if self._task is None:
            self._task = asyncio.create_task(self._write())
        return durable

    async def idle(self) -> None:
        """Until everything that came so far is on the disk."""
        if self._last is not None and not self._last.done():
            await asyncio.wait({self._last})

    async def close(self) -> None:
        """Until all is written, or the disk refuses."""
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=5 * _AGAIN_SECONDS)

    async def _write(self) -> None:
        while self._pending:
            batch = self._take()
            try:
                await self._run(self._log.end, [ended for ended, _ in batch])
            except (DatabaseError, StorageError) as error:
                log.warning("results wait for the disk: %s", error.message)
                self._pending[:0] = batch
                await asyncio.sleep(_AGAIN_SECONDS)
            except Exception as error:  # the edge of this task: who waits for it is told
                if not isinstance(error, LuthierError):
                    log.exception("a result could not be written")
                for _, durable in batch:
                    _settle(durable, error)
            else:
                for _, durable in batch:
                    _settle(durable)
        self._task = None

    def _take(self) -> list[tuple[Ended, asyncio.Future[None]]]:
        """The next endings; one that makes more true than itself is written alone, since it may be refused."""
        count = 0
        for ended, _ in self._pending[:_AT_ONCE]:
            if ended.also and count:
                break
            count += 1
            if ended.also:
                break
        batch, self._pending = self._pending[:count], self._pending[count:]
        return batch


def _settle(durable: asyncio.Future[None], error: Exception | None = None) -> None:
    if durable.done():
        return
    if error is None:
        durable.set_result(None)
    else:
        durable.set_exception(error)


def _consume(durable: asyncio.Future[None]) -> None:
    """Nobody has to look at it."""
    if not durable.cancelled():
        durable.exception()
