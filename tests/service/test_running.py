"""A server as it runs: it starts fast, drains, loses nothing it acknowledged, and its streams have no gap."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from luthier.jobs.database import Database
from luthier.jobs.job import NewEvent, Outcome, WorkerRow
from luthier.jobs.queue import Queue
from luthier.jobs.store import JobStore
from tests.service.here import ROW
from tests.service.process import PATIENCE_SECONDS, Server, run, running

KILLS = int(os.environ.get("LUTHIER_KILLS", "0"))
OCTETS = {"content-type": "application/octet-stream"}
START_SECONDS = 2.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without a worker, shared by the tests that leave it running."""
    with running(tmp_path_factory.mktemp("server")) as made:
        yield made


def spec_for(client: httpx2.Client) -> dict[str, Any]:
    """A spec on a file that was sent."""
    sent = client.post("/luthier/v1/files", content=ROW.encode(), headers=OCTETS)
    assert sent.status_code == 201, sent.text
    return {"model": {"base": "practice"}, "data": {"train": sent.json()["id"]}}


def test_it_is_up_in_two_seconds_and_says_its_key_once(tmp_path: Path) -> None:
    server = Server(tmp_path)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    told = server.start()
    try:
        assert told["address"] == server.url
        assert told["key"].startswith("tml-ftk_")
        with server.client() as client:
            assert client.get("/luthier/v1/health").json()["status"] == "ok"
            assert client.get("/luthier/v1/ready").json()["is_ready"] is True
            assert client.get("/luthier/v1/whoami").json()["scopes"] == ["admin"]
        assert server.stop() == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < START_SECONDS
        assert server.start()["key"] is None
    finally:
        if server.process:
            server.stop()


def test_an_address_that_others_reach_needs_a_key_first(tmp_path: Path) -> None:
    home = ("--home", str(tmp_path / "home"))
    done = run("serve", "--host", "0.0.0.0", "--port", "0", "--json", *home, place=tmp_path)
    assert done.returncode == 2
    assert "luthier keys create" in json.loads(done.stdout)["error"]["hint"]
    done = run("serve", "--host", "0.0.0.0", "--no-auth", *home, place=tmp_path)
    assert done.returncode == 2
    made = run("keys", "create", "--scope", "admin", "--json", *home, place=tmp_path)
    key = json.loads(made.stdout)["key"]
    server = Server(tmp_path, "--host", "0.0.0.0")
    server.home, server.key = tmp_path / "home", key
    assert server.start()["key"] is None
    try:
        with server.client() as client:
            assert client.get("/luthier/v1/whoami").status_code == 200
    finally:
        server.stop()
    assert "without TLS" in server.log.read_text()


def test_keys_are_made_and_revoked_while_the_server_runs(server: Server, tmp_path: Path) -> None:
    home = ("--home", str(server.home))
    made = json.loads(run("keys", "create", "--scope", "read", "--json", *home, place=tmp_path).stdout)
    with server.client() as client:
        headers = {"authorization": f"Bearer {made['key']}"}
        assert client.get("/luthier/v1/whoami", headers=headers).json()["scopes"] == ["read"]
        assert made["id"] in run("keys", "list", *home, place=tmp_path).stdout
        assert run("keys", "revoke", made["id"], *home, place=tmp_path).returncode == 0
        until = time.monotonic() + PATIENCE_SECONDS
        while client.get("/luthier/v1/whoami", headers=headers).status_code != 401:
            assert time.monotonic() < until


def test_a_second_server_on_the_same_port_is_told_so(server: Server, tmp_path: Path) -> None:
    done = run("serve", "--port", str(server.port), "--home", str(tmp_path / "home"), "--json", place=tmp_path)
    assert done.returncode == 2
    assert "cannot listen" in json.loads(done.stdout)["error"]["message"]


# -- R1: nothing acknowledged is lost ----------------------------------------------------------------------------------


class _Client(threading.Thread):
    """Submits jobs until it is told to stop, each until it is acknowledged, and keeps the ids it was told."""

    def __init__(self, server: Server, spec: dict[str, Any], number: int) -> None:
        super().__init__(daemon=True)
        self._server, self._spec, self._number = server, spec, number
        self.acknowledged: dict[str, str] = {}
        self.failures: list[str] = []
        self.over = threading.Event()

    def run(self) -> None:
        count = 0
        with self._server.client() as client:
            while not self.over.is_set():
                count += 1
                self._submit(client, f"{self._number}-{count}")

    def _submit(self, client: httpx2.Client, name: str) -> None:
        body = {"spec": self._spec, "metadata": {"n": name}}
        while name not in self.acknowledged and not self.over.is_set():
            try:
                done = client.post("/luthier/v1/jobs", json=body, headers={"idempotency-key": name})
            except httpx2.TransportError:
                self.over.wait(0.01)
                continue
            if done.status_code in (200, 201):
                self.acknowledged[name] = done.json()["id"]
            elif done.status_code != 503:
                self.failures.append(f"{done.status_code} {done.text}")


