"""The Synth dialect, under `/api` and `/api/v1`: files, jobs and models, for the `synth-ai` clients as they are."""

from __future__ import annotations

from fastapi import APIRouter

from luthier.server.routes.learning import files, jobs, models

router = APIRouter()
for each in (files, jobs, models):
    router.include_router(each.router)
