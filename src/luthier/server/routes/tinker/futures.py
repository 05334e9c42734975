"""Results of commands and samples, asked for until they are there: each question waits half a minute at most."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from luthier.errors import LuthierError
from luthier.host.datums import loss_output_json, read_loss_output, read_sample_output, sample_output_json
from luthier.live.futures import LONGEST_WAIT_SECONDS, Outcome, Promise, QueueState, failed
from luthier.live.works import FORWARD_BACKWARD
from luthier.server.auth import Reader
from luthier.server.live import Live, live_of
from luthier.server.problems import answers, problem, status_of
from luthier.server.routes.openai.answers import answer
from luthier.server.routes.tinker import asked as shapes
from luthier.server.routes.tinker.asked import body_of, read_as, read_object
from luthier.server.routes.tinker.shapes import empty
from luthier.server.routes.tinker.training import PROTOBUF

router = APIRouter(tags=["Tinker: results"])

_LARGE_BYTES = 4 << 20
"""What a client that asks so is told the size of before it is sent."""


@router.post("/retrieve_future", responses=answers(410), openapi_extra=body_of(shapes.ResultAsked))
async def retrieve_future(request: Request, key: Reader) -> Response:
    """The result of a request, or `try_again` and what it waits for."""
    body = read_as(shapes.ResultAsked, read_object(await request.body()))
    live = live_of(request)
    promise = live.house.promises.find(key.project, body.request_id)
    if promise is None:
        promise = await _look_up(live, key.project, body.request_id)
    outcome = await live.house.promises.wait(promise)
    if outcome is None:
        return _try_again(body.request_id, promise.queue_state)
    if body.allow_metadata_only and outcome.body is not None and len(outcome.body) > _LARGE_BYTES:
        return answer({"status": "complete_metadata", "response_payload_size": len(outcome.body)})
    return _render(promise.shape, outcome, wants_protobuf=PROTOBUF in request.headers.get("accept", ""))


@router.post("/retrieve_futures", responses=answers(404), openapi_extra=body_of(shapes.FeedAsked))
async def retrieve_futures(request: Request, key: Reader) -> Response:
    """Which requests of one sampler have ended since the cursor."""
    body = read_as(shapes.FeedAsked, read_object(await request.body()))
    live = live_of(request)
    sampler = await live.samplers.find(key.project, body.target.sampling_session_id)
    seconds = LONGEST_WAIT_SECONDS if body.timeout is None else body.timeout
    client = body.target.cloned_sampler_id
    completions, cursor = await live.samplers.read_feed(sampler, client, body.prev_cursor, seconds)
    return answer({"completions": completions, "cursor": cursor})


@router.post("/cancel_future", openapi_extra=body_of(shapes.CancelAsked))
async def cancel_future(request: Request, key: Reader) -> Response:
    """Give samples up that nobody waits for; commands to a model are done, since those after them count on it."""
    body = read_as(shapes.CancelAsked, read_object(await request.body()))
    live_of(request).samplers.cancel(key.project, body.request_id)
    return empty()


async def _look_up(live: Live, project: str, request: str) -> Promise:
    """A command from before a restart, or one whose result has left the memory."""
    row = await live.house.run(live.house.log.find, project, request)
    if row is None:
        raise problem(410, "no request of this id is known here", code="gone", hint="send the request again")
    model, command, outcome = row
    shape = FORWARD_BACKWARD if command.kind == FORWARD_BACKWARD else "json"
    found = Promise(request, project, shape, lambda: QueueState("active", "the result is being written"))
    if outcome is None:
        try:
            room = await live.house.enter(project, model)
        except LuthierError as error:
            if status_of(error) >= 500:  # it passes: the command still waits, and its client asks again
                raise
            outcome = failed(error)
        else:
            return room.find_promise(request) or live.house.promises.find(project, request) or found
    found.resolve(outcome)
    return found


def _try_again(request: str, state: QueueState) -> Response:
    told = {"type": "try_again", "request_id": request, "queue_state": state.state}
    return answer(told if state.reason is None else {**told, "queue_state_reason": state.reason})


def _render(shape: str, outcome: Outcome, *, wants_protobuf: bool) -> Response:
    """As protobuf only for who asked so; as JSON for clients before 0.25, and always where something failed."""
    if outcome.is_failure or outcome.body is None:
        return answer(dict(outcome.answer))
    if wants_protobuf:
        return Response(outcome.body, media_type=PROTOBUF)
    if shape == FORWARD_BACKWARD:
        return answer(loss_output_json(read_loss_output(outcome.body)))
    return answer(sample_output_json(read_sample_output(outcome.body)))
