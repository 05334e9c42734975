"""The Tinker dialect, under `/api/v1`: the `tinker` SDK and its command line as they are, from 0.11 to 0.38."""

from __future__ import annotations

from fastapi import APIRouter

from luthier.server.routes.tinker import checkpoints, downloads, futures, runs, sampling, service, sessions, training

router = APIRouter()
for each in (service, sessions, training, sampling, futures, runs, checkpoints, downloads):
    router.include_router(each.router)
