"""The outermost layer: who may call from where, how much they may send, and what every answer carries."""

from __future__ import annotations

import ipaddress
import logging
import secrets
import time
from collections.abc import Iterable, MutableMapping
from typing import TYPE_CHECKING, Any

from luthier.errors import LuthierError
from luthier.server.bodies import too_large
from luthier.server.problems import problem, render_problem, status_of

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from luthier.server.service import Service

log = logging.getLogger("luthier.server")
access = logging.getLogger("luthier.access")

_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "cache-control": "no-store",
}
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_OVERHEAD = 1 << 20
"""What a form may add to its file."""
_PROTOBUF = "application/x-protobuf"
_TYPES = ("application/json", "multipart/form-data", "application/octet-stream", _PROTOBUF)
_LIVE = ("/api/v1/forward_backward", "/api/v1/forward", "/api/v1/asample")
"""Where a Tinker client sends its data, as protobuf or, before 0.25, as JSON."""
_LONGEST_PATH = 4096


class Guard:
    """ASGI middleware around the whole application, so that no path and no verb goes past it."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        settings = service.settings
        self._hosts = {name.lower() for name in (*_LOOPBACK_NAMES, settings.host, *settings.allowed_hosts)}
        self._takes_addresses = not settings.is_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await _refuse_websocket(receive, send)
            return
        answer = _Answer(scope, send)
        try:
            headers = _read_headers(scope["headers"])
            self._check_caller(headers)
            _check_target(scope)
            limit = self._limit_of(scope["path"], headers)
            await self._app(scope, _counted(receive, limit, headers), answer.send)
        except Exception as error:  # the edge: nobody outside sees a traceback, and every failure has its shape
            await answer.fail(error)
        finally:
            self._record(scope, answer)

    def _check_caller(self, headers: dict[str, str]) -> None:
        """Pages of other sites, and names that lead here by a trick of DNS, get nothing."""
        host = _name_of(headers.get("host", ""))
        if not (host in self._hosts or (self._takes_addresses and _is_address(host))):
            raise problem(
                421, "the `Host` header names another server", hint="`luthier serve --allow-host NAME` adds a name"
            )
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != headers["host"].lower():
            raise problem(403, "requests from pages of other sites are refused", code="forbidden")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise problem(403, "requests from pages of other sites are refused", code="forbidden")

    def _limit_of(self, path: str, headers: dict[str, str]) -> int:
        """How large the body may be: files only where files are sent."""
        limits = self._service.settings.limits
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        if has_body and kind not in _TYPES:
            raise problem(415, f"a body of the type {kind[:64]!r}", hint="send application/json, or a file as a form")
        if path in _LIVE and kind in (_TYPES[0], _PROTOBUF):
            return limits.live_bytes
        if kind in _TYPES[1:]:
            if path.endswith("/parts"):
                return limits.part_bytes + _OVERHEAD
            if path.rstrip("/").endswith("/files"):
                return limits.file_bytes + _OVERHEAD
            raise problem(415, f"a body of the type {kind!r}, and no file is sent here", hint="send application/json")
        return limits.json_bytes

    def _record(self, scope: Scope, answer: _Answer) -> None:
        seconds = time.perf_counter() - answer.started
        route = getattr(scope.get("route"), "path", "none")
        self._service.metrics.requests.labels(scope["method"], route, str(answer.status)).observe(seconds)
        if code := answer.code or scope.get("luthier.code"):
            self._service.metrics.errors.labels(code).inc()
        if self._service.settings.log_requests:
            access.info(
                "%s %s %s",
                scope["method"],
                route if route != "none" else scope["path"][:200],
                answer.status,
                extra={"request": answer.id, "seconds": round(seconds, 4), "key": scope.get("luthier.key")},
            )


class _Answer:
    """What is sent back: every start carries the headers of the house, and a failure becomes an answer."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.id = f"req_{secrets.token_hex(12)}"
        self.status = 0
        self.code = ""
        self.started = time.perf_counter()
        self._scope, self._send = scope, send
        scope["luthier.request"] = self.id

    async def send(self, message: Message) -> None:
        """Send on, and add what is missing."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = _completed(message["headers"], self.id)
        await self._send(message)

    async def fail(self, error: Exception) -> None:
        """Answer in the shape of the dialect; where an answer has begun, only the connection can end."""
        ours = error if isinstance(error, LuthierError) else _inner(error)
        if ours is None:
            log.error(
                "%s %s failed: %s",
                self._scope["method"],
                self._scope["path"][:200],
                type(error).__name__,
                exc_info=error,
                extra={"request": self.id},
            )
            ours = LuthierError("an error of the server's own", hint=f"its log names the request {self.id}")
            ours.code = "internal_error"
            vars(ours)["status"] = 500
        self.code = ours.code
        if self.status:
            raise error
        response = render_problem(self._scope["path"], ours)
        if status_of(ours) in (413, 415):
            response.headers["connection"] = "close"  # the rest of the body is not read
        await response(self._scope, _nothing, self.send)


def _inner(error: BaseException) -> LuthierError | None:
    """Our error inside a group of a task group, if it is that alone."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error if isinstance(error, LuthierError) else None


def _read_headers(raw: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Headers by name; one that must be single and stands twice is refused."""
    found: dict[str, str] = {}
    for name, value in raw:
        text = name.decode("latin-1").lower()
        if text in found and text in ("host", "origin", "authorization", "content-length", "idempotency-key"):
            raise problem(400, f"the header `{text}` stands twice")
        found[text] = value.decode("latin-1")
    return found


def _name_of(host: str) -> str:
    """The name in a `Host` header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].rstrip(".").lower()


def _is_address(host: str) -> bool:
    """An address cannot be pointed elsewhere, as a name can."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _check_target(scope: Scope) -> None:
    """No database and no file system takes a NUL."""
    query = scope.get("query_string", b"")
    if "\0" in scope["path"] or b"%00" in query or b"\0" in query:
        raise problem(400, "the address has a NUL character")
    if len(scope["path"]) > _LONGEST_PATH or len(query) > _LONGEST_PATH:
        raise problem(414, "the address is too long")


def _counted(receive: Receive, limit: int, headers: dict[str, str]) -> Receive:
    """Count what is really sent: a length in a header is only a claim."""
    claimed = headers.get("content-length", "")
    if claimed.isdigit() and int(claimed[:19]) > limit:
        raise too_large(limit, "the body")
    seen = 0

    async def count() -> Message:
        nonlocal seen
        message = await receive()
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            if seen > limit:
                raise too_large(limit, "the body")
        return message

    return count


def _completed(headers: Iterable[tuple[bytes, bytes]], request: str) -> list[tuple[bytes, bytes]]:
    given = list(headers)
    names = {name.lower() for name, _ in given}
    added = {**_HEADERS, "x-request-id": request}
    return given + [(name.encode(), value.encode()) for name, value in added.items() if name.encode() not in names]


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


async def _refuse_websocket(receive: Receive, send: Send) -> None:
    """Nothing here speaks WebSocket."""
    message: MutableMapping[str, Any] = await receive()
    if message["type"] == "websocket.connect":
        await send({"type": "websocket.close", "code": 1008})
