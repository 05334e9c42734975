"""The server's side of one base model's process: works go in, results come back, over one long-lived connection."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from luthier.errors import HostError
from luthier.host.work import Done, Work, raised, read_done, write_work


class Bench:
    """Where models of one base are worked on; it ends with the process, and is then to be asked for anew.

    All methods belong to one event loop.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._waiting: dict[int, asyncio.Future[Done]] = {}
        self._open: set[str] = set()
        self._number = 0
        self.used = time.monotonic()
        """When the last work was done."""
        self._is_alive = True
        self._listening = asyncio.create_task(self._listen())

    @property
    def is_alive(self) -> bool:
        """Whether the process still listens."""
        return self._is_alive

    @property
    def is_busy(self) -> bool:
        """Whether models are open here, or works on their way."""
        return bool(self._is_alive and (self._open or self._waiting))

    async def do(self, kind: str, model: str = "", *, body: bytes = b"", **facts: Any) -> Done:
        """Have one work done; works of one model are done in the order in which this is called.

        Raises the error that the host told, HostError where the process ended. A sample that is no longer waited for
        (its task was cancelled) is given up by the host too.
        """
        if not self._is_alive:
            raise _died()
        self._number += 1
        number = self._number
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._writer.write(write_work(Work(number, kind, model, facts, body)))
            await self._writer.drain()
            done: Done = await waiting
        except ConnectionError:
            waiting.cancel()
            raise _died() from None
        except asyncio.CancelledError:
            self._give_up(number, kind)
            raise
        finally:
            self._waiting.pop(number, None)
            self.used = time.monotonic()
        if done.error is not None:
            raise raised(done.error)
        self._note(kind, model)
        return done

    async def close(self) -> None:
        """Let go of the connection, and of the models that are open."""
        self._listening.cancel()
        with suppress(asyncio.CancelledError):
            await self._listening
        self._end()

    def _note(self, kind: str, model: str) -> None:
        if kind == "open":
            self._open.add(model)
        elif kind == "drop":
            self._open.discard(model)

    def _give_up(self, number: int, kind: str) -> None:
        if kind == "sample" and self._is_alive:
            self._number += 1
            with suppress(ConnectionError):
                self._writer.write(write_work(Work(self._number, "cancel", facts={"of": number})))

    async def _listen(self) -> None:
        try:
            while (done := await read_done(self._reader)) is not None:
                waiting = self._waiting.get(done.id)
                if waiting and not waiting.done():
                    waiting.set_result(done)
        finally:
            self._end()

    def _end(self) -> None:
        self._is_alive = False
        self._open.clear()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(_died())
        self._writer.close()


async def open_bench(socket: Path) -> Bench:
    """A connection to the process that listens there."""
    try:
        reader, writer = await asyncio.open_unix_connection(socket)
    except OSError as error:
        raise _died() from error
    return Bench(reader, writer)


def _died() -> HostError:
    return HostError("the process that held the model ended", hint="ask again: it is started anew")
