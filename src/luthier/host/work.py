"""What a host is asked to do for models in training and for samples of tokens, and how both sides frame it.

One connection carries many works at a time: a frame is the length of its header (4 bytes), the header as JSON, the
length of its body (8 bytes) and the body as it is. The first byte of a header's length is zero, so that a host can
tell such a connection from one that asks for an answer in JSON.
"""

from __future__ import annotations

import asyncio
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from luthier.errors import CallError, LuthierError

MOST_HEADER_BYTES = 1 << 24
MOST_BODY_BYTES = 1 << 31
KINDS = ("open", "forward_backward", "optim_step", "save", "load", "drop", "sample", "cancel")
_HEADER, _BODY = struct.Struct(">I"), struct.Struct(">Q")
_NUMBER = re.compile(rb'\{"id":(\d{1,19})[,}]')
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Work:
    """One thing that is asked: its kind, the model that it is for, and what its kind needs."""

    id: int
    kind: str
    model: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True)
class Done:
    """What became of a work; a failed one has an error and nothing else, and changed nothing."""

    id: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    body: bytes = b""
    error: Mapping[str, Any] | None = None


def write_work(work: Work) -> bytes:
    """A work as a frame; raises CallError where it is larger than the other side takes."""
    return _frame({"id": work.id, "kind": work.kind, "model": work.model, "facts": dict(work.facts)}, work.body)


def write_done(done: Done) -> bytes:
    """A result as a frame; one that is too large is told as an error."""
    error = None if done.error is None else dict(done.error)
    try:
        return _frame({"id": done.id, "facts": dict(done.facts), "error": error}, done.body)
    except CallError as too_large:
        return write_done(Done(done.id, error=too_large.as_dict()))


async def read_work(reader: asyncio.StreamReader, begun: bytes = b"") -> Work | Done | None:
    """The next work, or None where the other side is gone; `begun` are bytes that were read already.

    Of one that is too large nothing is kept, and what it comes to is returned, for those of others go on.
    """
    found = await _read_frame(reader, begun)
    if found is None:
        return None
    return Done(**found[0]) if "error" in found[0] else Work(**found[0], body=found[1])


async def read_done(reader: asyncio.StreamReader) -> Done | None:
    """The next result, or None where the other side is gone."""
    found = await _read_frame(reader, b"")
    return None if found is None else Done(**found[0], body=found[1])


def raised(facts: object) -> LuthierError:
    """An error that was told, with its own code."""
    told = facts if isinstance(facts, dict) else {}
    error = LuthierError(
        str(told.get("message", "")),
        hint=str(told.get("hint", "")),
        where=str(told.get("where", "")),
        details=told.get("details"),
    )
    error.code = str(told.get("code", LuthierError.code))
    return error


def _frame(header: Mapping[str, Any], body: bytes) -> bytes:
    encoded = orjson.dumps(header)
    if error := _find_excess(len(encoded), len(body)):
        raise error
    return b"".join((_HEADER.pack(len(encoded)), encoded, _BODY.pack(len(body)), body))


async def _read_frame(reader: asyncio.StreamReader, begun: bytes) -> tuple[dict[str, Any], bytes] | None:
    """Its header and body; of one that is too large a header of its number and an error."""
    try:
        begun += await reader.readexactly(_HEADER.size - len(begun))
        (in_header,) = _HEADER.unpack(begun)
        encoded = await _read_up_to(reader, in_header, MOST_HEADER_BYTES)
        (in_body,) = _BODY.unpack(await reader.readexactly(_BODY.size))
        body = await _read_up_to(reader, in_body, MOST_BODY_BYTES)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    if error := _find_excess(in_header, in_body):
        number = _NUMBER.match(encoded)
        return {"id": int(number[1]) if number else 0, "error": error.as_dict()}, b""
    return orjson.loads(encoded), body


async def _read_up_to(reader: asyncio.StreamReader, size: int, most: int) -> bytes:
    """All of it, or only its beginning where it is too much; what follows is read past."""
    if size <= most:
        return await reader.readexactly(size)
    begun = await reader.readexactly(min(size, _PIECE_BYTES))
    for start in range(len(begun), size, _PIECE_BYTES):
        await reader.readexactly(min(_PIECE_BYTES, size - start))
    return begun


def _find_excess(in_header: int, in_body: int) -> CallError | None:
    """What is wrong with a frame that is too large."""
    for what, size, most in (("facts", in_header, MOST_HEADER_BYTES), ("body", in_body, MOST_BODY_BYTES)):
        if size > most:
            found = f"{size:,} bytes of {what} at once; the connection to a model's process takes {most:,}"
            return CallError(found, hint="send less at once")
    return None