def test_kill_9_loses_no_acknowledged_job_and_makes_none_twice(tmp_path: Path) -> None:
    kills, clients = (KILLS or 2), 4
    chance = random.Random(7)
    with running(tmp_path, "--limit", "queued_jobs=1000000") as server:
        with server.client() as client:
            spec = spec_for(client)
        submitting = [_Client(server, spec, number) for number in range(clients)]
        for each in submitting:
            each.start()
        for _ in range(kills):
            wanted = len(submitting[0].acknowledged) + 3
            _wait_for(lambda wanted=wanted: len(submitting[0].acknowledged) >= wanted)
            time.sleep(chance.uniform(0, 0.1))  # a random moment, and not one just after an answer
            server.kill()
            server.start()
        for each in submitting:
            each.over.set()
        for each in submitting:
            each.join(PATIENCE_SECONDS)
        assert [failure for each in submitting for failure in each.failures] == []
        acknowledged = {name: id for each in submitting for name, id in each.acknowledged.items()}
        assert len(acknowledged) >= 3 * kills
        server.stop()
    jobs = JobStore(Database.at_home(server.home), server.home)
    kept: dict[str, list[str]] = {}
    after, more = None, True
    while more:
        page = jobs.list_jobs("default", after=after, limit=1000)
        for job in page.items:
            kept.setdefault(job.metadata["n"], []).append(job.id)
            after = job.id
        more = page.has_more
    assert [name for name, ids in kept.items() if len(ids) != 1] == []
    assert [name for name, id in acknowledged.items() if kept.get(name) != [id]] == []
    asked_last = len(kept) - len(acknowledged)
    assert 0 <= asked_last <= clients, "a job that nobody asked for, or one asked for and never acknowledged"


# -- R11: streams ------------------------------------------------------------------------------------------------------


def read_events(response: httpx2.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """The (name, data) of each server-sent event."""
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))
            name = ""


def test_a_stream_that_is_cut_again_and_again_shows_each_event_once(server: Server) -> None:
    cuts, seed = (KILLS * 20 or 40), 3
    chance = random.Random(seed)
    database = Database.at_home(server.home)
    queue = Queue(database)
    with server.client() as client:
        job = client.post("/luthier/v1/jobs", json={"spec": spec_for(client)}).json()["id"]
        worker = WorkerRow("streams", "here", {"slots": 99}, {"slots": 99, "processors": 99, "memory_bytes": 2**40})
        claim = _claim(queue, worker, job)
        over = threading.Event()
        wrote = 0

        def write() -> None:
            nonlocal wrote
            while not over.is_set():
                count = chance.randrange(1, 5)
                news = [NewEvent("step_done", f"s{wrote + n}", step=wrote + n + 1) for n in range(count)]
                queue.report(claim, news)
                wrote += count
            queue.finish(claim, Outcome("succeeded", model=f"ft:practice:{job}"))

        writing = threading.Thread(target=write)
        writing.start()
        try:
            seen = _follow_with_cuts(client, job, cuts, chance)
        finally:
            over.set()
            writing.join()
        seen += _follow_to_end(client, job, seen[-1])
    assert seen == list(range(1, len(seen) + 1)), "a gap, a repetition or a wrong order"
    assert len(seen) >= wrote + 3
    database.close()


def _claim(queue: Queue, worker: WorkerRow, job: str) -> Any:
    while True:
        claim = queue.claim(worker)
        assert claim
        if claim.job.id != job:
            continue
        if claim.kind == "train":
            queue.started(claim, pid=1, process_started="1", token="t")
            return claim
        queue.validated(claim, needs={})


def _follow_with_cuts(client: httpx2.Client, job: str, cuts: int, chance: random.Random) -> list[int]:
    """Numbers as they came over many connections, each cut off after a few events, some in the middle of one."""
    seen: list[int] = []
    for _ in range(cuts):
        headers = {"accept": "text/event-stream"} | ({"last-event-id": str(seen[-1])} if seen else {})
        with client.stream("GET", f"/luthier/v1/jobs/{job}/events", headers=headers) as response:
            assert response.status_code == 200
            for _, (_, event) in zip(range(chance.randrange(1, 8)), read_events(response), strict=False):
                seen.append(event["seq"])
    return seen


