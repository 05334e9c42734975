"""Measure the job service under load on this machine: `make bench-service`, or `python benchmarks/service.py`.

A server runs in a process of its own without a worker, and the clients here share the machine with it, as they would
on the two cores for which the limits of each row were set. Each row prints what was measured beside its limit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).parents[1]))

from luthier.jobs.database import Database
from luthier.jobs.job import NewEvent, WorkerRow
from luthier.jobs.queue import Queue
from tests.service.here import ROW
from tests.service.process import Server, running

FLAGS = ("--limit", "requests_per_second=1000000", "--limit", "requests_at_once=100000000")
FLAGS += ("--limit", "queued_jobs=100000000", "--limit", "file_bytes=2147483648", "--limit", "reserve_bytes=0")
MEBIBYTE = 1 << 20


class Connection:
    """HTTP over one kept connection, with as little of the client's own work as can be."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def open(self) -> Self:
        """Connect."""
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        return self

    async def ask(self, verb: str, path: str, body: bytes = b"", kind: str = "application/json") -> tuple[int, bytes]:
        """One request; the status and the body."""
        self._writer.write(self._head(verb, path, len(body), kind) + body)
        status, length = 0, 0
        while (line := await self._reader.readline()).strip():
            if line.startswith(b"HTTP/"):
                status = int(line.split()[1])
            elif line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        return status, await self._reader.readexactly(length)

    async def follow(self, path: str, seen: Callable[[bytes], None]) -> None:
        """Call `seen` with each line of data of a stream."""
        self._writer.write(self._head("GET", path, 0, "", "Accept: text/event-stream\r\n"))
        while line := await self._reader.readline():
            if line.startswith(b"data: "):
                seen(line)

    def close(self) -> None:
        """Disconnect."""
        self._writer.close()

    def _head(self, verb: str, path: str, length: int, kind: str, more: str = "") -> bytes:
        head = f"{verb} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: {self._server.key}\r\n{more}"
        if length:
            head += f"Content-Type: {kind}\r\nContent-Length: {length}\r\n"
        return (head + "\r\n").encode()


async def load(
    server: Server, act: Callable[[Connection], Awaitable[int]], *, clients: int, seconds: float
) -> tuple[float, float]:
    """Requests a second, and the 99th percentile of their milliseconds, with so many clients at a time."""
    took: list[float] = []
    until = time.perf_counter() + seconds

    async def client() -> None:
        connection = await Connection(server).open()
        while (began := time.perf_counter()) < until:
            status = await act(connection)
            assert status in (200, 201), status
            took.append(time.perf_counter() - began)
        connection.close()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return len(took) / (time.perf_counter() - began), 1000 * statistics.quantiles(took, n=100)[98]


def show(name: str, measured: str, wanted: str, holds: bool) -> bool:
    """A row of the table."""
    print(f"{name:34} {measured:34} {wanted:34} {'yes' if holds else 'NO'}", flush=True)
    return holds


async def make_job(connection: Connection) -> tuple[str, bytes]:
    """A job on a file of its own, and the body that made it."""
    _, sent = await connection.ask("POST", "/luthier/v1/files", ROW.encode(), "application/octet-stream")
    spec = {"model": {"base": "practice"}, "data": {"train": json.loads(sent)["id"]}}
    body = json.dumps({"spec": spec}).encode()
    status, made = await connection.ask("POST", "/luthier/v1/jobs", body)
    assert status == 201, made
    return json.loads(made)["id"], body


async def measure_requests(server: Server, seconds: float) -> list[bool]:
    """Reads with a key, and durable creates."""
    connection = await Connection(server).open()
    job, body = await make_job(connection)

    async def read(each: Connection) -> int:
        return (await each.ask("GET", f"/luthier/v1/jobs/{job}"))[0]

    async def create(each: Connection) -> int:
        return (await each.ask("POST", "/luthier/v1/jobs", body))[0]

    await load(server, read, clients=4, seconds=0.5)
    rate, slowest = await load(server, read, clients=32, seconds=seconds)
    wanted = "1,000/s, p99 100 ms"
    done = [show("reads with a key", f"{rate:,.0f}/s, p99 {slowest:.0f} ms", wanted, rate >= 1000 and slowest <= 100)]
    rate, slowest = await load(server, create, clients=16, seconds=seconds)
    wanted = "500/s, p99 100 ms"
    return [
        *done,
        show("durable creates", f"{rate:,.0f}/s, p99 {slowest:.0f} ms", wanted, rate >= 500 and slowest <= 100),
    ]


def _claim(queue: Queue, job: str) -> Any:
    worker = WorkerRow("load", "here", {"slots": 10**6}, {"slots": 10**6, "processors": 10**6, "memory_bytes": 2**60})
    while (claim := queue.claim(worker)) is not None:
        if claim.job.id == job and claim.kind == "train":
            queue.started(claim, pid=1, process_started="1", token="t")
            return claim
        if claim.job.id == job:
            queue.validated(claim, needs={})
    raise RuntimeError("the job cannot be claimed")


