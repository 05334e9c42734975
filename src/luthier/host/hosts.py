"""The hosts of a server: started when first asked, stopped when idle, started again when they died."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from luthier.errors import HostError
from luthier.host.ask import Ask, Said, read_said
from luthier.host.bench import Bench, open_bench
from luthier.host.place import Place
from luthier.host.work import raised

_LINE_BYTES = 16 << 20
_STOP_SECONDS = 5.0
_ALLOWED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HOME", "TZ")


@dataclass
class _Host:
    """One process, how many answers it gives at the moment, and the bench on which models are trained there."""

    process: asyncio.subprocess.Process
    socket: Path
    asks: int = 0
    bench: Bench | None = None
    used: float = field(default_factory=time.monotonic)

    @property
    def is_alive(self) -> bool:
        return self.process.returncode is None

    @property
    def last_used(self) -> float:
        """When somebody last needed it."""
        return max(self.used, self.bench.used if self.bench else 0.0)

    @property
    def is_busy(self) -> bool:
        """Whether somebody needs what it has in memory."""
        return bool(self.asks or (self.bench and self.bench.is_busy))


class Hosts:
    """Host processes by base model. All methods belong to one event loop."""

    def __init__(
        self,
        home: Path,
        *,
        models: Path | None = None,
        idle_seconds: float = 600.0,
        most: int = 2,
        precision: str = "auto",
    ) -> None:
        self._home, self._models, self._precision = home, models, precision
        self._idle_seconds, self._most = idle_seconds, most
        self._hosts: dict[Place, _Host] = {}
        self._starting: dict[Place, asyncio.Lock] = {}
        self._sockets = Path(tempfile.mkdtemp(prefix="luthier-"))
        self._sweep: asyncio.Task[None] | None = None
        self._count = 0

    async def answer(self, place: Place, ask: Ask) -> AsyncIterator[Said]:
        """The parts of an answer as they come; raises the error that the host tells, HostError where it died."""
        host = await self._find(place.base)
        host.asks += 1
        try:
            async for said in _ask(host, ask):
                yield said
        finally:
            host.asks -= 1
            host.used = time.monotonic()

    async def bench(self, place: Place) -> Bench:
        """Where models of a base are trained and tokens sampled; one for each process, ended with it."""
        host = await self._find(place.base)
        async with self._starting[place.base]:
            if host.bench is None or not host.bench.is_alive:
                host.bench = await open_bench(host.socket)
        host.used = time.monotonic()
        return host.bench

    async def close(self) -> None:
        """End every host."""
        if self._sweep:
            self._sweep.cancel()
        await asyncio.gather(*(_stop(host) for host in self._hosts.values()))
        self._hosts.clear()
        shutil.rmtree(self._sockets, ignore_errors=True)

    def list_bases(self) -> list[Place]:
        """What is in memory now."""
        return [place for place, host in self._hosts.items() if host.is_alive]

    async def _find(self, base: Place) -> _Host:
        async with self._starting.setdefault(base, asyncio.Lock()):
            host = self._hosts.get(base)
            if host and host.bench and not host.bench.is_alive:
                await _stop(host)  # its connection ended, so it is dying, whether or not that is known of it yet
            if host is None or not host.is_alive:
                await self._make_room(base)
                host = self._hosts[base] = await self._start(base)
            return host

    async def _make_room(self, wanted: Place) -> None:
        """The host that was not asked for longest makes room for another base model."""
        others = {base: host for base, host in self._hosts.items() if base != wanted and host.is_alive}
        if len(others) < self._most:
            return
        idle = [base for base, host in others.items() if not host.is_busy]
        if not idle:
            raise HostError(
                f"{len(others)} base models are in memory and all of them are at work",
                hint="try again in a moment; `luthier serve --hosts N` allows more at a time",
            )
        await _stop(self._hosts.pop(min(idle, key=lambda base: others[base].last_used)))

    async def _start(self, base: Place) -> _Host:
        self._count += 1
        socket = self._sockets / f"{self._count}.sock"
        log = self._home / "hosts" / "log.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        arguments = ["--model", base.model, "--socket", str(socket), "--precision", self._precision]
        if base.nf4:
            arguments += ["--nf4", base.nf4]
        with log.open("ab") as sink:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "luthier.host.process",
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=sink,
                env=self._environment(),
                limit=_LINE_BYTES,
                start_new_session=True,
            )
        try:
            await self._await_ready(process, base, log)
        except BaseException:  # also where nobody waits any more: no table has it yet
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        if self._sweep is None:
            self._sweep = asyncio.create_task(self._stop_idle())
        return _Host(process, socket)

    async def _await_ready(self, process: asyncio.subprocess.Process, base: Place, log: Path) -> None:
        assert process.stdout
        line = await process.stdout.readline()
        if not line:
            raise HostError(
                f"the process of {Path(base.model).name} ended with {await process.wait()} while it loaded the model",
                hint=f"its last words are in {log}",
            )
        if error := read_said(line).error:
            await process.wait()
            raise raised(error)

    def _environment(self) -> dict[str, str]:
        """No secret of the server reaches a process that loads models."""
        kept = {name: os.environ[name] for name in _ALLOWED if name in os.environ}
        kept |= {name: value for name, value in os.environ.items() if name in ("PYTHONPATH", "VIRTUAL_ENV")}
        kept["LUTHIER_HOME"] = str(self._home)
        if self._models:
            kept["LUTHIER_MODELS"] = str(self._models)
        return kept

    async def _stop_idle(self) -> None:
        while True:
            await asyncio.sleep(self._idle_seconds / 4)
            limit = time.monotonic() - self._idle_seconds
            for base, host in list(self._hosts.items()):
                if not host.is_busy and host.last_used < limit:
                    del self._hosts[base]
                    await _stop(host)


async def _ask(host: _Host, ask: Ask) -> AsyncIterator[Said]:
    try:
        reader, writer = await asyncio.open_unix_connection(host.socket, limit=_LINE_BYTES)
    except OSError as error:
        raise _died() from error
    try:
        writer.write(ask.encode())
        await writer.drain()
        while line := await reader.readline():
            said = read_said(line)
            if said.error:
                raise raised(said.error)
            yield said
            if said.finish:
                return
        raise _died()
    except ConnectionError:
        raise _died() from None
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _stop(host: _Host) -> None:
    """Let go of the leash, and end what does not end by itself."""
    if host.bench:
        await host.bench.close()
    if not host.is_alive:
        return
    assert host.process.stdin
    host.process.stdin.close()
    try:
        await asyncio.wait_for(host.process.wait(), _STOP_SECONDS)
    except TimeoutError:
        host.process.kill()
        await host.process.wait()


def _died() -> HostError:
    return HostError("the process that held the model ended", hint="ask again: it is started anew")