def _follow_to_end(client: httpx2.Client, job: str, after: int) -> list[int]:
    headers = {"accept": "text/event-stream", "last-event-id": str(after)}
    seen, ended = [], False
    with client.stream("GET", f"/luthier/v1/jobs/{job}/events", headers=headers) as response:
        for name, event in read_events(response):
            if name == "end":
                ended = event["state"] == "succeeded"
            else:
                seen.append(event["seq"])
    assert ended, "the stream did not say that the job is over"
    return seen


def test_an_event_is_on_the_stream_within_a_second(server: Server) -> None:
    database = Database.at_home(server.home)
    queue = Queue(database)
    with server.client() as client:
        job = client.post("/luthier/v1/jobs", json={"spec": spec_for(client)}).json()["id"]
        worker = WorkerRow("late", "here", {"slots": 99}, {"slots": 99, "processors": 99, "memory_bytes": 2**40})
        claim = _claim(queue, worker, job)
        headers = {"accept": "text/event-stream"}
        with client.stream("GET", f"/luthier/v1/jobs/{job}/events", headers=headers) as response:
            events = read_events(response)
            while next(events)[1]["kind"] != "state_changed":
                pass
            waits = []
            for number in range(10):
                wrote_at = time.monotonic()
                queue.report(claim, [NewEvent("note", f"n{number}")])
                while next(events)[1]["message"] != f"n{number}":
                    pass
                waits.append(time.monotonic() - wrote_at)
        queue.finish(claim, Outcome("failed", error_code="x", message="over"))
    database.close()
    assert sorted(waits)[-2] < 1.0, waits


# -- R14: shutdown -----------------------------------------------------------------------------------------------------


def test_a_rolling_restart_fails_no_request_and_closes_streams(tmp_path: Path) -> None:
    restarts = max(1, KILLS // 10)
    over, failures, asked = threading.Event(), [], []
    with running(tmp_path) as server:
        with server.client() as client:
            job = client.post("/luthier/v1/jobs", json={"spec": spec_for(client)}).json()["id"]

        def ask() -> None:
            while not over.is_set():
                if (failure := _ask_with_retries(server, job)) is None:
                    asked.append(1)
                else:
                    failures.append(failure)

        threads = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(restarts):
                _restart_under_a_stream(server, job)
            before = len(asked)
            _wait_for(lambda: len(asked) >= before + 5)
        finally:
            over.set()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
    assert failures == []


def _ask_with_retries(server: Server, job: str) -> str | None:
    """What went wrong with a request that is tried again for as long as no server is there."""
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            with server.client() as client:
                done = client.get(f"/luthier/v1/jobs/{job}")
            return None if done.status_code == 200 else f"{done.status_code} {done.text}"
        except httpx2.TransportError as error:
            if time.monotonic() > until:
                return str(error)
            time.sleep(0.05)


def _restart_under_a_stream(server: Server, job: str) -> None:
    """The server closes the stream, so that its client goes on elsewhere."""
    headers = {"accept": "text/event-stream"}
    with (
        server.client() as client,
        client.stream("GET", f"/luthier/v1/jobs/{job}/events", headers=headers) as response,
    ):
        events = read_events(response)
        assert next(events)[1]["kind"] == "job_created"
        assert server.stop() == 0
        assert list(events) == []
    server.start()


def test_a_request_that_was_begun_is_finished_after_sigterm(tmp_path: Path) -> None:
    with running(tmp_path) as server, socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST /luthier/v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {server.key}\r\n"
        head += f"Content-Type: application/octet-stream\r\nContent-Length: {len(ROW)}\r\n\r\n"
        connection.sendall(head.encode() + ROW[:10].encode())
        _wait_for(lambda: any((server.home / "tmp").glob("*")))
        assert server.process
        server.process.send_signal(signal.SIGTERM)
        _wait_for(lambda: not _listens(server.port))
        connection.sendall(ROW[10:].encode())
        answer = connection.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 201"), answer
        assert server.process.wait(PATIENCE_SECONDS) == 0
        server.stop()


def _wait_for(holds: Any) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.005)


def _listens(port: int) -> bool:
    with socket.socket() as trying:
        return trying.connect_ex(("127.0.0.1", port)) == 0


# -- uploads -----------------------------------------------------------------------------------------------------------


