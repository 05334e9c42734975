"""Commands are done in the order of their numbers, once each, whatever order they came in and whatever dies."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import CallError, ConflictError, DatabaseError, NotFoundError, QuotaError
from luthier.jobs.database import Database
from luthier.live.log import Command
from luthier.live.room import Room
from luthier.live.rows import NewModel, NewSession
from luthier.live.store import LiveStore
from luthier.live.works import CREATE, FORWARD_BACKWARD, LOAD, LOAD_NEW, OPTIM_STEP, SAVE, SAVE_SAMPLER
from tests.service.postgres import PostgresServer
from tests.service.tinker.abacus import TOO_LARGE, Hall, Server, new_room, send

NUMBERS = [3, 5, None, 8, 13, None, 21, None]
"""Two chunks and a step, twice, and one chunk and a step."""


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 30))


async def send_all(room: Room, order: list[int], numbers: list[int | None] | None = None) -> dict[int, Command]:
    numbers = numbers or NUMBERS
    return {seq: await send(room, seq, numbers[seq - 1]) for seq in order}


async def results_of(server: Server, sent: dict[int, Command]) -> list[Any]:
    return [await server.result(sent[seq]) for seq in sorted(sent)]


async def undisturbed(store: LiveStore, numbers: list[int | None] | None = None) -> list[Any]:
    async with Server(store) as server:
        room = await new_room(server)
        sent = await send_all(room, list(range(1, 1 + len(numbers or NUMBERS))), numbers)
        return await results_of(server, sent)


@pytest.fixture(scope="module")
def expected(store: LiveStore) -> list[Any]:
    return run(undisturbed(store))  # type: ignore[no-any-return]


@given(order=st.permutations(range(1, 9)), again=st.lists(st.integers(1, 8), max_size=4))
def test_any_order_and_any_repetition_gives_the_same(
    store: LiveStore, expected: list[Any], order: list[int], again: list[int]
) -> None:
    async def act() -> None:
        async with Server(store) as server:
            room = await new_room(server)
            sent = await send_all(room, order)
            repeated = await send_all(room, again)
            assert all(repeated[seq].request == sent[seq].request for seq in again)
            assert await results_of(server, sent) == expected
            done = [body for kind, _, body in server.hall.now.done if kind == "forward_backward"]
            assert done == [str(number).encode() for number in NUMBERS if number is not None]

    run(act())


@given(
    deaths=st.lists(st.integers(0, 7), max_size=4, unique=True),
    restarts=st.lists(st.integers(1, 7), max_size=3, unique=True),
    snapshots=st.booleans(),
)
def test_neither_a_dead_host_nor_a_dead_server_loses_or_doubles_anything(
    store: LiveStore, expected: list[Any], deaths: list[int], restarts: list[int], snapshots: bool
) -> None:
    """The host dies when it is asked for its n-th command; the server is forgotten after the n-th was acknowledged."""
    hall, asked = Hall(), 0

    def dies(kind: str, body: bytes) -> None:
        nonlocal asked
        if kind in ("forward_backward", "optim_step"):
            asked += 1
            if asked - 1 in deaths:
                hall.now.die()

    hall.before = dies
    settings = {"snapshot_seconds": 0.0} if snapshots else {}

    async def act() -> None:
        server = Server(store, hall, **settings)
        room = await new_room(server)
        model, sent = room.model.id, {}
        for seq in range(1, 9):
            sent[seq] = await send(room, seq, NUMBERS[seq - 1])
            if seq in restarts:
                await server.die()
                server = Server(store, hall, **settings)
                room = await server.house.enter("default", model)
                for known in (1, seq):  # a client that did not hear of it sends it again
                    assert (await send(room, known, NUMBERS[known - 1])).request == sent[known].request
        assert await results_of(server, sent) == expected
        await server.house.close()

    run(act())


@pytest.mark.slow
def test_the_same_on_postgresql_which_is_killed_meanwhile(tmp_path: Path, expected: list[Any]) -> None:
    """Commands that were acknowledged wait until it is there again; who sends one meanwhile is told to ask again."""
    postgres = PostgresServer()
    try:
        postgres.start()
        database = Database(postgres.url(), patience=2)
        database.migrate()

        async def act() -> None:
            async with Server(LiveStore(database, tmp_path), snapshot_seconds=0.0) as server:
                room = await new_room(server)
                sent = await send_all(room, [8, 7, 6, 5, 4])
                await asyncio.to_thread(postgres.kill)
                with pytest.raises(DatabaseError):
                    await send(room, 1, NUMBERS[0])
                await asyncio.to_thread(postgres.start)
                sent |= await send_all(room, [1, 2, 3])
                assert await results_of(server, sent) == expected
                await server.house.writer.idle()

        run(act())
        database.close()
    finally:
        postgres.remove()


def test_a_number_that_was_refused_is_used_up(store: LiveStore, expected: list[Any]) -> None:
    async def act() -> None:
        async with Server(store) as server:
            room = await new_room(server)
            first = await send(room, 1, 3)
            await room.reject(2, FORWARD_BACKWARD, CallError("data: is empty"))
            assert (await server.result(first)) == expected[0]
            assert "metrics" in await server.result(await send(room, 3, None))
            with pytest.raises(CallError, match="was refused before"):
                await send(room, 2, 5)
        async with Server(store) as server:
            room = await server.house.enter("default", room.model.id)
            assert "metrics" in await server.result(await send(room, 4, None))

    run(act())


def test_a_gap_is_awaited_and_named(store: LiveStore) -> None:
    async def act() -> None:
        async with Server(store) as server:
            room = await new_room(server)
            late = await send(room, 2, None)
            promise = server.house.promises.find("default", late.request)
            assert promise
            assert await server.house.promises.wait(promise, 0.05) is None
            assert promise.queue_state.reason == "waiting for seq_id 1"
            await send(room, 1, 3)
            assert "metrics" in await server.result(late)

    run(act())


def test_failed_work_is_a_result_and_not_done_again(store: LiveStore) -> None:
    numbers = [3, -1, None, 4, None]

    async def act() -> list[Any]:
        async with Server(store) as server:
            room = await new_room(server)
            sent = await send_all(room, [1, 2, 3], numbers)
            assert (await server.result(sent[2]))["category"] == "user"
            await server.result(sent[3])
            server.hall.now.die()
            sent |= await send_all(room, [4, 5], numbers)
            found = await results_of(server, sent)
            tried = [body for kind, _, body in server.hall.now.done if kind == "forward_backward"]
            assert tried == [b"3", b"4"]
            return found

    assert run(act()) == run(undisturbed(store, numbers))


def test_a_step_that_was_refused_takes_the_gradients_with_it_after_a_crash_too(store: LiveStore) -> None:
    async def act(*, dies: bool) -> list[Any]:
        async with Server(store) as server:
            room = await new_room(server)
            sent = await send_all(room, [1, 2])
            sent[3] = await room.submit(3, OPTIM_STEP, {"learning_rate": 2 * TOO_LARGE})
            assert (await server.result(sent[3]))["category"] == "user"
            if dies:
                server.hall.now.die()
            sent |= await send_all(room, [4, 5, 6])
            found = await results_of(server, sent)
            if dies:
                done = [body for kind, _, body in server.hall.now.done if kind == FORWARD_BACKWARD]
                assert done == [str(number).encode() for number in NUMBERS[3:6] if number is not None]
                assert len(server.hall.now.done) == 4, "it is opened, and nothing that was dropped is asked for again"
            return found

    assert run(act(dies=True)) == run(act(dies=False))


def test_what_kills_every_process_fails_alone(store: LiveStore) -> None:
    """Commands of others that were under way each time go on."""
    hall = Hall()

    def dies(kind: str, body: bytes) -> None:
        if body == b"666":
            hall.now.die()

    hall.before = dies

    async def act() -> None:
        async with Server(store, hall) as server:
            rooms = [await new_room(server) for _ in range(3)]
            bad = await send(rooms[0], 1, 666)
            good = [await send(room, 1, 3) for room in rooms[1:]]
            assert "ended 5 times" in (await server.result(bad))["error"]
            assert [await server.result(each) for each in good] == [await server.result(good[0])] * 2
            assert "metrics" in await server.result(await send(rooms[0], 2, None))

    run(act())


def test_models_take_turns_in_a_memory_that_is_too_small(store: LiveStore, expected: list[Any]) -> None:
    """Three models share one place; none of them notices."""

    async def act() -> None:
        async with Server(store, most_open=1, turn_seconds=0.0) as server:
            rooms = [await new_room(server) for _ in range(3)]
            sent: list[dict[int, Command]] = [{}, {}, {}]
            for seq in range(1, 9):
                for room, mine in zip(rooms, sent, strict=True):
                    mine[seq] = await send(room, seq, NUMBERS[seq - 1])
            for mine in sent:
                assert await results_of(server, mine) == expected
            assert len(server.hall.now.models) <= 1
            assert sum(kind == "drop" for kind, _, _ in server.hall.now.done) >= 2

    run(act())


def test_an_idle_model_leaves_the_memory_and_comes_back(store: LiveStore, expected: list[Any]) -> None:
    async def act() -> None:
        async with Server(store, settle_seconds=0.0, idle_seconds=0.0) as server:
            room = await new_room(server)
            sent = await send_all(room, [1, 2, 3])
            await results_of(server, sent)
            while room.is_open:
                await asyncio.sleep(0.005)
            assert not server.hall.now.models
            sent |= await send_all(await server.house.enter("default", room.model.id), [4, 5, 6, 7, 8])
            assert await results_of(server, sent) == expected

    run(act())


def test_who_still_knows_a_room_that_was_given_up_reaches_the_one_that_stands_for_it(
    store: LiveStore, expected: list[Any]
) -> None:
    async def act() -> None:
        async with Server(store, settle_seconds=0.0, idle_seconds=0.0) as server:
            room = await new_room(server)
            sent = await send_all(room, [1, 2, 3])
            await results_of(server, sent)
            while not room.is_retired:
                await asyncio.sleep(0.005)
            other = await server.house.enter("default", room.model.id)
            assert other is not room
            for seq in range(4, 9):
                sent[seq] = await send(room if seq % 2 else other, seq, NUMBERS[seq - 1])
            assert await results_of(server, sent) == expected

    run(act())


def test_loads_and_saves_are_done_once_and_rebuilt_from(store: LiveStore) -> None:
    """The load is done again from where it led, though the checkpoint has been replaced since."""

    async def act() -> None:
        async with Server(store, snapshot_seconds=1e9) as server:
            room = await new_room(server)
            await send_all(room, [1, 2, 3])
            path = f"tinker://{room.model.id}/weights/a"
            assert (await server.result(await room.submit(4, SAVE, {"name": "a"})))["path"] == path
            assert (await server.result(await room.submit(5, SAVE, {"name": "a"})))["category"] == "user"
            await send(room, 6, 9)
            await room.submit(7, LOAD, {"path": path, "optimizer": True})
            loaded = await server.result(await send(room, 8, 4))
            saved = await room.submit(9, SAVE, {"name": "a", "overwrite": True})
            await server.result(saved)
            server.hall.now.die()
            again = await server.result(await send(room, 10, 4))
            assert again != loaded
            for optimizer in (True, False):
                twin = await new_twin(server, room, path, optimizer=optimizer)
                told = await server.result(await twin.submit(1, OPTIM_STEP, {"learning_rate": 1.0}))
                assert told["metrics"]["optimizer_steps"] == (2 if optimizer else 1)

    run(act())


async def new_twin(server: Server, room: Room, path: str, *, optimizer: bool) -> Room:
    """A model made from a checkpoint of another."""
    found = server.house.store.find_checkpoint("default", path)
    made = NewModel(
        "default",
        room.model.session,
        1 + optimizer,
        "practice",
        8,
        1,
        origin=path,
        origin_folder=found.folder,
        origin_optimizer=optimizer,
    )
    model = server.house.store.create_model(made)
    twin = await server.house.enter("default", model.id)
    assert (await server.result(await twin.submit(0, LOAD_NEW, {})))["path"] == path
    return twin


def test_one_number_of_a_sampler_draws_from_one_thing(store: LiveStore) -> None:
    async def act() -> None:
        async with Server(store) as server:
            room = await new_room(server)
            sampler = f"{room.model.session}:sample:4"
            facts = {"name": None, "sampling_session_seq_id": 4, "kind": "inflight"}
            made = await server.result(await room.submit(1, SAVE_SAMPLER, facts))
            assert made["sampling_session_id"] == sampler
            before = server.house.store.find_sampler("default", sampler).folder
            await server.result(await room.submit(2, SAVE_SAMPLER, facts | {"sampling_session_seq_id": 5}))
            after = server.house.store.find_sampler("default", sampler).folder
            assert after != before, "an inflight sampler follows its model"
            with pytest.raises(NotFoundError):
                server.house.store.find_sampler("other", sampler)
            with pytest.raises(ConflictError):
                await server.house.run(server.house.store.create_sampler, _other(server, sampler))

    run(act())


def _other(server: Server, sampler: str) -> Any:
    from dataclasses import replace

    return replace(server.house.store.find_sampler("default", sampler), model=None, folder=None)


def test_limits_count_what_waits(store: LiveStore) -> None:
    async def act() -> None:
        async with Server(store, most_waiting=3) as server:
            room = await new_room(server)
            await server.result(await send(room, 1, 3))
            for seq in (3, 4, 5):
                await send(room, seq, 3)
            with pytest.raises(QuotaError):
                await send(room, 6, 3)
            await send(room, 4, 3)  # a repetition is no request more
        session = store.create_session("default", NewSession())
        store.create_model(NewModel("default", session.id, 0, "practice", 8, 1), most=None)
        with pytest.raises(QuotaError):
            store.create_model(NewModel("default", session.id, 1, "practice", 8, 1), most=1)

    run(act())


def test_nobody_sees_what_another_project_does(store: LiveStore) -> None:
    async def act() -> None:
        async with Server(store) as server:
            room = await new_room(server)
            command = await send(room, 1, 3)
            with pytest.raises(NotFoundError):
                await server.house.enter("other", room.model.id)
            assert server.house.promises.find("other", command.request) is None
            assert server.house.log.find("other", command.request) is None

    run(act())


def test_a_model_that_could_not_be_made_says_so_ever_after(store: LiveStore) -> None:
    async def act() -> None:
        hall = Hall()

        def refuse(kind: str, body: bytes) -> None:
            if kind == "open":
                raise CallError("rank: is too large for this base")

        hall.before = refuse
        async with Server(store, hall) as server:
            session = store.create_session("default", NewSession())
            model = store.create_model(NewModel("default", session.id, 0, "practice", 8, 1))
            room = await server.house.enter("default", model.id)
            made = await server.result(await room.submit(0, CREATE, {}))
            assert made == {"error": "rank: is too large for this base", "category": "user"}
            told = await server.result(await send(room, 1, 3))
            assert "could not be made" in told["error"]

    run(act())


def test_results_are_found_in_the_log_after_a_restart(store: LiveStore, expected: list[Any], tmp_path: Path) -> None:
    async def act() -> None:
        async with Server(store) as server:
            room = await new_room(server)
            sent = await send_all(room, list(range(1, 9)))
            await results_of(server, sent)
        async with Server(store) as server:
            assert await results_of(server, sent) == expected
            assert not server.hall.started, "nothing has to be computed for that"

    run(act())
