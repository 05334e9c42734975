"""HTTP to a server: requests that are tried again where that is safe, streams, uploads and downloads."""

from __future__ import annotations

import http.client
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import orjson

from luthier import __version__
from luthier.client.address import Address
from luthier.errors import ServerError, ServerGoneError

_TRIES = 6
_FIRST_WAIT_SECONDS = 0.25
_LONGEST_WAIT_SECONDS = 10.0
_TIMEOUT_SECONDS = 60.0
_MOST_REPLY_BYTES = 64 << 20
_CHUNK = 256 << 10
_AGAIN = (429, 502, 503, 504)


@dataclass(frozen=True)
class Connection:
    """A server as it is spoken to with one key."""

    address: Address
    pause: Callable[[float], None] = time.sleep
    timeout_seconds: float = _TIMEOUT_SECONDS
    tries: int = _TRIES
    _random: random.Random = field(default_factory=random.Random)

    def get(self, path: str, **query: Any) -> Any:
        """What lies at a path."""
        return self.call("GET", path, query=query)

    def call(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        query: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        is_safe: bool | None = None,
    ) -> Any:
        """The JSON that the server answers; raises ServerError for a refusal, ServerGoneError where none came.

        A request is tried again where doing it twice does no harm: a reading one, or one that carries its own key.
        """
        sent = dict(headers or {})
        body = None
        if json is not None:
            body, sent["Content-Type"] = orjson.dumps(json), "application/json"
        elif method == "POST":
            body, sent["Content-Type"] = b"", "application/json"
        may_repeat = (
            is_safe if is_safe is not None else method in ("GET", "HEAD", "DELETE") or "Idempotency-Key" in sent
        )
        content = self._try(method, _with_query(path, query), body, sent, may_repeat=may_repeat)
        return _read_json(content) if content else None

    def send_file(self, path: str, file: Path, *, query: Mapping[str, Any], content_type: str) -> Any:
        """A file as the body of a request, read as it is sent."""
        with file.open("rb") as content:
            return self.send(_with_query(path, query), content, size=file.stat().st_size, content_type=content_type)

    def send(self, target: str, content: Any, *, size: int, content_type: str) -> Any:
        """A stream as the body of a request; again from its start where the connection broke."""
        headers = {"Content-Type": content_type, "Content-Length": str(size)}
        return _read_json(self._try("POST", target, content, headers, may_repeat=True))

    @contextmanager
    def stream(self, path: str, *, headers: Mapping[str, str], query: Mapping[str, Any] | None = None) -> Iterator[Any]:
        """An answer that is read as it comes; raises as `call` does, and is not tried again."""
        link = self._open()
        with closing(link):
            yield self._begin(link, "GET", _with_query(path, query), None, dict(headers))

    def download(self, path: str, target: Path, *, size: int) -> None:
        """A file of the server, going on from where an earlier try broke off."""
        target.parent.mkdir(parents=True, exist_ok=True)
        for number in range(self.tries):
            there = target.stat().st_size if target.exists() else 0
            if there == size and (size or target.exists()):
                return
            try:
                self._download(path, target, min(there, size), size)
            except (OSError, http.client.HTTPException) as error:
                if number + 1 == self.tries:
                    raise self._gone(error) from error
                self.pause(self._wait(number, {}))

    def _download(self, path: str, target: Path, start: int, size: int) -> None:
        headers = {"Range": f"bytes={start}-"} if start else {}
        with self.stream(path, headers=headers) as reply, target.open("r+b" if start else "wb") as file:
            file.seek(start if reply.status == 206 else 0)
            file.truncate()
            while data := reply.read(_CHUNK):
                file.write(data)
        if target.stat().st_size < size:
            raise http.client.IncompleteRead(b"", size)

    def _try(self, method: str, target: str, body: Any, headers: dict[str, str], *, may_repeat: bool) -> bytes:
        for number in range(self.tries):
            is_last = number + 1 == self.tries or not may_repeat
            try:
                return self._once(method, target, body, headers)
            except ServerError as error:
                if is_last or error.status not in _AGAIN:
                    raise
                self.pause(self._wait(number, error.headers))
            except (OSError, http.client.HTTPException) as error:
                if is_last:
                    raise self._gone(error) from error
                self.pause(self._wait(number, {}))
            if hasattr(body, "seek"):
                body.seek(0)
        raise AssertionError("the last try returns or raises")

    def _once(self, method: str, target: str, body: Any, headers: dict[str, str]) -> bytes:
        link = self._open()
        with closing(link):
            return self._begin(link, method, target, body, headers).read(_MOST_REPLY_BYTES)

    def _open(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.address.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.hostname or "", parts.port, timeout=self.timeout_seconds)

    def _begin(
        self, link: http.client.HTTPConnection, method: str, target: str, body: Any, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        """The answer's head; a redirection is not followed, since it would take the key somewhere else."""
        own = {"Authorization": f"Bearer {self.address.key}", "User-Agent": f"luthier/{__version__}", **headers}
        link.request(method, urlsplit(self.address.url).path.rstrip("/") + target, body, own)
        reply = link.getresponse()
        if reply.status >= 300:
            raise _refusal(reply.status, reply.read(_MOST_REPLY_BYTES), dict(reply.headers), method, target)
        return reply

    def _wait(self, number: int, headers: Mapping[str, str]) -> float:
        """As long as the server says, else longer each time and not in step with others."""
        said = next((value for name, value in headers.items() if name.lower() == "retry-after"), "")
        if said.isascii() and said.isdigit():
            return min(float(said), 60.0)
        return min(_FIRST_WAIT_SECONDS * 2.0**number, _LONGEST_WAIT_SECONDS) * (0.5 + self._random.random() / 2)

    def _gone(self, error: BaseException) -> ServerGoneError:
        said = str(error) or type(error).__name__
        return ServerGoneError(
            f"the server at {self.address.url} cannot be reached: {said}",
            hint="see whether it runs (`luthier serve`), and whether --server names it",
        )


def quoted(part: str) -> str:
    """An id as a part of a path."""
    return quote(part, safe=":")


def _with_query(path: str, query: Mapping[str, Any] | None) -> str:
    given = {key: value for key, value in (query or {}).items() if value is not None}
    return f"{path}?{urlencode(given, doseq=True)}" if given else path


def _read_json(content: bytes) -> Any:
    try:
        return orjson.loads(content)
    except ValueError:
        raise ServerError(
            "the server answered something that is not JSON", hint="see whether --server names a Luthier server"
        ) from None


def _refusal(status: int, content: bytes, headers: Mapping[str, str], method: str, target: str) -> ServerError:
    """What the server said, with its own code and hint, in whichever dialect it said it."""
    try:
        told = orjson.loads(content)
    except ValueError:
        told = {}
    inner = told.get("error") if isinstance(told, dict) else None
    facts = inner if isinstance(inner, dict) else told if isinstance(told, dict) else {}
    place = f"{method} {target.partition('?')[0]}"
    said = facts.get("message") or facts.get("detail") or f"{place} was answered with {status}"
    error = ServerError(str(said), hint=str(facts.get("hint") or ""), details=facts.get("details"))
    if isinstance(facts.get("code"), str):
        error.code = facts["code"]
    error.status, error.headers = status, headers
    return error
