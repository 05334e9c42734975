"""Bodies of requests: JSON read strictly, and files streamed to the disk without ever being held in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from luthier.errors import LuthierError
from luthier.server.json_text import read_json
from luthier.server.problems import problem

_AT_ONCE = 1 << 20
_MOST_FIELDS = 32
_MOST_FIELD_BYTES = 16 << 10
_MOST_NAME = 255


class _StrictRequest(Request):
    """A request whose JSON is read by `read_json`."""

    async def json(self) -> Any:
        if not hasattr(self, "_strict"):
            self._strict = read_json(await self.body())
        return self._strict


class StrictRoute(APIRoute):
    """A route whose JSON body is read strictly: `APIRouter(route_class=StrictRoute)`."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """The handler, given a request of that kind."""
        inner = super().get_route_handler()

        async def handle(request: Request) -> Response:
            answer: Response = await inner(_StrictRequest(request.scope, request.receive))
            return answer

        return handle


class Sink(Protocol):
    """Where a file goes while it is sent."""

    def write(self, data: bytes) -> None:
        """Take the next bytes."""

    def abort(self) -> None:
        """Forget it: nothing stays on the disk."""


S = TypeVar("S", bound=Sink)


@dataclass
class Received(Generic[S]):
    """A form that came whole: its fields, and the file, which its caller finishes."""

    fields: dict[str, str]
    file: S


@asynccontextmanager
async def receive_form(
    request: Request, begin: Callable[[dict[str, str], str], S], *, file_field: str = "file"
) -> AsyncIterator[Received[S]]:
    """Stream a multipart form: `begin(fields, filename)` opens the sink when the file starts; fields come before it.

    An error here or in the caller's block drops the file.
    """
    form = _Form(_boundary(request), file_field)
    writer: _Writer[S] | None = None
    try:
        async for chunk in request.stream():
            for filename, data in form.feed(chunk):
                if writer is None:
                    writer = _Writer(await run_in_threadpool(begin, form.fields, filename))
                await writer.write(data)
        form.end()
        if writer is None:
            raise problem(400, f"the form has no file in the field `{file_field}`", param=file_field)
        await writer.flush()
        yield Received(form.fields, writer.sink)
    except BaseException:
        if writer is not None:
            await run_in_threadpool(writer.sink.abort)
        raise


@asynccontextmanager
async def receive_raw(request: Request, begin: Callable[[], S]) -> AsyncIterator[S]:
    """The same for a body that is the file itself."""
    sink = await run_in_threadpool(begin)
    writer = _Writer(sink)
    try:
        async for chunk in request.stream():
            await writer.write(chunk)
        await writer.flush()
        yield sink
    except BaseException:
        await run_in_threadpool(sink.abort)
        raise


class _Writer(Generic[S]):
    """Gathers what comes in small pieces, so that the disk is asked once a mebibyte."""

    def __init__(self, sink: S) -> None:
        self.sink = sink
        self._held = bytearray()

    async def write(self, data: bytes) -> None:
        self._held += data
        if len(self._held) >= _AT_ONCE:
            await self.flush()

    async def flush(self) -> None:
        if self._held:
            data = bytes(self._held)
            self._held.clear()
            await run_in_threadpool(self.sink.write, data)


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= 200:
        raise problem(415, "expected a multipart/form-data body with a boundary", hint="send the file as a form")
    return boundary


@dataclass
class _Part:
    name: str = ""
    filename: str | None = None
    value: bytearray = field(default_factory=bytearray)


class _Form:
    """Reads a multipart form piece by piece: fields are kept, the bytes of the one file are handed on."""

    def __init__(self, boundary: bytes, file_field: str) -> None:
        self.fields: dict[str, str] = {}
        self._file_field = file_field
        self._part = _Part()
        self._header: list[bytearray] = [bytearray(), bytearray()]
        self._out: list[tuple[str, bytes]] = []
        self._has_file = self._is_over = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_part_data": self._take,
                "on_part_end": self._end_part,
                "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_end": self._end,
            },
        )

    def feed(self, chunk: bytes) -> list[tuple[str, bytes]]:
        """The (filename, bytes) of the file that this piece of the body brought."""
        self._out = []
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise problem(400, f"the form cannot be read: {error}") from None
        return self._out

    def end(self) -> None:
        """The body is over; refuse one that was cut."""
        if not self._is_over:
            raise problem(400, "the form is cut off before its end")

    def _begin(self) -> None:
        self._part = _Part()
        if len(self.fields) >= _MOST_FIELDS:
            raise problem(400, f"the form has more than {_MOST_FIELDS} fields")

    def _end_header(self) -> None:
        name, value = bytes(self._header[0]).lower(), bytes(self._header[1])
        self._header = [bytearray(), bytearray()]
        if name == b"content-disposition":
            _, options = parse_options_header(value)
            self._part.name = _text(options.get(b"name", b""))
            if (filename := options.get(b"filename")) is not None:
                self._part.filename = clean_filename(_text(filename))

    def _end_headers(self) -> None:
        if self._part.filename is None:
            return
        if self._part.name != self._file_field:
            raise problem(400, f"a file in the field `{self._part.name[:64]}`; expected it in `{self._file_field}`")
        if self._has_file:
            raise problem(400, "two files in one form; send one at a time")
        self._has_file = True
        self._out.append((self._part.filename, b""))

    def _take(self, data: bytes, start: int, end: int) -> None:
        if self._part.filename is not None:
            self._out.append((self._part.filename, data[start:end]))
        else:
            self._part.value += data[start:end]
            if len(self._part.value) > _MOST_FIELD_BYTES:
                raise problem(413, f"the field `{self._part.name[:64]}` is larger than {_MOST_FIELD_BYTES} bytes")

    def _end_part(self) -> None:
        if self._part.filename is None:
            self.fields[self._part.name] = _text(bytes(self._part.value))

    def _end(self) -> None:
        self._is_over = True


def _text(raw: bytes) -> str:
    text = raw.decode("utf-8", "replace")
    if "\0" in text:
        raise problem(400, "the form has a NUL character in a text")
    return text


def clean_filename(name: str) -> str:
    """The last part of a name as a client gave it, for people to read; never a path of the server."""
    last = name.replace("\\", "/").rpartition("/")[2]
    shown = "".join(each for each in last if each.isprintable()).strip()
    return shown[:_MOST_NAME] or "file"


def too_large(limit: int, what: str) -> LuthierError:
    """The error of a body that is larger than it may be."""
    return problem(413, f"{what} is larger than {limit:,} bytes", hint="send a large file in parts, by /v1/uploads")
