"""Samples: in memory only, since a client whose sample is gone asks for it again."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from luthier.errors import CallError, HostError, LuthierError
from luthier.jobs.ids import new_id
from luthier.live.futures import LONGEST_WAIT_SECONDS, Outcome, Promise, QueueState, failed
from luthier.live.limits import Waiting
from luthier.live.rows import SAMPLER_WEIGHTS, Sampler

if TYPE_CHECKING:
    from luthier.live.bases import Base
    from luthier.live.house import House

log = logging.getLogger("luthier.live")

_MOST_TRIES = 4
_MOST_BYTES = 1 << 30
_KEEP_SECONDS = 900.0
_NOTE_SECONDS = 600.0
_CLONE = 1_000_000_000

_MOST_TOLD = 4096
"""Endings that are kept for one client which does not ask for them."""
_MOST_KNOWN = 10_000
"""Samplers of which something is remembered."""

_Name = tuple[str, int, bytes]
_K = TypeVar("_K")
_V = TypeVar("_V")


@dataclass(frozen=True)
class Wanted:
    """One request for samples, checked: what is drawn from, and the facts that a host takes."""

    sampler: Sampler
    seq: int | None
    facts: Mapping[str, Any]
    num_samples: int
    fingerprint: bytes = b""
    body: bytes = b""
    """Tokens to rate at each place of the prompt, where they are asked for: a tensor of protobuf."""


class _Feed:
    """What a client of one sampler is told of requests that ended, in order; its cursor says what it has seen.

    Cursors begin at the time, so that one of a feed that was forgotten lies before all that a later feed tells.
    """

    def __init__(self) -> None:
        self.used = time.monotonic()
        self._first = time.time_ns() // 1_000_000
        self._ended: list[dict[str, Any]] = []
        self._changed = asyncio.Event()

    def add(self, promise: Promise) -> None:
        outcome = promise.outcome
        assert outcome
        told: dict[str, Any] = {"state": "failed" if outcome.is_failure else "finished", "request_id": promise.request}
        if not outcome.is_failure:
            told["response_payload_uncompressed_size"] = len(outcome.body or b"")
        self._ended.append(told)
        self._forget(len(self._ended) - _MOST_TOLD)
        self.used = time.monotonic()
        self.wake()

    def _forget(self, count: int) -> None:
        seen = max(0, min(count, len(self._ended)))
        del self._ended[:seen]
        self._first += seen

    def wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def read(self, cursor: int, seconds: float) -> tuple[list[dict[str, Any]], int]:
        """What ended behind the cursor, and the cursor behind that; what lies before it is forgotten."""
        self._forget(cursor - self._first)
        self.used = time.monotonic()
        if not self._ended and seconds > 0:
            waiting = asyncio.create_task(self._changed.wait())
            await asyncio.wait({waiting}, timeout=seconds)
            waiting.cancel()
        return list(self._ended), self._first + len(self._ended)


class Samplers:
    """Samplers and what is asked of them. All methods belong to one event loop."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._limits = Waiting(house.settings.most_samples, _MOST_BYTES)
        self._known: dict[str, Sampler] = {}
        self._noted: dict[str, float] = {}
        self._asked: dict[_Name, Promise] = {}
        self._tasks: dict[str, asyncio.Task[Outcome]] = {}
        self._feeds: dict[tuple[str, int], _Feed] = {}
        self._clients: dict[str, int] = {}
        self._is_draining = False

    async def create(
        self, project: str, session: str, number: int, *, base: str | None, model_path: str | None
    ) -> Sampler:
        """A sampler of a base model or of weights that were saved for one."""
        await self._house.run(self._house.store.find_session, project, session)
        made = await self._build(project, session, number, base=base, model_path=model_path)
        return await self._house.run(self._house.store.create_sampler, made)  # type: ignore[no-any-return]

    async def find_unnamed(self, project: str, *, base: str | None, model_path: str | None) -> Sampler:
        """What the oldest clients draw from: they name it in each request, and no row is kept of it."""
        return await self._build(project, "", 0, base=base, model_path=model_path)

    async def _build(
        self, project: str, session: str, number: int, *, base: str | None, model_path: str | None
    ) -> Sampler:
        model = folder = None
        if model_path is not None:
            found = await self._house.run(self._house.store.find_checkpoint, project, model_path)
            if found.kind != SAMPLER_WEIGHTS:
                raise CallError(
                    f"`{model_path}` was saved as {found.kind}, and samples are drawn from sampler_weights",
                    hint="save_weights_for_sampler(name) makes those",
                    where="model_path",
                )
            base, model, folder = found.base, found.model, found.folder
        if base is None:
            raise CallError("neither `base_model` nor `model_path` says what to draw from", where="base_model")
        await self._house.find_base(base)
        now = self._house.store.now()
        return Sampler(
            f"{session}:sample:{number}",
            project,
            session,
            number,
            base,
            model,
            model_path,
            folder,
            "snapshot",
            now,
            now,
        )

    async def find(self, project: str, sampler: str) -> Sampler:
        """The sampler; an inflight one with the newest weights of its model."""
        known = self._known.get(sampler)
        if known is None or known.project != project or known.kind == "inflight":
            known = await self._house.run(self._house.store.find_sampler, project, sampler)
            _remember(self._known, sampler, known)
        return known

    def forget(self, sampler: str) -> None:
        """Look it up again when it is next asked for."""
        self._known.pop(sampler, None)

    async def base_of(self, sampler: Sampler) -> Base:
        """The base model that a sampler stands on."""
        return await self._house.find_base(sampler.base)

    def join(self, sampler: Sampler) -> int:
        """A number for one more client of a sampler; the first has 0."""
        number = self._clients.get(sampler.id, 0) + 1
        _remember(self._clients, sampler.id, number)
        return number

    async def ask(self, wanted: Wanted) -> tuple[Promise, list[str]]:
        """Begin to draw; the same request again finds the same promise. Returns it with a name for each sample."""
        sampler = wanted.sampler
        name = None if wanted.seq is None or not sampler.session else (sampler.id, wanted.seq, wanted.fingerprint)
        promise = self._asked.get(name) if name else None
        if promise is None:
            self._limits.check(sampler.project, None)
            promise = self._house.promises.add(Promise(new_id("sample-"), sampler.project, "sample"))
            if name:
                self._asked[name] = promise
            self._limits.add(sampler.project, 0)
            task = self._tasks[promise.request] = asyncio.create_task(self._draw(wanted, promise))
            task.add_done_callback(partial(self._finish, promise=promise, name=name))
            if sampler.session:
                self._note_use(sampler)
        return promise, [f"{promise.request}:{place}" for place in range(wanted.num_samples)]

    def cancel(self, project: str, request: str) -> None:
        """Nobody waits for these samples any more."""
        promise = self._house.promises.find(project, request)
        if promise is not None and (task := self._tasks.get(request)) is not None:
            task.cancel()

    async def read_feed(
        self, sampler: Sampler, client: int, cursor: int, seconds: float
    ) -> tuple[list[dict[str, Any]], int]:
        """What ended of one client's requests behind a cursor; waits for the next where there is nothing."""
        feed = self._feed_of((sampler.id, client))
        return await feed.read(cursor, 0 if self._is_draining else min(seconds, LONGEST_WAIT_SECONDS))

    def drain(self) -> None:
        """Nobody waits any longer."""
        self._is_draining = True
        for feed in self._feeds.values():
            feed.wake()

    def close(self) -> None:
        """The server ends."""
        for task in self._tasks.values():
            task.cancel()

    async def _draw(self, wanted: Wanted, promise: Promise) -> Outcome:
        try:
            return await self._try(wanted, promise)
        except LuthierError as error:
            return failed(error)
        except Exception as error:  # a client must hear of it, and not wait for ever
            log.exception("a sampling request failed")
            return failed(LuthierError(f"an error of the server's own: {type(error).__name__}"))

    def _finish(self, task: asyncio.Task[Outcome], promise: Promise, name: _Name | None) -> None:
        """Also of a task that was cancelled before it began."""
        promise.resolve(failed(LuthierError("the samples were cancelled")) if task.cancelled() else task.result())
        self._limits.remove(promise.project, 0)
        self._tasks.pop(promise.request, None)
        if name:
            self._feed_of((name[0], name[1] // _CLONE)).add(promise)
            asyncio.get_running_loop().call_later(_KEEP_SECONDS, self._forget, name)
        self._house.promises.retire(promise, keep_seconds=_KEEP_SECONDS)

    def _feed_of(self, reader: tuple[str, int]) -> _Feed:
        feed = self._feeds.get(reader) or _Feed()
        _remember(self._feeds, reader, feed)
        return feed

    def _forget(self, name: _Name) -> None:
        """A request that ended long ago, and the feed that told of it, where nobody has used that since."""
        self._asked.pop(name, None)
        reader = (name[0], name[1] // _CLONE)
        feed = self._feeds.get(reader)
        if feed is not None and time.monotonic() - feed.used >= _KEEP_SECONDS:
            del self._feeds[reader]

    async def _try(self, wanted: Wanted, promise: Promise) -> Outcome:
        base = await self.base_of(wanted.sampler)
        folder = wanted.sampler.folder
        adapter = None if folder is None else str(self._house.store.home / folder)
        tries = 0
        while True:
            try:
                promise.state = QueueState("paused_capacity", "waiting for the process of the model")
                bench = await self._house.bench(base.place)
                promise.state = QueueState()
                asked = {**wanted.facts, "num_samples": wanted.num_samples, "project": wanted.sampler.project}
                done = await bench.do("sample", body=wanted.body, adapter=adapter, **asked)
                return Outcome({}, done.body)
            except HostError as error:
                tries += 1
                if tries >= _MOST_TRIES:
                    raise LuthierError(error.message, hint=error.hint) from error

    def _note_use(self, sampler: Sampler) -> None:
        """Now and then, so that its weights are not swept away."""
        now = time.monotonic()
        if now - self._noted.get(sampler.id, float("-inf")) > _NOTE_SECONDS:
            _remember(self._noted, sampler.id, now)
            self._house.spawn(self._house.run(self._house.store.touch_sampler, sampler.id))


def _remember(known: MutableMapping[_K, _V], key: _K, value: _V) -> None:
    """Keep something of a sampler, and forget what was kept longest ago where there is too much."""
    known.pop(key, None)
    known[key] = value
    if len(known) > _MOST_KNOWN:
        del known[next(iter(known))]


def fingerprint_of(body: bytes) -> bytes:
    """What tells a request that came again from another one under the same number."""
    return hashlib.blake2b(body, digest_size=16).digest()


def any_seed() -> int:
    """A seed for a request that names none."""
    return secrets.randbits(48)