async def measure_streams(server: Server, streams: int, seconds: float) -> bool:
    """So many streams at 10 messages a second each: from before the write to the line in the client."""
    connection = await Connection(server).open()
    job, _ = await make_job(connection)
    database = Database.at_home(server.home)
    queue = Queue(database)
    claim = _claim(queue, job)
    took: list[float] = []
    mark = b'"at":'

    def seen(line: bytes) -> None:
        if mark in line:
            took.append(time.time() - float(line.split(mark)[1].split(b"}")[0]))

    opened = [await Connection(server).open() for _ in range(streams)]
    tasks = [asyncio.create_task(each.follow(f"/luthier/v1/jobs/{job}/events", seen)) for each in opened]
    await asyncio.sleep(3)
    count = int(10 * seconds)

    def write() -> None:
        start = time.time()
        for number in range(count):
            time.sleep(max(0.0, start + number / 10 - time.time()))
            queue.report(claim, [NewEvent("note", "load", data={"at": time.time()})])

    writing = threading.Thread(target=write)
    writing.start()
    await asyncio.to_thread(writing.join)
    until = time.time() + 20
    while len(took) < streams * count and time.time() < until:
        await asyncio.sleep(0.05)
    for task in tasks:
        task.cancel()
    slowest = 1000 * statistics.quantiles(took, n=100)[98]
    holds = len(took) == streams * count and slowest <= 250
    measured = f"{len(took):,} of {streams * count:,}, p99 {slowest:.0f} ms"
    return show(f"{streams} streams, 10 messages/s each", measured, "all, p99 250 ms", holds)


def _memory(server: Server) -> tuple[int, int]:
    assert server.process
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    found = {line.split(":")[0]: int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Vm")}
    return found["VmRSS"], found["VmHWM"]


async def measure_upload(server: Server, mebibytes: int) -> bool:
    """A large file in one request: how much more memory the server takes than before."""
    before, _ = _memory(server)
    piece = os.urandom(MEBIBYTE)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    head = f"POST /luthier/v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: {server.key}\r\n"
    head += f"Content-Type: application/octet-stream\r\nContent-Length: {mebibytes * MEBIBYTE}\r\n\r\n"
    began = time.perf_counter()
    writer.write(head.encode())
    for _ in range(mebibytes):
        writer.write(piece)
        await writer.drain()
    status = await reader.readline()
    seconds = time.perf_counter() - began
    writer.close()
    growth = (_memory(server)[1] - before) / MEBIBYTE
    measured = f"+{growth:.0f} MiB, {mebibytes / seconds:,.0f} MiB/s"
    return show(f"upload of {mebibytes} MiB", measured, "+64 MiB", b" 201 " in status and growth < 64)


async def measure_pages(server: Server, events: int) -> bool:
    """A job with very many events, listed page by page."""
    connection = await Connection(server).open()
    job, _ = await make_job(connection)
    database = Database.at_home(server.home)
    queue = Queue(database)
    claim = _claim(queue, job)
    for start in range(0, events, 5000):
        news = [NewEvent("note", "n", data={"loss": 1.0}) for _ in range(min(5000, events - start))]
        queue.report(claim, news)
    took, after, total = [], 0, 0
    while True:
        began = time.perf_counter()
        status, body = await connection.ask("GET", f"/luthier/v1/jobs/{job}/events?limit=1000&after_seq={after}")
        took.append(time.perf_counter() - began)
        assert status == 200
        page = json.loads(body)
        total += len(page["events"])
        if not page["has_more"]:
            break
        after = page["events"][-1]["seq"]
    slowest = 1000 * max(took)
    measured = f"{len(took):,} pages of 1,000, slowest {slowest:.0f} ms"
    return show(f"{events:,} events page by page", measured, "each 100 ms", total >= events and slowest <= 100)


async def measure(server: Server, asked: argparse.Namespace) -> bool:
    """Every row."""
    print(f"{'':34} {'measured':34} {'wanted':34} holds", flush=True)
    done = await measure_requests(server, asked.seconds)
    done.append(await measure_streams(server, asked.streams, asked.seconds))
    done.append(await measure_upload(server, asked.mebibytes))
    done.append(await measure_pages(server, asked.events))
    return all(done)


def main() -> int:
    """Measure, and say whether every row holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each kind of load")
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--mebibytes", type=int, default=1024, help="of the upload")
    parser.add_argument("--events", type=int, default=1_000_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, running(Path(place), *FLAGS) as server:
        return 0 if asyncio.run(measure(server, asked)) else 1


if __name__ == "__main__":
    sys.exit(main())
