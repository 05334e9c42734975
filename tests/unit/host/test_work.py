"""Frames between a server and a host: they come back, and one that is too large harms nobody else's."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import CallError, LuthierError
from luthier.host import work
from luthier.host.bench import open_bench
from luthier.host.work import Done, Work, read_done, read_work, write_done, write_work

SMALL = Work(8, "optim_step", "m", {"learning_rate": 0.5}, b"body")


def run(act: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(act, 20))


async def read_all(sent: bytes, read: Any) -> list[Any]:
    reader = asyncio.StreamReader()
    reader.feed_data(sent)
    reader.feed_eof()
    found = []
    while (each := await read(reader)) is not None:
        found.append(each)
    return found


def test_frames_come_back() -> None:
    done = Done(3, {"metrics": {"a": 1.0}}, b"xyz")
    failed = Done(4, error=CallError("no", where="here").as_dict())
    assert run(read_all(write_work(SMALL) * 2, read_work)) == [SMALL, SMALL]
    assert run(read_all(write_done(done) + write_done(failed), read_done)) == [done, failed]
    assert run(read_all(write_work(SMALL)[:-1], read_work)) == []


@pytest.mark.parametrize("large", [Work(7, "sample", facts={"a": "x" * 3000}), Work(7, "sample", body=b"x" * 3000)])
@pytest.mark.parametrize("piece", [1000, 1 << 20])
def test_what_is_too_large_is_not_sent_and_where_it_comes_it_is_passed_over(
    large: Work, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = write_work(large)
    monkeypatch.setattr(work, "MOST_HEADER_BYTES", 2000)
    monkeypatch.setattr(work, "MOST_BODY_BYTES", 2000)
    monkeypatch.setattr(work, "_PIECE_BYTES", piece)
    with pytest.raises(CallError, match="takes 2,000"):
        write_work(large)
    refused, after = run(read_all(sent + write_work(SMALL), read_work))
    assert refused.id == 7
    assert refused.error["code"] == CallError.code
    assert after == SMALL


def test_a_result_that_is_too_large_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "MOST_BODY_BYTES", 2000)
    (told,) = run(read_all(write_done(Done(5, body=b"x" * 3000)), read_done))
    assert (told.id, told.body) == (5, b"")
    assert "2,000" in told.error["message"]


def test_a_bench_refuses_what_is_too_large_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (asked := await read_work(reader)) is not None:
            writer.write(write_done(Done(asked.id, body=b"done")))
        writer.close()

    async def act() -> None:
        async with await asyncio.start_unix_server(answer, tmp_path / "s"):
            bench = await open_bench(tmp_path / "s")
            with pytest.raises(LuthierError, match="at once") as raised:
                await bench.do("sample", prompt=[1] * 2000)
            assert raised.value.code == CallError.code
            assert bench.is_alive
            assert not bench.is_busy
            assert (await bench.do("sample", prompt=[1])).body == b"done"
            await bench.close()

    monkeypatch.setattr(work, "MOST_HEADER_BYTES", 2000)
    run(act())
