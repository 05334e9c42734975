"""The live service of one server process: models that clients train step by step, and samples drawn from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.errors import LuthierError
from luthier.live.bases import Bases
from luthier.live.house import House
from luthier.live.limits import LiveSettings
from luthier.live.sampling import Samplers
from luthier.live.store import LiveStore
from luthier.server.problems import problem

if TYPE_CHECKING:
    from fastapi import Request

    from luthier.server.service import Service
    from luthier.server.settings import Settings


@dataclass
class Live:
    """What the routes of the Tinker dialect stand on. It belongs to the event loop."""

    store: LiveStore
    house: House
    samplers: Samplers

    def drain(self) -> None:
        """Asked to end: nobody waits any longer."""
        self.house.drain()
        self.samplers.drain()

    def sweep(self) -> None:
        """Drop results that are too old; at start and hourly."""
        self.house.log.forget(self.store.now() - self.house.settings.result_hours * 3600)

    async def close(self) -> None:
        """After the last answer."""
        self.samplers.close()
        await self.house.close()


def open_live(service: Service) -> Live:
    """Called inside the event loop; models for which commands wait go on at once."""
    settings = service.settings

    def check(base: str) -> None:
        if not settings.allows(base):
            raise problem(
                404,
                f"no base model `{base[:200]}` here",
                code="model_not_found",
                hint="`GET /api/v1/get_server_capabilities` lists them; `luthier serve --model DIR` offers another",
                param="base_model",
            )

    store = LiveStore(service.database, service.home)
    house = House(store, Bases(check), service.hosts, read_live_settings(settings))
    if settings.processes == 1:
        house.spawn(house.go_on())
    return Live(store, house, Samplers(house))


def read_live_settings(settings: Settings) -> LiveSettings:
    """What the settings of a server say of live models."""
    limits = settings.limits
    return LiveSettings(
        most_models=limits.live_models,
        most_waiting=limits.live_waiting,
        most_samples=limits.live_samples,
        most_open=limits.live_open,
        most_hosts=settings.hosts,
        snapshot_seconds=limits.live_snapshot_seconds,
        settle_seconds=limits.live_settle_seconds,
        idle_seconds=limits.live_idle_seconds,
    )


def live_of(request: Request) -> Live:
    """The live service; refused where several processes would each hold models of their own."""
    service: Service = request.app.state.service
    if service.settings.processes > 1:
        raise _not_with_processes()
    return service.live


def _not_with_processes() -> LuthierError:
    """A 400, since clients of this dialect ask again for minutes after any 5xx."""
    return problem(
        400,
        "models are not trained live by a server of several processes, since each would hold others",
        code="unsupported",
        hint="start it with --processes 1; one process serves many clients",
    )
