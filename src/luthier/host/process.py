"""The process of one base model: a Unix socket of which a connection asks for one answer, or is a bench for works.

It is started by a server with its standard input as a leash: when that closes, the process ends.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from contextlib import suppress
from pathlib import Path

from luthier.errors import LuthierError
from luthier.host.ask import Said, read_ask
from luthier.host.room import Room, open_room
from luthier.host.work import Done, read_work, write_done

_MOST_LINE_BYTES = 16 << 20


def main(arguments: list[str]) -> None:
    """Load the model, then answer until the leash is let go."""
    parser = argparse.ArgumentParser(prog="luthier.host.process")
    parser.add_argument("--model", required=True)
    parser.add_argument("--socket", required=True, type=Path)
    parser.add_argument("--nf4", choices=["plain", "double"], help="hold the base in the values of NF4")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    wanted = parser.parse_args(arguments)
    try:
        room = _load(wanted)
    except LuthierError as error:
        print_ready(error)
        return
    try:
        asyncio.run(_serve(room, wanted.socket))
    finally:
        with suppress(FileNotFoundError):
            wanted.socket.unlink()


def _load(wanted: argparse.Namespace) -> Room:
    from luthier.engines.surroundings import prepare_process
    from luthier.runs.resolve import AdapterRef, find_resolved

    prepare_process()
    resolved = find_resolved(wanted.model, with_weights=True)
    over = AdapterRef(Path(), quantised=True, double_quant=wanted.nf4 == "double") if wanted.nf4 else None
    return open_room(resolved, over=over, precision=wanted.precision)


def print_ready(error: LuthierError | None = None) -> None:
    """Tell whoever started the process, in one line, that it answers now, or why it does not."""
    line = Said(error=error.as_dict() if error else None).encode()
    with suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), line)


async def _serve(room: Room, socket: Path) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            # A question is a line of JSON; the length of a work's header begins with a zero.
            begun = await reader.read(1)
            if begun == b"{":
                await _answer(room, begun + await reader.readline(), reader, writer)
            elif begun:
                await _work(room, begun, reader, writer)
        writer.close()

    old = os.umask(0o177)
    server = await asyncio.start_unix_server(connected, socket, limit=_MOST_LINE_BYTES)
    os.umask(old)
    print_ready()
    async with server:
        await _leash_is_let_go()
    room.close()


async def _leash_is_let_go() -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while await reader.read(1024):
        pass


async def _work(room: Room, begun: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Works of one connection are handed on in their order; what became of each is told when it is done."""
    loop = asyncio.get_running_loop()
    results: asyncio.Queue[Done] = asyncio.Queue()

    def hear(done: Done) -> None:
        with suppress(RuntimeError):  # the process ends
            loop.call_soon_threadsafe(results.put_nowait, done)

    async def tell() -> None:
        while True:
            writer.write(write_done(await results.get()))
            await writer.drain()

    telling = asyncio.create_task(tell())
    opened: set[str] = set()
    try:
        while (work := await read_work(reader, begun)) is not None:
            begun = b""
            if isinstance(work, Done):
                hear(work)
                continue
            if work.kind == "open":
                opened.add(work.model)
            await asyncio.to_thread(room.submit, work, hear)
    finally:
        telling.cancel()
        room.leave(hear, opened)


async def _answer(room: Room, line: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    loop = asyncio.get_running_loop()
    parts: asyncio.Queue[Said] = asyncio.Queue()

    def hear(said: Said) -> None:
        loop.call_soon_threadsafe(parts.put_nowait, said)

    try:
        answer = await asyncio.to_thread(room.ask, read_ask(line), hear)
    except LuthierError as error:
        writer.write(Said(error=error.as_dict()).encode())
        await writer.drain()
        return
    gone = asyncio.ensure_future(reader.read(1))
    try:
        while True:
            part = asyncio.ensure_future(parts.get())
            await asyncio.wait({part, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not part.done():
                part.cancel()
                return
            said = part.result()
            writer.write(said.encode())
            await writer.drain()
            if said.finish or said.error:
                return
    finally:
        gone.cancel()
        answer.is_cancelled = True


if __name__ == "__main__":
    main(sys.argv[1:])
