"""Which service and which key, told at once: from the environment, else from `.env`; silence is an error."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from luthier.engines.tinker.address import Service, answers, ask, check_service, find_service
from luthier.errors import CallError, ServerError, ServerGoneError

KEY = "tml-ftk_0123456789abcdef"
URL = "http://127.0.0.1:8440"
Answer = Callable[[str, str | None], tuple[int, object]]
"""Of a path and a key: a status and a body."""


@pytest.fixture
def listen() -> Iterator[Callable[[Answer], str]]:
    """Starts a server that answers as it is told; its address."""
    started: list[ThreadingHTTPServer] = []

    def start(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = answer(self.path, self.headers.get("X-API-Key"))
                content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        started.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("name", ["TINKER_BASE_URL", "TINKER_API_BASE"])
def test_both_names_of_the_address_are_read(name: str, tmp_path: Path) -> None:
    assert find_service({name: f"{URL}/", "TINKER_API_KEY": KEY}, tmp_path) == Service(URL, KEY)


def test_the_name_that_the_sdk_reads_comes_first(tmp_path: Path) -> None:
    known = {"TINKER_API_BASE": "http://other.example", "TINKER_BASE_URL": URL, "TINKER_API_KEY": KEY}
    assert find_service(known, tmp_path).url == URL


def test_a_file_fills_what_the_environment_leaves_open(tmp_path: Path) -> None:
    other = "http://file.example"
    (tmp_path / ".env").write_text(f"TINKER_API_KEY='{KEY}'\nTINKER_BASE_URL={other}\n")
    assert find_service({}, tmp_path) == Service(other, KEY)
    assert find_service({"TINKER_BASE_URL": URL}, tmp_path) == Service(URL, KEY)


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({"TINKER_BASE_URL": URL}, "TINKER_API_KEY is not set"),
        ({"TINKER_BASE_URL": URL, "TINKER_API_KEY": ""}, "TINKER_API_KEY is not set"),
        ({"TINKER_BASE_URL": URL, "TINKER_API_KEY": "sk-other"}, "does not begin with `tml-`"),
        ({"TINKER_BASE_URL": "somewhere", "TINKER_API_KEY": KEY}, "is no address of a service"),
    ],
)
def test_what_is_missing_or_wrong_is_one_error(known: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(CallError, match="TINKER") as told:
        find_service(known, tmp_path)
    assert said in told.value.message
    assert told.value.hint
    assert KEY not in str(told.value.as_dict())


def test_a_key_is_in_no_text_of_a_service() -> None:
    assert KEY not in repr(Service(URL, KEY))


def test_an_address_where_nobody_listens_is_told_at_once() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        service = Service(f"http://127.0.0.1:{bound.getsockname()[1]}", KEY)
        started = time.monotonic()
        with pytest.raises(ServerGoneError, match="does not answer"):
            check_service(service)
        assert not answers(service)
        assert time.monotonic() - started < 5


def test_a_service_that_says_nothing_is_told_within_the_limit() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(ServerGoneError, match="does not answer"):
            ask(Service(f"http://127.0.0.1:{silent.getsockname()[1]}", KEY), "GET", "healthz", timeout=0.2)


def test_a_refused_key_is_told_as_that(listen: Callable[[Answer], str]) -> None:
    def answer(path: str, key: str | None) -> tuple[int, object]:
        if path.endswith("healthz"):
            return 200, {"status": "ok"}
        return 401, {"error": {"message": f"no such key: {len(key or '')} letters"}}

    with pytest.raises(
        ServerError, match=r"refused the key in TINKER_API_KEY \(401\): no such key: 24 letters"
    ) as told:
        check_service(Service(listen(answer), KEY))
    assert told.value.status == 401


def test_something_else_than_a_service_is_told_as_that(listen: Callable[[Answer], str]) -> None:
    with pytest.raises(ServerError, match="is it a Tinker service"):
        check_service(Service(listen(lambda *_: (200, "<html>")), KEY))
    with pytest.raises(ServerError, match=r"refused \(404\)"):
        check_service(Service(listen(lambda *_: (404, "not here")), KEY))
