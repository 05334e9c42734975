"""One model and its commands: done in the order of their numbers, whatever order they came in and whatever dies."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from luthier.errors import (
    CallError,
    DatabaseError,
    DiskFullError,
    HostError,
    LuthierError,
    NonFiniteError,
    StorageError,
)
from luthier.live.futures import Outcome, Promise, QueueState, failed
from luthier.live.log import DONE, FAILED, REJECTED, WAITING, Command, Ended
from luthier.live.retention import remove_states
from luthier.live.works import (
    CHANGES,
    CREATE,
    FORWARD_BACKWARD,
    LOAD,
    LOAD_NEW,
    OPTIM_STEP,
    Bench,
    Shop,
    change,
    open_model,
    save_snapshot,
    snapshot_folder,
    work,
)

if TYPE_CHECKING:
    from pathlib import Path

    from luthier.live.bases import Base
    from luthier.live.house import House
    from luthier.live.rows import LiveModel

log = logging.getLogger("luthier.live")

_MOST_DEATHS = 5
_SUSPECT_AFTER = 2
_COST_RATIO = 10.0
_NOTE_SECONDS = 30.0
_AGAIN_SECONDS = 1.0
_PATIENT_TURNS = 3
"""Turns that a model has whose gradients are not in a step yet: they have to be computed again."""
_DROPPED = "gradients_were_dropped"


@dataclass
class _Since:
    """What would have to be done again from the newest snapshot."""

    seconds: float = 0.0
    bytes: int = 0
    changes: int = 0


class Room:
    """The actor of one model. All methods belong to one event loop."""

    def __init__(self, house: House, model: LiveModel, base: Base) -> None:
        self.model, self.base = model, base
        self._house = house
        self._commands: dict[int, Command] = {}
        self._promises: dict[int, Promise] = {}
        self._counted: dict[int, int] = {}
        """Bytes that each waiting command holds in memory."""
        self._upto = -1
        """The last number that is used up, and so are all before it."""
        self._steps = 0
        self._has_gradients = False
        self._gradient_bytes = 0
        self._cleared = -1
        """The last number after which there were no gradients."""
        self._since = _Since()
        self._snapshot_cost = 0.0
        self._bench: Bench | None = None
        self._task: asyncio.Task[None] | None = None
        self._snapshot: asyncio.Task[None] | None = None
        self._state = QueueState()
        self._unmade: Mapping[str, Any] | None = None
        self._noted = 0.0
        self._arriving = 0
        self._is_closed = False
        self.is_retired = False
        """Whether the house has forgotten it: another room stands for the model, or will."""
        self.rested = time.monotonic()
        """When it was last used."""

    @property
    def is_busy(self) -> bool:
        """Whether it works now."""
        return self._task is not None

    @property
    def is_open(self) -> bool:
        """Whether the model is in a host's memory."""
        return self._bench is not None and self._bench.is_alive

    @property
    def is_used(self) -> bool:
        """Whether commands wait here, or are on their way in, or a snapshot is being written."""
        if self.is_busy or self._arriving > 0 or self._snapshot is not None:
            return True
        return any(not each.is_over for each in self._commands.values())

    async def load(self) -> None:
        """Know what the log knows. Whoever asks for a command that waits finds its promise again."""
        snapshot = self.model.snapshot_seq
        start = -1 if snapshot is None else snapshot
        self._upto = self._cleared = start
        self._steps = self.model.snapshot_steps
        await self._house.run(remove_states, self._house.store, self.model.id, snapshot)
        for command in await self._house.run(self._house.log.read, self.model, start):
            self._commands[command.seq] = command
            if command.state == WAITING:
                self._promise(command)
        while (past := self._commands.get(self._upto + 1)) is not None and past.is_over:
            self._pass(past)
        if self._has_gradients:
            self._gradient_bytes = await self._house.run(self._house.log.count_bytes, self.model, self._cleared)
        self._kick()

    async def submit(self, seq: int, kind: str, facts: Mapping[str, Any], body: bytes | None = None) -> Command:
        """Take a command in; on return it is on the disk. A number that came before answers as it did then."""
        if self.is_retired:
            return await (await self._again()).submit(seq, kind, facts, body)
        known = self._commands.get(seq)
        if known is None:
            if seq != self._upto + 1:  # this one frees those that wait behind it
                self._house.limits.check(self.model.project, body)
            with self._arrival():
                command = await self._house.run(self._house.log.add, self.model, seq, kind, facts, body)
                if command.state == WAITING and seq <= self._upto and seq not in self._commands:
                    command = await self._house.run(self._house.log.refuse_forgotten, self.model, seq)
            known = self._commands.setdefault(seq, command)
        if known.state == REJECTED:
            raise _refused(seq, known.answer or {})
        if known.kind != kind:
            raise CallError(f"seq_id {seq} of this model was a {known.kind} before, and now it is a {kind}")
        if known.state == WAITING and seq not in self._promises:
            self._promise(known)
        self._note_request()
        self._kick()
        return known

    async def reject(self, seq: int, kind: str, error: LuthierError) -> None:
        """Use a number up for a request that was refused, since its client goes on with the next one."""
        if self.is_retired:
            await (await self._again()).reject(seq, kind, error)
        elif seq not in self._commands:
            with self._arrival():
                command = await self._house.run(self._add_rejected, seq, kind, failed(error).answer)
            self._commands.setdefault(seq, command)
            self._kick()

    async def _again(self) -> Room:
        """The room that stands for the model now."""
        return await self._house.enter(self.model.project, self.model.id)

    @contextmanager
    def _arrival(self) -> Iterator[None]:
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1

    def _add_rejected(self, seq: int, kind: str, refusal: Mapping[str, Any]) -> Command:
        return self._house.log.add(self.model, seq, kind, {}, refusal=refusal)

    def find_promise(self, request: str) -> Promise | None:
        """The promise of a command that waits here."""
        return next((each for each in self._promises.values() if each.request == request), None)

    async def settle(self) -> None:
        """Put what was done into a snapshot, so that a restart need not do it again."""
        if not self.is_busy and self.is_open:
            self._task = asyncio.create_task(self._alone(partial(self._snapshot_if_due, anyway=True)))
            await asyncio.wait({self._task})

    async def rest(self) -> None:
        """Leave the host's memory; the next command brings the model back. Nothing happens while it works."""
        if self.is_busy:
            return
        if not self.is_open:
            await self._snapshot_is_over()
            return
        self._task = asyncio.create_task(self._alone(self._drop))
        await asyncio.wait({self._task})

    def close(self) -> None:
        """The server ends: what waits stays in the log."""
        self._is_closed = True
        for task in (self._task, self._snapshot):
            if task is not None:
                task.cancel()

    def _promise(self, command: Command) -> None:
        shape = FORWARD_BACKWARD if command.kind == FORWARD_BACKWARD else "json"
        promise = Promise(command.request, self.model.project, shape, lambda: self._tell(command))
        self._promises[command.seq] = self._house.promises.add(promise)
        self._counted[command.seq] = len(command.body or b"")
        self._house.limits.add(self.model.project, self._counted[command.seq])

    def _tell(self, command: Command) -> QueueState:
        awaited = self._commands.get(self._upto + 1)
        if command.seq > self._upto + 1 and awaited is None:
            return QueueState("active", f"waiting for seq_id {self._upto + 1}")
        return self._state

    def _kick(self) -> None:
        """Work, if the next number is there."""
        following = self._commands.get(self._upto + 1)
        if self._task is None and following is not None and not self._is_closed:
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            while (command := self._commands.get(self._upto + 1)) is not None:
                if not command.is_over:
                    await self._execute(command)
                self._pass(command)
                await self._snapshot_if_due()
                await self._make_way_if_wanted()
        except asyncio.CancelledError:
            raise
        except Exception:  # the edge of the actor: what waits is in the log
            log.exception("the room of %s failed", self.model.id)
            asyncio.get_running_loop().call_later(_AGAIN_SECONDS, self._kick)
        finally:
            self._task = None
            self.rested = time.monotonic()
            self._house.rests(self)

    def _pass(self, command: Command) -> None:
        """Its number is used up; note what that means for the model."""
        self._upto = command.seq
        if command.facts.get(_DROPPED):
            self._clear_gradients()
        if command.state == DONE:
            if command.kind == OPTIM_STEP:
                self._steps += 1
            if command.kind in (OPTIM_STEP, LOAD):
                self._clear_gradients()
            elif _adds_gradients(command):
                self._has_gradients = True
            self._since.changes += command.kind in (*CHANGES, LOAD_NEW)
        elif command.kind in (CREATE, LOAD_NEW) and command.state != WAITING:
            self._unmade = command.answer or {}

    def _clear_gradients(self) -> None:
        self._has_gradients, self._gradient_bytes, self._cleared = False, 0, self._upto

    async def _execute(self, command: Command) -> None:
        """Do one command to its end, however often the process that holds the model dies meanwhile."""
        started = time.monotonic()
        outcome = await self._try(command)
        self._since.seconds += time.monotonic() - started
        size = len(command.body or b"")
        self._since.bytes += size
        if _adds_gradients(command) and not outcome.is_failure:
            self._gradient_bytes += size
        command.state = FAILED if outcome.is_failure else DONE
        command.answer = outcome.answer
        command.body = None
        promise = self._promises.pop(command.seq, None)
        self._house.limits.remove(self.model.project, self._counted.pop(command.seq, 0))
        if promise is not None:
            promise.resolve(outcome)
            self._house.promises.retire(promise, keep_seconds=self._house.settings.recent_seconds)

    async def _try(self, command: Command) -> Outcome:
        deaths = 0
        while True:
            try:
                async with self._house.suspects(self.base.place, deaths >= _SUSPECT_AFTER):
                    return await self._do(command)
            except HostError as error:
                deaths += 1
                self._bench = None
                self._house.leave_place(self)  # others may need it to get out of the way of this one
                log.warning("%s: %s at seq_id %s, for the %s. time", self.model.id, error.message, command.seq, deaths)
                if deaths >= _MOST_DEATHS:
                    return await self._fail(command, _killer(command))
            except (DatabaseError, DiskFullError) as error:
                log.warning("%s waits for the disk at seq_id %s: %s", self.model.id, command.seq, error.message)
                self._state = QueueState("paused_capacity", "waiting for the disk of the server")
                await asyncio.sleep(_AGAIN_SECONDS)
                self._state = QueueState()
            except LuthierError as error:
                return await self._fail(command, error)
            except Exception as error:  # a client must hear of it, and not wait for ever
                log.exception("seq_id %s of %s failed", command.seq, self.model.id)
                return await self._fail(command, LuthierError(f"an error of the server's own: {type(error).__name__}"))

    async def _do(self, command: Command) -> Outcome:
        if self._unmade is not None:
            raise CallError(f"the model could not be made: {self._unmade.get('error', 'its creation was refused')}")
        if command.body is None and command.kind == FORWARD_BACKWARD:
            command.body = await self._house.run(self._house.log.read_body, self.model, command.seq)
        if _adds_gradients(command):
            self._check_gradients(len(command.body or b""))
        bench = await self._ready()
        made = await work(self._shop(), bench, command)
        durable = self._house.writer.put(Ended(self.model.number, command, made.outcome, made.also))
        if made.also is not None:
            await durable
        return made.outcome

    def _check_gradients(self, size: int) -> None:
        """Refuse what would pile up: until the next step it is kept, to be done again where a process dies."""
        most = self._house.settings.gradient_bytes
        if self._gradient_bytes + size > most:
            raise CallError(
                f"the requests since the last optimizer step hold {self._gradient_bytes:,} bytes, and {most:,} is most",
                hint="take a step: `optim_step` in the SDK",
            )

    async def _fail(self, command: Command, error: LuthierError) -> Outcome:
        """A failure is on the disk before it is told: a command that failed is not done again after a crash.

        But for a step that was refused, which took the gradients with it.
        """
        if error.code == NonFiniteError.code and command.kind == OPTIM_STEP:
            command.facts = {**command.facts, _DROPPED: True}
        outcome = failed(error)
        await self._house.writer.put(Ended(self.model.number, command, outcome))
        return outcome

    async def _ready(self) -> Bench:
        """The model in the memory of a living process, with every command done that counts."""
        if self._bench is not None and self._bench.is_alive:
            return self._bench
        self._bench = None
        await self._snapshot_is_over()  # whose process has died, or which is being noted
        self._state = QueueState("paused_capacity", "waiting for a place in the memory of the model's process")
        bench: Bench = await self._house.take_place(self)
        self._state = QueueState("active", "the model is being brought into memory")
        try:
            await self._rebuild(bench)
        except BaseException:
            self._house.leave_place(self)
            raise
        self._bench, self._state = bench, QueueState()
        return bench

    async def _rebuild(self, bench: Bench) -> None:
        if self.model.corrupted:
            raise LuthierError(f"the state of this model can no longer be trusted: {self.model.corrupted}")
        snapshot, folder = self.model.snapshot_seq, self._start_folder()
        takes_optimizer = self.model.origin_optimizer if snapshot is None else True
        await open_model(bench, self.model, folder, optimizer=takes_optimizer)
        for past in self._changes_since(0 if snapshot is None else snapshot + 1):
            await self._repeat(bench, past)

    def _changes_since(self, first: int) -> list[Command]:
        """What made the model what it is; not what gathered gradients that a step, when it was refused, dropped."""
        found: list[Command] = []
        for past in (self._commands[seq] for seq in range(first, self._upto + 1)):
            if past.facts.get(_DROPPED):
                while found and found[-1].kind == FORWARD_BACKWARD:
                    found.pop()
            elif past.state == DONE and past.kind in CHANGES and not past.facts.get("forward_only"):
                found.append(past)
        return found

    def _start_folder(self) -> Path | None:
        if self.model.snapshot_seq is not None:
            return snapshot_folder(self._house.store, self.model, self.model.snapshot_seq)
        origin = self.model.origin_folder
        return None if origin is None else self._house.store.home / origin

    async def _repeat(self, bench: Bench, past: Command) -> None:
        body = b""
        if past.kind == FORWARD_BACKWARD:
            body = await self._house.run(self._house.log.read_body, self.model, past.seq)
        try:
            await change(bench, self.model, past, body, self._house.store.home)
        except HostError:
            raise
        except LuthierError as error:
            if error.code in (StorageError.code, DiskFullError.code):
                raise  # a disk that is full or away says nothing of the model
            why = f"seq_id {past.seq} was done, and could not be done again after a crash: {error.message}"
            await self._house.run(self._house.log.note_corruption, self.model, why)
            self.model = replace(self.model, corrupted=why)
            raise LuthierError(why, hint="go on from the last checkpoint that was saved") from None

    def _shop(self) -> Shop:
        return Shop(self._house.store, self._house.run, self.model, self.base, self._steps)

    async def _snapshot_if_due(self, *, anyway: bool = False) -> None:
        """Now and then, and only without gradients on their way, since a snapshot holds none.

        The host takes it before the next command and writes it beside it.
        """
        if self._has_gradients or not self._since.changes or not self.is_open or self._unmade is not None:
            return
        if self._snapshot is not None and not anyway:
            return
        settings = self._house.settings
        most = max(settings.snapshot_seconds, _COST_RATIO * self._snapshot_cost)
        starts = self._commands.get(self._upto)
        is_fresh = starts is not None and starts.kind in (LOAD, LOAD_NEW) and starts.state == DONE
        if not (anyway or is_fresh or self._since.seconds >= most or self._since.bytes >= settings.snapshot_bytes):
            return
        await self._snapshot_is_over()
        if not self.is_open:
            return
        self._snapshot = asyncio.create_task(self._take_snapshot(self._upto, self._steps))
        self._since = _Since()
        await asyncio.sleep(0)  # so that it is asked for before the next command is
        if anyway:
            await self._snapshot_is_over()

    async def _take_snapshot(self, seq: int, steps: int) -> None:
        assert self._bench
        started, before = time.monotonic(), self.model.snapshot_seq
        try:
            await save_snapshot(self._shop(), self._bench, seq)
            await self._house.writer.idle()
            await self._house.run(self._house.log.note_snapshot, self.model, seq, steps)
        except LuthierError as error:
            log.warning("no snapshot of %s: %s", self.model.id, error.message)
            return
        finally:
            self._snapshot = None
        self.model = replace(self.model, snapshot_seq=seq, snapshot_steps=steps)
        self._snapshot_cost = time.monotonic() - started
        for past in [each for each in self._commands if each < seq]:
            del self._commands[past]
        if before is not None:
            await self._house.run(self._house.remove, snapshot_folder(self._house.store, self.model, before))

    async def _snapshot_is_over(self) -> None:
        if self._snapshot is not None:
            await asyncio.wait({self._snapshot})

    async def _make_way_if_wanted(self) -> None:
        """Others wait for a place in memory, and this one has had it long enough."""
        if self._house.is_wanted(self, _PATIENT_TURNS if self._has_gradients else 1):
            await self._drop()

    async def _alone(self, act: Callable[[], Awaitable[None]]) -> None:
        try:
            await act()
        except LuthierError as error:
            log.warning("%s: %s", self.model.id, error.message)
        finally:
            self._task = None
            self._house.wake_places(self)
            self._kick()

    async def _drop(self) -> None:
        await self._snapshot_is_over()
        await self._snapshot_if_due(anyway=True)
        bench, self._bench = self._bench, None
        self._house.leave_place(self)
        if bench is not None and bench.is_alive:
            try:
                await bench.do("drop", self.model.id)
            except LuthierError as error:
                log.warning("%s was not dropped: %s", self.model.id, error.message)

    def _note_request(self) -> None:
        if time.monotonic() - self._noted > _NOTE_SECONDS:
            self._noted = time.monotonic()
            self._house.spawn(self._house.run(self._house.log.note_request, self.model))


def _adds_gradients(command: Command) -> bool:
    return command.kind == FORWARD_BACKWARD and not command.facts.get("forward_only")


def _killer(command: Command) -> LuthierError:
    return LuthierError(
        f"the process of the model ended {_MOST_DEATHS} times while it did this {command.kind}",
        hint="the model stands as it did before; a smaller request may fit into memory",
    )


def _refused(seq: int, answer: Mapping[str, Any]) -> LuthierError:
    return CallError(f"seq_id {seq} was refused before: {answer.get('error', '')}", where="seq_id")
