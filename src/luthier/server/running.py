"""A server as it runs: bound to its address, with its worker beside it, until it is asked to end and has drained."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn

from luthier.errors import CallError
from luthier.jobs.worker import DATABASE_VARIABLE
from luthier.runs.model_folder import MODELS_VARIABLE
from luthier.server.app import create_app
from luthier.server.service import Service, open_service
from luthier.server.settings import Settings, read_settings

log = logging.getLogger("luthier.server")

SETTINGS_VARIABLE = "LUTHIER_SERVER_SETTINGS"
_BACKLOG = 2048
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_HEADER_BYTES = 64 << 10
_KEEP_ALIVE_SECONDS = 30
_RESTART_SECONDS = 1.0
_MOST_RESTART_SECONDS = 30.0
_WORKER_PATIENCE_SECONDS = 15.0
_LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Tls:
    """The certificate and its key, where the server speaks TLS itself."""

    certificate: str
    key: str


def bind(settings: Settings) -> socket.socket:
    """The listening socket; CallError where the address is taken or not of this machine."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise CallError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}",
            hint="--port 0 takes a free one",
        ) from None
    listening.setblocking(False)
    return listening


def set_environment(settings: Settings) -> None:
    """What resolves names of models in this process and its children looks into the server's home."""
    os.environ["LUTHIER_HOME"] = str(settings.home)
    if settings.models:
        os.environ[MODELS_VARIABLE] = str(settings.models)
    else:
        os.environ.pop(MODELS_VARIABLE, None)


def serve(
    settings: Settings, listening: socket.socket, *, tls: Tls | None = None, service: Service | None = None
) -> None:
    """Answer until SIGTERM or SIGINT, then finish what was begun; workers end with the server, trainers go on."""
    with _workers(settings) as workers:
        if settings.processes > 1:
            _serve_in_processes(settings, listening, tls, workers)
        else:
            _serve_here(service or open_service(settings), listening, tls, workers.stop)


def _serve_here(
    service: Service, listening: socket.socket, tls: Tls | None, when_asked: Callable[[], None] | None = None
) -> None:
    server = _Draining(_configure(service, tls), service, when_asked)
    server.run(sockets=[listening])


def _configure(service: Service, tls: Tls | None) -> uvicorn.Config:
    certificate: dict[str, Any] = {"ssl_certfile": tls.certificate, "ssl_keyfile": tls.key} if tls else {}
    return uvicorn.Config(
        create_app(service),
        lifespan="on",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here trusts an address that a header names
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=service.settings.limits.drain_seconds,
        h11_max_incomplete_event_size=_HEADER_BYTES,
        **certificate,
    )


class _Draining(uvicorn.Server):
    """Closes streams as soon as it is asked to end, and then ends by returning."""

    def __init__(self, config: uvicorn.Config, service: Service, when_asked: Callable[[], None] | None) -> None:
        super().__init__(config)
        self._service, self._when_asked = service, when_asked

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals end the server, and nothing after it: uvicorn would raise them again."""
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, former in before.items():
                signal.signal(number, former)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Asked to end; a second Ctrl-C does not wait."""
        self._service.drain()
        if self._when_asked:
            self._when_asked()
        super().handle_exit(sig, frame)


class _Workers:
    """The worker processes of a server, each started again when it dies."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._is_over = threading.Event()
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start as many as the settings say."""
        for index in range(self._settings.workers):
            thread = threading.Thread(target=self._keep, args=(index,), name=f"worker {index}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Have them claim nothing more and end; their trainers go on. Safe inside the handler of a signal."""
        self._is_over.set()
        for process in list(self._running.values()):
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        """Until they have ended, or were given long enough to."""
        for thread in self._threads:
            thread.join(_WORKER_PATIENCE_SECONDS)

    def _keep(self, index: int) -> None:
        pause = _RESTART_SECONDS
        while not self._is_over.is_set():
            process = start_worker(self._settings)
            self._running[index] = process
            if self._is_over.is_set():
                process.terminate()
            code = process.wait()
            assert process.stdin
            process.stdin.close()
            if self._is_over.is_set():
                return
            log.warning("worker %s ended with code %s and is started again", process.pid, code)
            self._is_over.wait(pause)
            pause = min(2 * pause, _MOST_RESTART_SECONDS)


@contextmanager
def _workers(settings: Settings) -> Iterator[_Workers]:
    workers = _Workers(settings)
    workers.start()
    try:
        yield workers
    finally:
        workers.stop()
        workers.wait()


def start_worker(settings: Settings) -> subprocess.Popen[bytes]:
    """A worker that ends when its standard input does: when this process is gone."""
    command = [sys.executable, "-P", "-m", "luthier.jobs.worker", "--home", str(settings.home), "--follow-stdin"]
    command += ["--models", str(settings.models)] if settings.models else []
    for asked, has in settings.offers.items():
        command += ["--offer", f"{asked}={has}"]
    environment = {**os.environ, DATABASE_VARIABLE: settings.database}
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)  # noqa: S603


def _serve_in_processes(settings: Settings, listening: socket.socket, tls: Tls | None, workers: _Workers) -> None:
    """Several processes on one socket, all on one PostgreSQL; one that dies is started again."""
    is_over = threading.Event()
    asked: list[int] = []
    children: dict[int, subprocess.Popen[bytes]] = {}

    def keep(index: int) -> None:
        while not is_over.is_set():
            child = children[index] = _start_process(settings, listening, tls)
            if is_over.is_set():
                child.terminate()
            code = child.wait()
            if not is_over.is_set():
                log.warning("server process %s ended with code %s and is started again", child.pid, code)
                is_over.wait(_RESTART_SECONDS)

    # A handler only notes the signal: what it would do here could wait for a lock that this very thread holds.
    before = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in _SIGNALS}
    threads = [threading.Thread(target=keep, args=(index,), daemon=True) for index in range(settings.processes)]
    try:
        for thread in threads:
            thread.start()
        while not asked:
            threads[0].join(_LOOK_SECONDS)
    finally:
        is_over.set()
        workers.stop()
        for child in children.values():
            with suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(settings.limits.drain_seconds + _WORKER_PATIENCE_SECONDS)
        for number, former in before.items():
            signal.signal(number, former)


def _start_process(settings: Settings, listening: socket.socket, tls: Tls | None) -> subprocess.Popen[bytes]:
    files = [tls.certificate, tls.key] if tls else []
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-P", "-m", "luthier.server.running", str(listening.fileno()), *files],
        stdin=subprocess.PIPE,
        env={**os.environ, SETTINGS_VARIABLE: settings.as_json()},
        pass_fds=[listening.fileno()],
        start_new_session=True,
    )


def main(arguments: list[str]) -> int:
    """One of several server processes: `python -m luthier.server.running SOCKET [CERTIFICATE KEY]`."""
    from luthier.server.logs import write_logs

    write_logs()
    settings = read_settings(os.environ.pop(SETTINGS_VARIABLE))
    set_environment(settings)
    tls = Tls(*arguments[1:3]) if len(arguments) == 3 else None
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _serve_here(open_service(settings), socket.socket(fileno=int(arguments[0])), tls)
    return 0


def _end_with_parent() -> None:
    """Standard input ends when the parent is gone."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
