"""The OpenAI dialect, under `/v1`: files, uploads, fine-tuning jobs and models, for the SDK as it is."""

from __future__ import annotations

from fastapi import APIRouter

from luthier.server.routes.openai import files, jobs, models, uploads

router = APIRouter()
for each in (files, uploads, jobs, models):
    router.include_router(each.router)
