"""A bench that computes with one number instead of a model, so that every order and every crash can be tried fast.

The number depends on each command and on their order, so a step that is lost, doubled or swapped shows.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.errors import CallError, HostError, NonFiniteError
from luthier.host.work import Done
from luthier.live.bases import Bases
from luthier.live.house import House
from luthier.live.limits import LiveSettings
from luthier.live.log import Command
from luthier.live.room import Room
from luthier.live.rows import NewModel, NewSession
from luthier.live.store import LiveStore
from luthier.live.works import CREATE, FORWARD_BACKWARD, OPTIM_STEP
from luthier.runs.manifest import check_manifest, seal

TOO_LARGE = 100.0
"""Steps of a larger learning rate are refused, and take the gradients with them."""
_MODULUS = 1_000_003


@dataclass
class Beads:
    """The number of one model, what its gradients have come to, and the steps that were taken."""

    value: int
    gradient: int = 0
    steps: int = 0


class Abacus:
    """One process: it dies when it is told to, and then knows nothing."""

    def __init__(self) -> None:
        self.models: dict[str, Beads] = {}
        self.done: list[tuple[str, str, bytes]] = []
        self.is_alive = True
        self.before: Callable[[str, bytes], None] = lambda kind, body: None
        self.may_answer = asyncio.Event()

    def die(self) -> None:
        self.is_alive = False
        self.models.clear()

    async def do(self, kind: str, model: str = "", *, body: bytes = b"", **facts: Any) -> Done:
        """As a host does it."""
        self.before(kind, body)
        await asyncio.sleep(0)
        if not self.is_alive:
            raise HostError("the process that held the model ended")
        self.done.append((kind, model, body))
        if kind == "sample":
            return await self._sample(facts)
        found = getattr(self, f"_{kind}")(model, body, facts)
        return Done(0, found if isinstance(found, dict) else {}, found if isinstance(found, bytes) else b"")

    def _open(self, model: str, body: bytes, facts: dict[str, Any]) -> None:
        self.models[model] = Beads(facts["seed"] % _MODULUS)
        if facts["folder"]:
            self._load(model, body, facts)

    def _forward_backward(self, model: str, body: bytes, facts: dict[str, Any]) -> bytes:
        beads, number = self.models[model], int(body)
        if number < 0:
            raise CallError("data: is negative")
        beads.gradient = (beads.gradient * 31 + number * 7 + beads.value) % _MODULUS
        return str(beads.gradient).encode()

    def _optim_step(self, model: str, body: bytes, facts: dict[str, Any]) -> dict[str, Any]:
        beads = self.models[model]
        if facts["learning_rate"] > TOO_LARGE:
            beads.gradient = 0
            raise NonFiniteError("the step was refused, the gradient dropped")
        beads.value = (beads.value * 17 + beads.gradient + round(facts["learning_rate"] * 1000)) % _MODULUS
        beads.gradient, beads.steps = 0, beads.steps + 1
        return {"metrics": {"value": float(beads.value), "optimizer_steps": float(beads.steps)}}

    def _save(self, model: str, body: bytes, facts: dict[str, Any]) -> dict[str, Any]:
        text = json.dumps({"value": self.models[model].value, "steps": self.models[model].steps})
        made = seal(Path(facts["folder"]), lambda draft: (draft / "beads.json").write_text(text) and None, {})
        return {"bytes": made.size_bytes}

    def _load(self, model: str, body: bytes, facts: dict[str, Any]) -> None:
        folder = Path(facts["folder"])
        check_manifest(folder)
        found = json.loads((folder / "beads.json").read_text())
        self.models[model] = Beads(found["value"], 0, found["steps"] if facts["optimizer"] else 0)

    async def _sample(self, facts: dict[str, Any]) -> Done:
        """Ends when it is let; a process that dies meanwhile tells nothing."""
        await self.may_answer.wait()
        if not self.is_alive:
            raise HostError("the process that held the model ended")
        return Done(0, {}, str(facts["seed"]).encode())

    def _drop(self, model: str, body: bytes, facts: dict[str, Any]) -> None:
        self.models.pop(model, None)


@dataclass
class Hall:
    """Processes, one at a time, each started when the one before has died."""

    started: list[Abacus] = field(default_factory=list)
    before: Callable[[str, bytes], None] = lambda kind, body: None

    async def bench(self, place: object) -> Abacus:
        if not self.started or not self.started[-1].is_alive:
            self.started.append(Abacus())
            self.started[-1].before = lambda kind, body: self.before(kind, body)
        return self.started[-1]

    def list_bases(self) -> list[Any]:
        return []

    @property
    def now(self) -> Abacus:
        return self.started[-1]


class Server:
    """Rooms over a store that outlives them."""

    def __init__(self, store: LiveStore, hall: Hall | None = None, **settings: Any) -> None:
        self.hall = hall or Hall()
        self.house = House(store, Bases(lambda name: None), self.hall, LiveSettings(**settings))

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.house.close()

    async def die(self) -> None:
        """As kill -9 ends a server: what its threads have begun to write is written or not, and nothing follows."""
        for room in self.house._rooms.values():
            room.close()
        for task in list(self.house._tasks):
            task.cancel()
        if self.house.writer._task:
            self.house.writer._task.cancel()
        await asyncio.sleep(0)
        self.house._threads.shutdown(wait=True, cancel_futures=True)
        if self.hall.started:
            self.hall.now.die()

    async def result(self, command: Command) -> Any:
        """What came of a command, in memory or in the log."""
        promise = self.house.promises.find("default", command.request)
        if promise is not None:
            outcome = await self.house.promises.wait(promise, 10)
        else:
            found = await self.house.run(self.house.log.find, "default", command.request)
            outcome = found[2]
        assert outcome is not None, f"seq_id {command.seq} has no result"
        return outcome.answer if outcome.body is None else int(outcome.body)


async def new_room(server: Server, number: int = 0, *, base: str = "practice") -> Room:
    """A new model in a new session, created."""
    store = server.house.store
    session = store.create_session("default", NewSession())
    model = store.create_model(NewModel("default", session.id, number, base, 8, seed=7))
    room = await server.house.enter("default", model.id)
    await room.submit(0, CREATE, {})
    return room


async def send(room: Room, seq: int, number: int | None) -> Command:
    """A forward_backward with a number, or an optimizer step."""
    if number is None:
        return await room.submit(seq, OPTIM_STEP, {"learning_rate": 0.001 * seq})
    return await room.submit(seq, FORWARD_BACKWARD, {}, str(number).encode())
