"""A reader and a writer of the protobuf wire format, as much of it as the messages of a Tinker client need.

A message is read into its fields by number; what a field means is said by whoever asks for it, so no schema and no
package is needed. Fields of an unknown number or of another wire type than asked for are passed over, as the format
wants it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

from luthier.errors import CallError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MOST_VARINT_BYTES = 10
_SIZES = {_FIXED64: 8, _FIXED32: 4}
_MOST_FIELDS = 200_000
"""Fields of one message; a body of some megabytes could hold millions, and each takes memory of its own."""


class Message:
    """The fields of one message; `where` names it in errors."""

    def __init__(self, data: bytes | memoryview, where: str = "") -> None:
        self.where = where
        fields = islice(_read_fields(memoryview(data), where), _MOST_FIELDS + 1)
        self._fields: list[tuple[int, int, int | memoryview]] = list(fields)
        if len(self._fields) > _MOST_FIELDS:
            raise _broken(where, f"has more than {_MOST_FIELDS:,} fields")

    def has(self, number: int) -> bool:
        """Whether a length-delimited or scalar field was written at all."""
        return any(each[0] == number for each in self._fields)

    def last_of(self, *numbers: int) -> int | None:
        """Which of a oneof's fields was written last, and so holds."""
        return next((number for number, _, _ in reversed(self._fields) if number in numbers), None)

    def bytes(self, number: int) -> memoryview:
        """A bytes field, empty where it was not written."""
        return next(self._views(number, from_end=True), memoryview(b""))

    def text(self, number: int, name: str = "") -> str:
        """A string field."""
        return _read_text(self.bytes(number), name or self.where)

    def texts(self, number: int, name: str = "") -> list[str]:
        """A repeated string field."""
        return [_read_text(view, name or self.where) for view in self._views(number)]

    def unsigned(self, number: int) -> int:
        """An unsigned integer, bool or enum field; 0 where it was not written."""
        return next(self._ints(number, from_end=True), 0)

    def int32(self, number: int) -> int:
        """An int32 field."""
        return _signed(self.unsigned(number), 32)

    def int64(self, number: int) -> int:
        """An int64 field."""
        return _signed(self.unsigned(number), 64)

    def double(self, number: int) -> float:
        """A double field."""
        found = [view for at, wire, view in self._fields if at == number and wire == _FIXED64]
        return float(struct.unpack("<d", found[-1])[0]) if found else 0.0  # type: ignore[arg-type]

    def ints64(self, number: int) -> list[int]:
        """A repeated int64 field, packed or not."""
        found: list[int] = []
        for at, wire, value in self._fields:
            if at == number and wire == _VARINT:
                assert isinstance(value, int)
                found.append(_signed(value, 64))
            elif at == number and wire == _BYTES:
                assert isinstance(value, memoryview)
                place = 0
                while place < len(value):
                    one, place = _read_varint(value, place, self.where)
                    found.append(_signed(one, 64))
                    if len(found) > _MOST_FIELDS:
                        raise _broken(self.where, f"has a list of more than {_MOST_FIELDS:,} numbers")
        return found

    def message(self, number: int, name: str) -> Message:
        """A message within; written several times, its parts are merged."""
        views = list(self._views(number))
        return Message(views[0] if len(views) == 1 else b"".join(views), f"{self._prefix}{name}")

    def messages(self, number: int, name: str) -> list[Message]:
        """A repeated message field."""
        return [Message(view, f"{self._prefix}{name}[{place}]") for place, view in enumerate(self._views(number))]

    def entries(self, number: int, name: str) -> dict[str, Message]:
        """A map with string keys: the messages that hold key (1) and value (2); the last of a key holds."""
        found = {}
        for entry in self.messages(number, name):
            key = entry.text(1)
            entry.where = f"{self._prefix}{name}.{key}"
            found[key] = entry
        return found

    @property
    def _prefix(self) -> str:
        return f"{self.where}." if self.where else ""

    def _views(self, number: int, *, from_end: bool = False) -> Iterator[memoryview]:
        fields = reversed(self._fields) if from_end else self._fields
        for at, wire, value in fields:
            if at == number and wire == _BYTES:
                assert isinstance(value, memoryview)
                yield value

    def _ints(self, number: int, *, from_end: bool = False) -> Iterator[int]:
        fields = reversed(self._fields) if from_end else self._fields
        for at, wire, value in fields:
            if at == number and wire == _VARINT:
                assert isinstance(value, int)
                yield value


def write_int(number: int, value: int) -> bytes:
    """An integer, bool or enum field; nothing for 0, as the format has it."""
    return _key(number, _VARINT) + _varint(value) if value else b""


def write_double(number: int, value: float) -> bytes:
    """A double field, written even where it is 0 (map values and oneofs need that)."""
    return _key(number, _FIXED64) + struct.pack("<d", value)


def write_bytes(number: int, value: bytes | memoryview) -> bytes:
    """A bytes, string or message field, written even where it is empty."""
    return b"".join([_key(number, _BYTES), _varint(len(value)), value])


def write_text(number: int, value: str) -> bytes:
    """A string field; nothing where it is empty."""
    return write_bytes(number, value.encode()) if value else b""


def write_packed(number: int, values: Iterable[int]) -> bytes:
    """A repeated integer field."""
    packed = b"".join(_varint(value) for value in values)
    return write_bytes(number, packed) if packed else b""


def write_entries(number: int, values: Mapping[str, bytes]) -> bytes:
    """A map with string keys; the values are written as field 2 already."""
    return b"".join(write_bytes(number, write_bytes(1, key.encode()) + value) for key, value in values.items())


def _read_fields(data: memoryview, where: str) -> Iterator[tuple[int, int, int | memoryview]]:
    place = 0
    while place < len(data):
        key, place = _read_varint(data, place, where)
        number, wire = key >> 3, key & 7
        if not 0 < number < 1 << 29:
            raise _broken(where, f"has a field of number {number}")
        if wire == _VARINT:
            value, place = _read_varint(data, place, where)
            yield number, wire, value
            continue
        if wire == _BYTES:
            size, place = _read_varint(data, place, where)
        elif wire in _SIZES:
            size = _SIZES[wire]
        else:
            raise _broken(where, f"has wire type {wire}")
        if size > len(data) - place:
            raise _broken(where, f"ends within field {number}")
        yield number, wire, data[place : place + size]
        place += size


def _read_varint(data: memoryview, place: int, where: str) -> tuple[int, int]:
    if place < len(data) and data[place] < 0x80:  # nearly all of them
        return data[place], place + 1
    value = 0
    for count in range(_MOST_VARINT_BYTES):
        if place >= len(data):
            raise _broken(where, "ends within a number")
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, place
    raise _broken(where, "has a number of more than 64 bits")


def _read_text(view: memoryview, where: str) -> str:
    try:
        return str(view, "utf-8")
    except UnicodeDecodeError:
        raise _broken(where, "has a text that is not UTF-8") from None


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _key(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _varint(value: int) -> bytes:
    value &= 0xFFFF_FFFF_FFFF_FFFF
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)


def _broken(where: str, found: str) -> CallError:
    named = f"{where}: the protobuf message" if where else "the protobuf message"
    return CallError(
        f"{named} {found}", hint="send the bytes as the client made them, with their Content-Encoding", where=where
    )
