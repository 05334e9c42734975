"""What passes does not stay: a database or a process that was away fails no command, and no room waits for ever."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Coroutine
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from luthier.errors import CallError, DatabaseError, HostError, LuthierError, ModelError
from luthier.host.datums import LossRequest, write_loss_request
from luthier.host.place import Place
from luthier.jobs.ids import is_id
from luthier.live import works
from luthier.live.bases import Bases
from luthier.live.futures import Outcome
from luthier.live.log import REJECTED, CommandLog
from luthier.live.room import Room
from luthier.live.rows import NewModel, NewSession
from luthier.live.store import LiveStore
from luthier.live.works import CREATE, FORWARD_BACKWARD, LOAD, SAVE
from luthier.server.problems import status_of
from luthier.server.routes.tinker import futures, training
from tests.service.tinker.abacus import Abacus, Hall, Server, new_room, send


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.live.room._AGAIN_SECONDS", 0.01)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 20))


async def snapshot_at(room: Room, seq: int) -> None:
    """Until the newest snapshot is the one after this command."""
    while room.model.snapshot_seq != seq or room.is_used:
        await asyncio.sleep(0.001)
        await room.settle()


def fail_once(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    """The first call of one of the log's methods fails."""
    whole, failures = getattr(CommandLog, name), [error]

    def act(self: CommandLog, *arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return whole(self, *arguments)

    monkeypatch.setattr(CommandLog, name, act)


def test_a_database_that_is_away_for_a_moment_fails_no_command(
    store: LiveStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where a model is brought back, nor where the actor itself stumbles."""

    async def act() -> None:
        async with Server(store) as server:
            room = await new_room(server)
            await server.result(await send(room, 1, 3))
            await server.house.writer.idle()
            server.hall.now.die()
            fail_once(monkeypatch, "read_body", DatabaseError("the database was started again"))
            assert "metrics" in await server.result(await send(room, 2, None))
            whole, stumbles = room._snapshot_if_due, [RuntimeError("a bug")]

            async def stumble(*, anyway: bool = False) -> None:
                if stumbles:
                    raise stumbles.pop()
                await whole(anyway=anyway)

            monkeypatch.setattr(room, "_snapshot_if_due", stumble)
            second = await send(room, 4, None)
            first = await send(room, 3, 3)
            await server.result(first)
            assert "metrics" in await server.result(second)
            assert not stumbles

    run(act())


def test_a_suspect_that_waits_for_its_turn_holds_no_place(store: LiveStore) -> None:
    """Whoever has the turn may be waiting for just that place."""
    hall, deaths = Hall(), 0

    def dies(kind: str, body: bytes) -> None:
        nonlocal deaths
        if body == b"666" and deaths < 2:
            deaths += 1
            hall.now.die()

    hall.before = dies

    async def act() -> None:
        async with Server(store, hall, most_open=1, turn_seconds=1e9) as server:
            suspect = await new_room(server)
            async with server.house._suspects[suspect.base.place]:
                late = await send(suspect, 1, 666)
                while deaths < 2:
                    await asyncio.sleep(0)
                other = await new_room(server)
                await server.result(await send(other, 1, 3))
            await server.result(late)

    run(act())


def test_a_model_is_not_given_up_while_its_snapshot_is_written(store: LiveStore) -> None:
    async def act() -> None:
        async with Server(store) as server:
            room = await new_room(server)
            await server.result(await send(room, 1, 3))
            await server.result(await send(room, 2, None))
            await snapshot_at(room, 2)
            may_end = asyncio.Event()
            room._snapshot = asyncio.create_task(may_end.wait())  # type: ignore[arg-type]
            assert room.is_used
            leaving = asyncio.create_task(room.rest())
            for _ in range(20):
                await asyncio.sleep(0)
            assert room.is_open
            may_end.set()
            await leaving
            assert not room.is_open

    run(act())


def test_a_number_whose_result_is_forgotten_is_refused_and_nothing_waits_for_it(store: LiveStore) -> None:
    async def act() -> None:
        async with Server(store, snapshot_seconds=0.0) as server:
            room = await new_room(server)
            for seq, number in enumerate((3, None, 5, None), 1):
                await server.result(await send(room, seq, number))
            await snapshot_at(room, 4)
            assert server.house.log.forget(store.now() + 10)
            for seq, kind in ((0, CREATE), (2, "optim_step")):
                with pytest.raises(CallError, match="used up"):
                    await room.submit(seq, kind, {})
            assert not any(each.id == room.model.id for each in store.list_unfinished())

    run(act())


def test_the_number_that_all_wait_for_is_taken_whatever_the_quota(store: LiveStore) -> None:
    async def act() -> None:
        async with Server(store, most_waiting=2) as server:
            room = await new_room(server)
            late = [await send(room, seq, None) for seq in (2, 3)]
            await server.result(await send(room, 1, 3))
            assert all(["metrics" in await server.result(each) for each in late])

    run(act())


def test_a_room_that_was_closed_begins_nothing(store: LiveStore) -> None:
    async def act() -> None:
        async with Server(store) as server:
            room = await new_room(server)
            await server.result(await send(room, 1, 3))
            room.close()
            await room.submit(2, "optim_step", {"learning_rate": 0.1})
            assert not room.is_busy

    run(act())


def test_what_passes_is_not_told_as_the_end_of_a_command(store: LiveStore, monkeypatch: pytest.MonkeyPatch) -> None:
    async def act() -> None:
        async with Server(store) as server:
            room = await new_room(server)
            late = await send(room, 2, None)
            live: Any = SimpleNamespace(house=server.house)

            async def enter(project: str, model: str) -> Any:
                raise DatabaseError("the database is away")

            with monkeypatch.context() as patch:
                patch.setattr(server.house, "enter", enter)
                with pytest.raises(DatabaseError):
                    await futures._look_up(live, "default", late.request)
            promise = await futures._look_up(live, "default", late.request)
            assert promise is server.house.promises.find("default", late.request)
            room._promises.clear()
            promise.resolve(Outcome({"ended": "meanwhile"}))
            assert await futures._look_up(live, "default", late.request) is promise

    run(act())


def test_snapshots_that_a_crash_left_behind_go_when_the_model_comes_back(store: LiveStore) -> None:
    async def act() -> None:
        async with Server(store, snapshot_seconds=0.0) as server:
            room = await new_room(server)
            await server.result(await send(room, 1, 3))
            await server.result(await send(room, 2, None))
            await snapshot_at(room, 2)
            await server.die()
        folder = store.folder_of(room.model.id)
        for name in ("state_1", "state_9", "state_5.tmp-0a"):
            (folder / name).mkdir()
        async with Server(store) as server:
            await server.house.enter("default", room.model.id)
        assert [each.name for each in folder.iterdir()] == ["state_2"]

    run(act())


def test_a_client_that_never_steps_cannot_fill_the_disk(store: LiveStore) -> None:
    """Nor is kept what is never done again; a restart does not forget how much there is."""

    async def act() -> None:
        async with Server(store, gradient_bytes=10) as server:
            room = await new_room(server)
            await server.result(await room.submit(1, FORWARD_BACKWARD, {"forward_only": True}, b"1111111"))
            await server.result(await send(room, 2, -1))
            await server.result(await send(room, 3, 1111111))
            await server.house.writer.idle()
            log = server.house.log
            assert [log.read_body(room.model, seq) for seq in (1, 2, 3)] == [b"", b"", b"1111111"]
        async with Server(store, gradient_bytes=10) as server:
            room = await server.house.enter("default", room.model.id)
            refused = await server.result(await send(room, 4, 2222))
            assert refused["category"] == "user"
            assert "take a step" in refused["error"]
            await server.result(await send(room, 5, 333))
            await server.result(await send(room, 6, None))
            assert isinstance(await server.result(await send(room, 7, 2222)), int)

    run(act())


@pytest.fixture
def may_go_on(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Until it is set, every forward_backward is under way."""
    event, whole = asyncio.Event(), Abacus.do

    async def do(self: Abacus, kind: str, *arguments: Any, **facts: Any) -> Any:
        if kind == "forward_backward":
            await event.wait()
        return await whole(self, kind, *arguments, **facts)

    monkeypatch.setattr(Abacus, "do", do)
    return event


def test_a_model_with_gradients_makes_way_too(store: LiveStore, may_go_on: asyncio.Event) -> None:
    async def act() -> None:
        async with Server(store, most_open=1, turn_seconds=1e-6) as server:
            greedy = await new_room(server)
            for seq in range(1, 20):
                await send(greedy, seq, 3)
            other = await new_room(server)
            while not any(places._waiting for places in server.house._places.values()):
                await asyncio.sleep(0.001)
            may_go_on.set()
            assert await server.house.promises.wait(other._promises[0], 10)
            assert greedy._upto < 19

    run(act())


class Narrow(Hall):
    """Memory for one base model at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.base: Any = None

    async def bench(self, place: object) -> Abacus:
        if self.base not in (None, place):
            if self.now.models:
                raise HostError("1 base models are in memory and all of them are at work")
            self.now.die()
        self.base = place
        return await super().bench(place)

    def list_bases(self) -> list[Any]:
        return [] if self.base is None else [self.base]


def test_base_models_take_turns_where_there_are_more_than_hosts(
    store: LiveStore, monkeypatch: pytest.MonkeyPatch, may_go_on: asyncio.Event
) -> None:
    """Though the models of one never rest."""
    monkeypatch.setattr("luthier.live.house._PAUSE_SECONDS", 0.001)

    async def act() -> None:
        async with Server(store, Narrow(), most_hosts=1, turn_seconds=1e-6) as server:
            whole = server.house.bases.find("practice")
            find = {name: replace(whole, name=name, place=Place(name)) for name in ("one", "two")}.__getitem__
            monkeypatch.setattr(server.house.bases, "find", find)
            greedy = [await new_room(server, base="one") for _ in range(2)]
            late = [await send(room, seq, 3 if seq % 3 else None) for room in greedy for seq in range(1, 40)]
            other = await new_room(server, base="two")
            while not server.house._stays._leaving:
                await asyncio.sleep(0.001)
            may_go_on.set()
            assert await server.house.promises.wait(other._promises[0], 10)
            assert all(room._upto < 39 for room in greedy)
            for each in (late[38], late[-1]):
                await server.result(each)

    run(act())


def test_a_base_that_was_not_found_is_not_looked_for_at_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def find_nothing(name: str) -> Any:
        asked.append(name)
        raise ModelError("the hub does not know it")

    monkeypatch.setattr("luthier.live.bases.read_base", find_nothing)
    bases = Bases(lambda name: None)
    for name in ("a", "a", "b"):
        with pytest.raises(ModelError):
            bases.find(name)
    assert asked == ["a", "b"]
    monkeypatch.setattr("luthier.live.bases._FAILED_SECONDS", 0.0)
    bases = Bases(lambda name: None)
    for _ in range(2):
        with pytest.raises(ModelError):
            bases.find("c")
    assert asked[2:] == ["c", "c"]


def test_a_broken_checkpoint_is_told_by_its_path_alone(store: LiveStore) -> None:
    async def act() -> None:
        async with Server(store) as server:
            room = await new_room(server)
            path = (await server.result(await room.submit(1, SAVE, {"name": "a"})))["path"]
            folder = store.home / store.find_checkpoint("default", path).folder
            (folder / "beads.json").unlink()
            told = await server.result(await room.submit(2, LOAD, {"path": path, "optimizer": True}))
            assert told["error"].startswith(f"{path}: `beads.json` is missing")
            assert folder.name not in told["error"]

    run(act())


def test_a_save_that_is_done_again_after_a_crash_has_the_same_id(store: LiveStore) -> None:
    model = store.create_model(NewModel("default", store.create_session("default", NewSession()).id, 0, "p", 8, 1))
    assert works._checkpoint_id(model, 3) == works._checkpoint_id(model, 3) != works._checkpoint_id(model, 4)
    assert is_id(works._checkpoint_id(model, 3))


def test_a_request_that_cannot_be_read_uses_its_number_up(store: LiveStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is compressed or trips over a bug of ours, or nobody would ever do what its client sends next."""

    async def act() -> None:
        async with Server(store) as server:
            room = await new_room(server)

            async def send_broken(seq: int, **headers: str) -> int:
                body = write_loss_request(LossRequest(room.model.id, seq, (), "cross_entropy", {}, False))
                request = _request(server, gzip.compress(body) if headers else body, **headers)
                with pytest.raises(LuthierError) as raised:
                    await training.forward_backward(request, SimpleNamespace(project="default"))  # type: ignore[arg-type]
                return status_of(raised.value)

            assert await send_broken(1, **{"content-encoding": "gzip"}) == 415
            monkeypatch.setattr(training, "read_loss_request", lambda sent: int("a bug"))
            assert await send_broken(2) == 400
            for seq in (1, 2):
                assert room._commands[seq].state == REJECTED
            assert "metrics" in await server.result(await send(room, 3, None))

    run(act())


def _request(server: Server, sent: bytes, **headers: str) -> Any:
    async def body() -> bytes:
        return sent

    settings = SimpleNamespace(processes=1, limits=SimpleNamespace(live_bytes=1 << 20))
    service = SimpleNamespace(settings=settings, live=SimpleNamespace(house=server.house, store=server.house.store))
    app = SimpleNamespace(state=SimpleNamespace(service=service))
    return SimpleNamespace(app=app, body=body, headers={"content-type": training.PROTOBUF, **headers})
