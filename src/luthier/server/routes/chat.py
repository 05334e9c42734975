"""`/chat/completions`: the base models and results of this server answer, whole or as a stream."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse

from luthier.errors import LuthierError
from luthier.host.ask import Ask, Said
from luthier.host.place import Place, find_place
from luthier.jobs.keys import Key
from luthier.live.rows import SCHEME
from luthier.runs.resolve import find_resolved
from luthier.server.auth import Reader
from luthier.server.chat import ChatRequest, Choice, read_asks, render_logprobs, render_usage
from luthier.server.json_text import render_json
from luthier.server.problems import answers, describe_problem, problem, status_of
from luthier.server.service import Service, service_of

router = APIRouter(tags=["chat"])
_SSE = {"cache-control": "no-store", "x-accel-buffering": "no"}


@router.post("/chat/completions", responses=answers(400, 404, 503), response_model=None)
async def create_chat_completion(request: Request, key: Reader, body: ChatRequest) -> Response:
    """Answer a conversation with a base model, the result of a job, or weights that a client trained live."""
    service = service_of(request)
    place = await run_in_threadpool(_find_place, service, key, body.model)
    asks = read_asks(body, place.adapter)
    frame = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": body.model}
    parts = _answer_all(service, place, asks)
    if body.stream:
        # The first part is awaited here, so that what cannot be asked is refused with a status of its own.
        first = await anext(parts)
        path = request.url.path
        return StreamingResponse(_stream(path, body, frame, first, parts), media_type="text/event-stream", headers=_SSE)
    choices = [Choice(index, bool(body.logprobs), bool(body.tools)) for index in range(len(asks))]
    async for index, said in parts:
        choices[index].add(said)
    whole = {
        **frame,
        "object": "chat.completion",
        "choices": [choice.render() for choice in choices],
        "usage": render_usage(choices),
    }
    return Response(render_json(whole), media_type="application/json")


def _find_place(service: Service, key: Key, model: str) -> Place:
    """Where a model of the key's project answers; raises NotFoundError for those of others as for those not there."""
    if model.startswith(("ft:", SCHEME)):
        folder = service.find_weights(key.project, model)
        return find_place(find_resolved(str(folder)))
    if not service.settings.allows(model):
        raise problem(
            404, f"no model `{model}` here", code="model_not_found", hint="`GET /v1/models` lists them", param="model"
        )
    return find_place(find_resolved(model))


async def _answer_all(service: Service, place: Place, asks: list[Ask]) -> AsyncIterator[tuple[int, Said]]:
    """The parts of every choice, as they come."""
    parts: asyncio.Queue[tuple[int, Said | BaseException]] = asyncio.Queue()

    async def answer(index: int, ask: Ask) -> None:
        try:
            async for said in service.hosts.answer(place, ask):
                await parts.put((index, said))
        except LuthierError as error:
            await parts.put((index, error))

    tasks = [asyncio.create_task(answer(index, ask)) for index, ask in enumerate(asks)]
    left = len(asks)
    try:
        while left:
            index, said = await parts.get()
            if isinstance(said, BaseException):
                raise said
            left -= said.finish is not None
            yield index, said
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _stream(
    path: str,
    body: ChatRequest,
    frame: dict[str, Any],
    first: tuple[int, Said],
    parts: AsyncIterator[tuple[int, Said]],
) -> AsyncIterator[bytes]:
    """Chunks in OpenAI's shape; tool calls come whole, at the end of their choice."""
    choices = [Choice(index, bool(body.logprobs), bool(body.tools)) for index in range(body.n or 1)]
    frame = {**frame, "object": "chat.completion.chunk"}
    wants_usage = bool((body.stream_options or {}).get("include_usage"))

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> bytes:
        shown = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return _event({**frame, "choices": [shown], **({"usage": None} if wants_usage else {})})

    try:
        for choice in choices:
            yield chunk(choice.index, {"role": "assistant", "content": ""})
        async for index, said in _chain(first, parts):
            choice = choices[index]
            choice.add(said)
            if choice.with_tools:
                delta = choice.render()["message"] if said.finish else {}
                if calls := delta.get("tool_calls"):
                    delta["tool_calls"] = [{"index": place, **call} for place, call in enumerate(calls)]
                delta = {key: value for key, value in delta.items() if key in ("content", "tool_calls") and value}
            else:
                delta = {"content": said.text} if said.text else {}
            logprobs = render_logprobs(said.tokens) if choice.with_logprobs and said.tokens else None
            if delta or logprobs:
                yield chunk(index, delta, logprobs=logprobs)
            if said.finish:
                yield chunk(index, {}, "tool_calls" if "tool_calls" in delta else said.finish)
        if wants_usage:
            yield _event({**frame, "choices": [], "usage": render_usage(choices)})
        yield b"data: [DONE]\n\n"
    except LuthierError as error:  # the answer has begun, so its status cannot tell any more
        yield _event(describe_problem(path, error, status_of(error)))


async def _chain(first: tuple[int, Said], parts: AsyncIterator[tuple[int, Said]]) -> AsyncIterator[tuple[int, Said]]:
    yield first
    async for part in parts:
        yield part


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + render_json(data) + b"\n\n"
