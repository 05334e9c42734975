"""All rooms of a server, what they share, and which models are in the memory of which host."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from luthier.errors import HostError, LuthierError
from luthier.live.futures import Promises
from luthier.live.limits import LiveSettings, Waiting
from luthier.live.log import CommandLog, ResultWriter
from luthier.live.room import Room

if TYPE_CHECKING:
    from luthier.host.place import Place
    from luthier.live.bases import Base, Bases
    from luthier.live.rows import LiveModel
    from luthier.live.store import LiveStore
    from luthier.live.works import Bench

log = logging.getLogger("luthier.live")

_THREADS = 16
_LOOKUPS = 4
_MOST_STARTS = 6
_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 15.0


class Hosts(Protocol):
    """Where benches come from; `luthier.host.hosts.Hosts`."""

    async def bench(self, place: Place) -> Any:
        """The bench of a base model; its process is started where there is none."""

    def list_bases(self) -> list[Place]:
        """The base models in memory."""


class House:
    """Rooms by model. All methods belong to one event loop."""

    def __init__(self, store: LiveStore, bases: Bases, hosts: Hosts, settings: LiveSettings) -> None:
        self.store, self.bases, self.settings = store, bases, settings
        self.log = CommandLog(store.database, now=store.now)
        self.promises = Promises()
        self.limits = Waiting(settings.most_waiting, settings.most_waiting_bytes)
        self._hosts = hosts
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="live")
        self._lookups = ThreadPoolExecutor(_LOOKUPS, thread_name_prefix="live-bases")
        self.writer = ResultWriter(self.log, self.run)
        self._rooms: dict[str, Room] = {}
        self._entering: dict[str, asyncio.Lock] = {}
        self._places: dict[Place, _Places] = defaultdict(lambda: _Places(settings.most_open))
        self._stays = _Stays()
        self._suspects: dict[Place, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Something that waits for the disk, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def find_base(self, name: str) -> Base:
        """A base model. The hub may be asked, which takes its time, so not in the threads that all others need."""
        if (known := self.bases.known(name)) is not None:
            return known
        return await asyncio.get_running_loop().run_in_executor(self._lookups, self.bases.find, name)

    def spawn(self, work: Coroutine[Any, Any, Any] | Awaitable[Any]) -> None:
        """Something that nobody waits for; what it raises is told in the server's log."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._end_task)

    async def enter(self, project: str, model: str) -> Room:
        """The room of a model of this project, as the log has it; NotFoundError where there is none."""
        found = self._rooms.get(model)
        if found is not None and found.model.project == project:
            return found
        async with self._entering.setdefault(model, asyncio.Lock()):
            # Read here: a room that was given up meanwhile has left a newer snapshot.
            row: LiveModel = await self.run(self.store.find_model, project, model)
            if (found := self._rooms.get(model)) is None:
                row = await self.run(self.store.find_model, project, model)  # a room that is gone may have changed it
                base = await self.find_base(row.base)
                found = Room(self, row, base)
                await found.load()
                self._rooms[model] = found
        self._entering.pop(model, None)
        return found

    async def go_on(self) -> None:
        """What a server does that starts: every model for which commands wait goes on."""
        for model in await self.run(self.store.list_unfinished):
            try:
                await self.enter(model.project, model.id)
            except LuthierError as error:
                log.warning("%s does not go on: %s", model.id, error.message)

    async def bench(self, place: Place) -> Bench:
        """The bench of a base, however often its process has to be started; a server short of memory makes room."""
        await self._stays.until_others_had_theirs(place)
        try:
            found = await self._find_bench(place)
        finally:
            self._stays.end_wish(place)
        self._stays.begin(place)
        return found

    async def _find_bench(self, place: Place) -> Bench:
        failures, pause = 0, _PAUSE_SECONDS
        while True:
            try:
                found: Bench = await self._hosts.bench(place)
                return found
            except HostError as error:
                if await self._rest_others(place):
                    continue
                if self._is_full(place):
                    self._stays.wish(place, self._hosts.list_bases())
                    await asyncio.sleep(_PAUSE_SECONDS)
                    continue
                failures += 1
                if failures >= _MOST_STARTS:
                    log.warning("%s; %s", error.message, error.hint)
                    raise LuthierError("the process of the model does not start", hint="its log tells why") from error
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _is_full(self, place: Place) -> bool:
        """Whether there is no room for one base model more, which passes; anything else does not, or not by itself."""
        living = self._hosts.list_bases()
        return place not in living and len(living) >= self.settings.most_hosts

    async def take_place(self, room: Room) -> Bench:
        """The bench of the room's base, once there is a place for the model in its memory."""
        await self._places[room.base.place].enter(room)
        try:
            return await self.bench(room.base.place)
        except BaseException:
            self.leave_place(room)
            raise

    def leave_place(self, room: Room) -> None:
        """The model is not in memory any more."""
        self._places[room.base.place].leave(room)

    def wake_places(self, room: Room) -> None:
        """The room is idle again, so that it may make way."""
        self._places[room.base.place].wake()

    def is_wanted(self, room: Room, turns: int = 1) -> bool:
        """Whether the room shall make way for others, having had its place for so many turns."""
        place = room.base.place
        places, seconds = self._places[place], turns * self.settings.turn_seconds
        return (places.are_wanted or self._stays.shall_end(place)) and places.has_had(room, seconds)

    @asynccontextmanager
    async def suspects(self, place: Place, is_suspect: bool) -> AsyncIterator[None]:
        """Of commands during which a process died more than once, one is tried at a time: so the guilty is found."""
        if not is_suspect:
            yield
            return
        async with self._suspects[place]:
            yield

    def rests(self, room: Room) -> None:
        """A room has nothing to do: after a while it is put into a snapshot, later it leaves the memory."""
        self.wake_places(room)
        if before := self._timers.pop(room.model.id, None):
            before.cancel()
        loop = asyncio.get_running_loop()
        self._timers[room.model.id] = loop.call_later(self.settings.settle_seconds, self._settle, room)

    def _settle(self, room: Room) -> None:
        self._timers.pop(room.model.id, None)
        if not room.is_busy:
            self.spawn(self._settle_down(room))

    async def _settle_down(self, room: Room) -> None:
        await room.settle()
        if not room.is_busy and room.model.id not in self._timers:
            later = max(0.0, self.settings.idle_seconds - self.settings.settle_seconds)
            self._timers[room.model.id] = asyncio.get_running_loop().call_later(later, self._leave, room)

    def _leave(self, room: Room) -> None:
        self._timers.pop(room.model.id, None)
        if not room.is_busy:
            self.spawn(self._let_go(room))

    async def _let_go(self, room: Room) -> None:
        await room.rest()
        await self.writer.idle()
        if not room.is_used and not room.is_open:
            room.is_retired = True
            self._rooms.pop(room.model.id, None)

    async def _rest_others(self, place: Place) -> bool:
        """Have idle models of other bases leave their hosts, so that one of those can end; False where none is idle."""
        open_rooms = [room for room in self._rooms.values() if room.is_open and not room.is_busy]
        others = [room for room in open_rooms if room.base.place != place]
        for room in others:
            await room.rest()
        return bool(others)

    def remove(self, folder: Path) -> None:
        """Files that nothing names any more."""
        shutil.rmtree(folder, ignore_errors=True)

    def drain(self) -> None:
        """The server is about to end: nobody waits any longer."""
        self.promises.drain()

    async def close(self) -> None:
        """What was done is written; what waits stays in the log."""
        for timer in self._timers.values():
            timer.cancel()
        for room in self._rooms.values():
            room.close()
        for task in self._tasks:
            task.cancel()
        await self.writer.close()
        with suppress(RuntimeError):
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._lookups.shutdown(wait=False, cancel_futures=True)

    def _end_task(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("%s", error)


class _Stays:
    """Base models in memory: where another waits for a host, the one that has stayed longest leaves for it."""

    def __init__(self) -> None:
        self._since: dict[Place, float] = {}
        self._leaving: dict[Place, tuple[Place, asyncio.Event]] = {}
        """For whom each leaves, and the event that it may come again."""

    def begin(self, place: Place) -> None:
        self._since.setdefault(place, time.monotonic())

    def shall_end(self, place: Place) -> bool:
        return place in self._leaving

    def wish(self, place: Place, living: list[Place]) -> None:
        """Have one base leave for this one, unless one does already."""
        mine = [each for each, (wanted, _) in self._leaving.items() if wanted == place]
        if any(each in living for each in mine):
            return
        self.end_wish(place)
        if staying := [each for each in living if each not in self._leaving]:
            longest = min(staying, key=lambda each: self._since.get(each, 0.0))
            self._leaving[longest] = (place, asyncio.Event())

    def end_wish(self, place: Place) -> None:
        """It has its host, or wants none any longer."""
        for each in [each for each, (wanted, _) in self._leaving.items() if wanted == place]:
            _, may_come = self._leaving.pop(each)
            self._since.pop(each, None)
            may_come.set()

    async def until_others_had_theirs(self, place: Place) -> None:
        while found := self._leaving.get(place):
            await found[1].wait()


class _Places:
    """The models in one host's memory; who finds no place waits until one is idle or makes way."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: dict[Room, float] = {}
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self, room: Room) -> None:
        """A place for the room; the one that was idle longest leaves for it."""
        while room not in self._open:
            self._forget_closed()
            if len(self._open) < self._most:
                break
            idle = [each for each in self._open if not each.is_busy]
            if idle:
                await min(idle, key=lambda each: each.rested).rest()
                continue
            waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiting)
            try:
                await waiting
            finally:
                with suppress(ValueError):
                    self._waiting.remove(waiting)
        self._open[room] = time.monotonic()

    def leave(self, room: Room) -> None:
        self._open.pop(room, None)
        self.wake()

    def wake(self) -> None:
        """Let who waits longest look again."""
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
                return

    @property
    def are_wanted(self) -> bool:
        """Whether somebody waits for one."""
        return bool(self._waiting)

    def has_had(self, room: Room, seconds: float) -> bool:
        """Whether the room has been here for longer than that."""
        since = self._open.get(room)
        return since is not None and time.monotonic() - since > seconds

    def _forget_closed(self) -> None:
        for room in [room for room in self._open if not room.is_open and not room.is_busy]:
            del self._open[room]
