"""Read the elements of a JSON array, or objects one after the other, without holding the file in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO

from luthier.data.parse import MAX_LINE_BYTES
from luthier.errors import DataError

_BLOCK_BYTES = 1 << 20
# A whole string, or a sign that matters outside of one; a quote alone opens a string that is not all read yet.
_SIGNS = re.compile(rb'"(?:[^"\\]|\\.)*+"|["\[\]{}\n]', re.DOTALL)


def read_elements(file: IO[bytes], name: str) -> Iterator[tuple[int, bytes]]:
    """Each element as it stands in the file, with the line it starts on."""
    scanner = _Scanner()
    while data := file.read(_BLOCK_BYTES):
        if scanner.is_at_start and data.startswith(b"\xef\xbb\xbf"):
            raise DataError(f"{name}: starts with a byte order mark", hint="save the file as UTF-8 without one")
        yield from scanner.feed(data)
        if scanner.waiting_bytes > MAX_LINE_BYTES:
            raise DataError(
                f"{name}:{scanner.first_line}: a row of more than {MAX_LINE_BYTES:,} bytes, or a bracket never closed"
            )
    if scanner.is_open:
        raise DataError(
            f"{name}:{scanner.first_line}: not valid JSON: what starts here never ends", hint="is the file cut off?"
        )
    yield from scanner.between(scanner.rest)


class _Scanner:
    """Follows brackets and strings; an element is whole when its last bracket closes."""

    def __init__(self) -> None:
        self.rest = b""
        self.first_line = 1
        self._at = 0
        self._line = 1
        self._depth = 0
        self._in_array = False

    @property
    def waiting_bytes(self) -> int:
        """Bytes of an element that has begun and not ended."""
        return len(self.rest)

    @property
    def is_at_start(self) -> bool:
        """Whether nothing was read yet."""
        return self._at == 0 and not self.rest

    @property
    def is_open(self) -> bool:
        """Whether something began that has not ended."""
        return self._depth > 0 or self._in_array

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """The elements that end in this piece of the file."""
        buffer, begin = self.rest + data, 0
        for match in _SIGNS.finditer(buffer, self._at):
            sign = match[0]
            if sign == b'"':
                break
            self._at = match.end()
            if sign in b"[{":
                yield from self._open(sign, buffer[begin : match.start()])
                begin = begin if self._depth > 1 else match.end() if self._depth == 0 else match.start()
            elif sign in b"]}":
                yield from self._close(buffer[begin : match.start()], buffer[begin : match.end()])
                begin = match.end() if self._depth == 0 else begin
            self._line += sign.count(b"\n")
        self.rest = buffer[begin:]
        self._at -= begin

    def _open(self, sign: bytes, before: bytes) -> Iterator[tuple[int, bytes]]:
        if self._depth == 0:
            self.first_line = self._line
            if sign == b"[" and not self._in_array and not before.strip():
                self._in_array = True
                return
            yield from self.between(before)
        self._depth += 1

    def _close(self, before: bytes, element: bytes) -> Iterator[tuple[int, bytes]]:
        if self._depth == 0:
            yield from self.between(before)
            self._in_array = False
            return
        self._depth -= 1
        if self._depth == 0:
            yield self.first_line, element

    def between(self, junk: bytes) -> Iterator[tuple[int, bytes]]:
        """What stands between two elements and is no separator is a row too, and a bad one."""
        junk = junk.strip(b" \t\r\n,")
        if junk:
            yield self._line, junk
