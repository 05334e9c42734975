"""Errors over HTTP: one status for each code, and the shape of the dialect whose path was called."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import orjson
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from luthier.errors import LuthierError

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

log = logging.getLogger("luthier.server")

STATUS = {
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "conflict": 409,
    "stale_attempt": 409,
    "idempotency_in_progress": 409,
    "too_large": 413,
    "media_type": 415,
    "idempotency_mismatch": 422,
    "quota_exceeded": 429,
    "database_unavailable": 503,
    "unavailable": 503,
    "disk_full": 507,
}
"""Status by code; an error without one of its own has that of the class it derives from, and any other is 400."""
_OURS = {"error", "training_failed", "ledger_unbalanced", "proof_failed", "storage_refused", "checkpoint_broken"}
"""Codes that say something of the server and not of the request."""
_RETRY_SECONDS = {429: 5, 503: 2, 507: 60}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
_CODES = {
    400: "request_invalid",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    415: "media_type",
    422: "request_invalid",
}


def status_of(error: LuthierError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, LuthierError) and (given := getattr(error, "status", None)):
        return int(given)
    for each in type(error).__mro__:
        code = error.code if each is type(error) else getattr(each, "code", "")
        if code in STATUS:
            return STATUS[code]
    return 500 if error.code in _OURS else 400


def dialect_of(path: str) -> str:
    """Whose shape of errors a path speaks: own, openai or synth."""
    if path == "/v1" or path.startswith("/v1/"):
        return "openai"
    return "synth" if path == "/api" or path.startswith("/api/") else "own"


def render_problem(path: str, error: LuthierError) -> Response:
    """The answer to a request that failed; `error.param`, where there is one, names the key at fault."""
    status = status_of(error)
    headers = _headers(status, error)
    body = orjson.dumps(describe_problem(path, error, status), default=str)
    return Response(body, status, headers, media_type="application/json")


def describe_problem(path: str, error: LuthierError, status: int) -> dict[str, Any]:
    """The body of such an answer."""
    dialect = dialect_of(path)
    if dialect == "own":
        return {"error": error.as_dict()}
    message = f"{error.message}; {error.hint}" if error.hint else error.message
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    inner = {"message": message, "type": kind, "param": getattr(error, "param", None), "code": error.code}
    if dialect == "openai":
        return {"error": inner}
    return {"error": inner, "detail": message, "code": error.code, "message": message}


def _headers(status: int, error: LuthierError) -> dict[str, str]:
    headers = {}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status == 409:
        headers["x-should-retry"] = "false"  # the SDK of OpenAI tries a conflict again unless told not to
    wait = getattr(error, "retry_after", None) or _RETRY_SECONDS.get(status)
    if wait and status in _RETRY_SECONDS:
        headers["retry-after"] = str(max(1, min(60, round(float(wait)))))
    return headers


def problem(status: int, message: str, *, code: str = "", hint: str = "", param: str | None = None) -> LuthierError:
    """An error of the protocol itself, with its own status and code."""
    error = LuthierError(message, hint=hint)
    error.code = code or _CODES.get(status) or "request_invalid"
    vars(error).update(status=status, param=param)
    return error


def register_problems(app: FastAPI) -> None:
    """Have every error of the routes answered in the shape of its dialect."""

    async def answer_ours(request: Request, error: LuthierError) -> Response:
        if status_of(error) >= 500:
            log.warning("%s %s: %s", request.method, request.url.path, error.message)
        request.scope["luthier.code"] = error.code
        return render_problem(request.url.path, error)

    async def answer_http(request: Request, error: HTTPException) -> Response:
        cause = error.__cause__
        if isinstance(cause, LuthierError):  # what reading the body raised, which FastAPI makes its own
            return await answer_ours(request, cause)
        return render_problem(request.url.path, _of_http(request, error))

    async def answer_invalid(request: Request, error: RequestValidationError) -> Response:
        return render_problem(request.url.path, _of_validation(error.errors()))

    app.add_exception_handler(LuthierError, answer_ours)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, answer_http)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, answer_invalid)  # type: ignore[arg-type]


def _of_http(request: Request, error: HTTPException) -> LuthierError:
    status = error.status_code
    told = {
        404: f"nothing is at {request.url.path}",
        405: f"{request.method} is not for {request.url.path}",
    }
    hint = "`GET /luthier/v1/openapi.json` lists the routes" if status == 404 else ""
    raised = problem(status, told.get(status) or str(error.detail or HTTPStatus(status).phrase), hint=hint)
    return raised


def _of_validation(items: Sequence[Any]) -> LuthierError:
    """Every wrong part of a request in one message, without what was sent: it may be large, or secret."""
    found = []
    for item in items:
        steps = item["loc"][1:] if item["loc"] and item["loc"][0] in ("body", "query", "path") else item["loc"]
        place = ".".join(map(str, steps))
        text = str(item["msg"]).lower()
        if item["type"] == "extra_forbidden":
            text = "is not known here"
        elif item["type"] == "missing":
            text = "is missing"
        elif item["type"] == "string_pattern_mismatch":
            text = f"is not of the form `{item['ctx']['pattern']}`"
        found.append((place, f"`{place}` {text}" if place else text))
    message = "; ".join(text for _, text in found) or "the request cannot be read"
    raised = problem(422, message, param=found[0][0] if found else None)
    raised.details = [{"path": place, "message": text} for place, text in found]
    return raised


def answers(*statuses: int, shape: Mapping[str, Any] | None = None) -> dict[int | str, dict[str, Any]]:
    """The failures that a route documents, for `responses=`; those that every route has are added by `app.py`."""
    content = {"application/json": {"schema": shape or {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}
