"""The application: every dialect's routes over one service, behind one guard."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.openapi.utils import get_openapi

import luthier
from luthier.errors import LuthierError
from luthier.live.retention import sweep as sweep_live
from luthier.server.guard import Guard
from luthier.server.own_shapes import Problem
from luthier.server.problems import answers, dialect_of, register_problems
from luthier.spec.run import RunSpec

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from luthier.server.service import Service

log = logging.getLogger("luthier.server")

OWN = "/luthier/v1"
ROUTES = (
    ("luthier.server.routes.health", OWN),
    ("luthier.server.routes.own", OWN),
    ("luthier.server.routes.own_files", OWN),
    ("luthier.server.routes.own_admin", OWN),
    ("luthier.server.routes.openai.every", "/v1"),
    ("luthier.server.routes.tinker.every", "/api/v1"),
    ("luthier.server.routes.learning.every", "/api"),
    ("luthier.server.routes.learning.every", "/api/v1"),
    ("luthier.server.routes.chat", "/v1"),
    ("luthier.server.routes.chat", "/api/inference/v1"),
    ("luthier.server.routes.chat", "/api/v1"),
)
_SWEEP_SECONDS = 3600.0
_KEYED = (401, 429)
_EVERY = (400, 403, 414, 421, 503)
"""What any route may answer besides what it says itself."""
_SCHEMAS = "#/components/schemas/"
_VERBS = ("get", "head", "post", "put", "patch", "delete")


def create_app(service: Service) -> ASGIApp:
    """The application with its guard around it; `app.state.service` is the service."""
    return Guard(create_routes(service), service)


def create_routes(service: Service) -> FastAPI:
    """The application without its guard."""
    app = FastAPI(
        title="Luthier",
        version=luthier.__version__,
        summary="Fine-tuning jobs on a server of one's own",
        openapi_url=f"{OWN}/openapi.json",
        docs_url=None,  # the pages of FastAPI load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
        responses=answers(*_EVERY),
    )
    app.state.service = service
    for module, prefix in ROUTES:
        app.include_router(importlib.import_module(module).router, prefix=prefix)
    register_problems(app)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    service.open_hosts()
    await run_in_threadpool(service.checks.schedule_left)
    sweeping = asyncio.create_task(_sweep(service))
    try:
        yield
    finally:
        sweeping.cancel()
        with suppress(asyncio.CancelledError):
            await sweeping
        await service.close()


async def _sweep(service: Service) -> None:
    """Finish at start, and every hour, what a crash cut short, and drop what is too old."""
    while True:
        try:
            await run_in_threadpool(service.jobs.sweep)
            await run_in_threadpool(service.files.sweep)
            await run_in_threadpool(service.live.sweep)
            await run_in_threadpool(sweep_live, service.live.store)
        except LuthierError as error:
            log.warning("sweeping failed: %s", error.message)
        except Exception:  # the edge of this task: the next hour tries again
            log.exception("sweeping failed")
        await asyncio.sleep(_SWEEP_SECONDS)


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document: every failure of every route, in the shape of its dialect."""
    if app.openapi_schema is None:
        made = get_openapi(
            title=app.title, version=app.version, summary=app.summary, routes=app.routes, openapi_version="3.1.0"
        )
        schemas = made.setdefault("components", {}).setdefault("schemas", {})
        _add_shapes(schemas)
        for path, item in made["paths"].items():
            for verb in _VERBS:
                if verb in item:
                    _name_body(item[verb], schemas)
                    _add_failures(path, item[verb])
        app.openapi_schema = made
    return app.openapi_schema


def _add_shapes(schemas: dict[str, Any]) -> None:
    reference = _SCHEMAS + "{model}"
    for shape in (Problem, RunSpec):
        made = shape.model_json_schema(ref_template=reference)
        schemas.update(made.pop("$defs", {}))
        schemas[shape.__name__] = made
    if "NewRun" in schemas:
        schemas["NewRun"]["properties"]["spec"] = {"$ref": "#/components/schemas/RunSpec"}
    inner = {
        "type": "object",
        "required": ["message", "type", "param", "code"],
        "properties": {
            "message": {"type": "string"},
            "type": {"type": "string"},
            "param": {"type": ["string", "null"]},
            "code": {"type": ["string", "null"]},
        },
    }
    schemas["OpenAIProblem"] = {"type": "object", "required": ["error"], "properties": {"error": inner}}
    plain = {name: {"type": "string"} for name in ("detail", "code", "message")}
    schemas["SynthProblem"] = {
        "type": "object",
        "required": ["error", *plain],
        "properties": {"error": inner, **plain},
    }
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)


def _name_body(operation: dict[str, Any], schemas: dict[str, Any]) -> None:
    """A body whose route reads it itself stands in the operation whole; it goes where all others are, under its name.

    The shapes inside it do too: a reference into the body itself leads nowhere in this document.
    """
    given = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    whole = given.get("schema", {})
    if "title" not in whole:
        return
    text = json.dumps(whole).replace("#/$defs/", _SCHEMAS)
    shape = json.loads(text)
    for name, inner in {**shape.pop("$defs", {}), shape["title"]: shape}.items():
        assert schemas.setdefault(name, inner) == inner, f"two shapes are called {name}"
    given["schema"] = {"$ref": _SCHEMAS + shape["title"]}


def _add_failures(path: str, operation: dict[str, Any]) -> None:
    shape = {"own": "Problem", "openai": "OpenAIProblem", "synth": "SynthProblem"}[dialect_of(path)]
    schema = {"$ref": _SCHEMAS + shape}
    statuses = {*_EVERY, *(_KEYED if operation.get("security") else ())}
    if "parameters" in operation or "requestBody" in operation:
        statuses.add(422)
    if "requestBody" in operation:
        statuses |= {413, 415}
    responses = operation["responses"]
    added = answers(*statuses)
    for status, made in added.items():
        responses.setdefault(str(status), made)
    for status, made in responses.items():
        if status.isdigit() and int(status) >= 400 and not _has_own_shape(made):
            made["content"] = {"application/json": {"schema": schema}}
    operation["responses"] = dict(sorted(responses.items()))


def _has_own_shape(response: dict[str, Any]) -> bool:
    schema = response.get("content", {}).get("application/json", {}).get("schema", {})
    name = schema.get("$ref", "").rpartition("/")[2]
    return bool(schema) and name not in ("Problem", "HTTPValidationError", "OpenAIProblem", "SynthProblem")
