"""Whether the process answers, and whether it can do its work; the two routes that need no key."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request, Response

import luthier
from luthier.errors import LuthierError
from luthier.server.own_shapes import Health, Ready
from luthier.server.service import Service, service_of
from luthier.server.submit import has_room

router = APIRouter(tags=["health"])


@router.get("/health")
async def health() -> Health:
    """The process answers."""
    return Health(version=luthier.__version__)


@router.get("/ready", responses={503: {"model": Ready, "description": "Something is missing"}})
def ready(request: Request, response: Response) -> Ready:
    """The database takes writes, the disk has room, and a worker was seen lately."""
    found = check_ready(service_of(request))
    response.status_code = 200 if found.is_ready else 503
    return found


def check_ready(service: Service) -> Ready:
    """Each part by itself, so that the one that is missing can be told."""
    database = disk = worker = False
    try:
        disk = has_room(service)
        service.database.check_writable()
        database = True
        worker = service.settings.workers == 0 or _has_worker(service)
    except (LuthierError, OSError):
        pass
    is_ready = database and disk and worker and not service.is_draining
    return Ready(is_ready=is_ready, database=database, disk=disk, worker=worker)


def _has_worker(service: Service) -> bool:
    newest = max((each.seen_at for each in service.queue.list_workers()), default=0.0)
    return time.time() - newest < service.settings.timings.takeover