def _resident(pid: int) -> int:
    """The most bytes that a process ever had in memory."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmHWM")).split()[1]) << 10


def _send_raw(port: int, head: str, body: Iterator[bytes]) -> bytes:
    """Send as much as the server takes, and read what it says."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS) as connection:
        with suppress(ConnectionError, BrokenPipeError):
            connection.sendall(head.encode())
            for piece in body:
                connection.sendall(piece)
        with suppress(ConnectionError):
            return connection.makefile("rb").readline()
    return b""


CLAIMS = ("Content-Length: 10", "Content-Length: 9999999999999", "Transfer-Encoding: chunked")


def test_a_body_that_is_larger_than_it_says_costs_no_memory(tmp_path: Path) -> None:
    size, piece = 96 << 20, b"x" * (1 << 20)
    with running(tmp_path, "--limit", "file_bytes=67108864") as server, server.client() as client:
        assert server.process
        client.post("/luthier/v1/files", content=b"warm", headers=OCTETS)
        before = _resident(server.process.pid)
        for claim in CLAIMS:
            head = f"POST /luthier/v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {server.key}\r\n"
            head += f"Content-Type: application/octet-stream\r\n{claim}\r\n\r\n"
            is_chunked = "chunked" in claim
            framed = f"{len(piece):x}\r\n".encode() + piece + b"\r\n" if is_chunked else piece
            answer = _send_raw(server.port, head, (framed for _ in range(size >> 20)))
            # With a short length the server takes that much, and the rest is no request of HTTP.
            taken = b" 201 " in answer or b" 400 " in answer
            assert b" 413 " in answer or (answer == b"" and is_chunked) or (taken and ": 10" in claim), answer
        assert _resident(server.process.pid) - before < 64 << 20
        assert {each["bytes"] for each in client.get("/luthier/v1/files").json()["files"]} <= {4, 10}
        assert list((server.home / "tmp").glob("*")) == []


def test_an_upload_that_is_cut_leaves_nothing(server: Server) -> None:
    chance = random.Random(5)
    for _ in range(KILLS or 5):
        cut = chance.randrange(0, 200_000)
        head = f"POST /luthier/v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {server.key}\r\n"
        head += "Content-Type: application/octet-stream\r\nContent-Length: 200000\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head.encode() + b"y" * cut)
    _wait_for(lambda: list((server.home / "tmp").glob("*")) == [])
    with server.client() as client:
        assert 200_000 not in [each["bytes"] for each in client.get("/luthier/v1/files").json()["files"]]


# -- logs and secrets --------------------------------------------------------------------------------------------------


def test_no_secret_is_in_the_log(tmp_path: Path) -> None:
    canary = "hf_canary0123456789abcdef"
    server = Server(tmp_path, "--log-requests")
    server.start(environment={"HF_TOKEN": canary, "OPENAI_API_KEY": "sk-canary-0123456789"})
    try:
        with server.client() as client:
            for headers in ({}, {"x-api-key": canary}, {"authorization": f"Bearer {canary}"}):
                client.get(f"/luthier/v1/jobs/{canary}", headers=headers)
                client.get(f"/none/{canary}?key={server.key}", headers=headers)
            client.post(
                "/luthier/v1/jobs", content=f'{{"spec": "{canary}"', headers={"content-type": "application/json"}
            )
            client.get("/luthier/v1/metrics")
            shown = client.get("/luthier/v1/capacity").text + client.get("/luthier/v1/metrics").text
    finally:
        server.stop()
    log = server.log.read_text()
    assert "GET" in log, "requests were to be logged"
    for secret in (canary, "sk-canary", server.key, server.key.rpartition("_")[2]):
        assert secret not in log
        assert secret not in shown


# -- the database ------------------------------------------------------------------------------------------------------


def test_a_database_that_is_gone_is_503_and_comes_back(tmp_path: Path) -> None:
    with running(tmp_path) as server, server.client() as client:
        spec = spec_for(client)
        holder = subprocess.Popen(
            [sys.executable, "-c", _HOLD, str(server.home / "luthier.db")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert holder.stdin
        assert holder.stdout
        holder.stdout.readline()
        with ThreadPoolExecutor(2) as pool:
            asked = pool.submit(client.post, "/luthier/v1/jobs", json={"spec": spec})
            read = client.get("/luthier/v1/jobs")
            assert read.status_code == 200  # readers do not wait for a writer
            done = asked.result(PATIENCE_SECONDS)
        assert done.status_code == 503
        assert 1 <= int(done.headers["retry-after"]) <= 60
        assert done.json()["error"]["code"] == "database_unavailable"
        holder.communicate()
        assert client.post("/luthier/v1/jobs", json={"spec": spec}).status_code == 201


_HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print(flush=True)
sys.stdin.read()
"""
