"""Samplers of `tinker` clients, and what they draw."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response

from luthier.errors import CallError, LuthierError, UnsupportedError
from luthier.host.datums import read_prompt_json
from luthier.host.tensors import read_tensor_json, write_tensor
from luthier.jobs.keys import Key
from luthier.live.bases import Base
from luthier.live.rows import Sampler
from luthier.live.sampling import Wanted, any_seed, fingerprint_of
from luthier.server.auth import Reader, Submitter
from luthier.server.live import Live, live_of
from luthier.server.problems import answers, problem
from luthier.server.routes.openai.answers import answer
from luthier.server.routes.tinker import asked as shapes
from luthier.server.routes.tinker.asked import body_of, read_as, read_object

router = APIRouter(tags=["Tinker: sampling"])

SamplerId = Annotated[str, Path(max_length=200, description="Id of a sampler: `SESSION:sample:N`")]
_MOST_STOPS, _LONGEST_STOP = 64, 1000


@router.post("/create_sampling_session", responses=answers(404), openapi_extra=body_of(shapes.SamplerAsked))
async def create_sampling_session(request: Request, key: Submitter) -> Response:
    """Make a sampler of a base model or of saved weights; the same session and number again is the same sampler."""
    body = read_as(shapes.SamplerAsked, read_object(await request.body()))
    sampler = await live_of(request).samplers.create(
        key.project,
        body.session_id,
        body.sampling_session_seq_id,
        base=body.base_model,
        model_path=body.model_path,
    )
    return answer({"type": "create_sampling_session", "sampling_session_id": sampler.id})


@router.get("/samplers/{sampler}", responses=answers(404))
async def show_sampler(request: Request, key: Reader, sampler: SamplerId) -> Response:
    """What a sampler draws from."""
    found = await live_of(request).samplers.find(key.project, sampler)
    return answer({"sampler_id": found.id, "base_model": found.base, "model_path": found.model_path})


@router.post("/join_sampling_session", responses=answers(404), openapi_extra=body_of(shapes.JoinAsked))
async def join_sampling_session(request: Request, key: Submitter) -> Response:
    """A number for one more client of a sampler."""
    body = read_as(shapes.JoinAsked, read_object(await request.body()))
    samplers = live_of(request).samplers
    found = await samplers.find(key.project, body.sampling_session_id)
    return answer({"type": "join_sampling_session", "client_counter": samplers.join(found)})


@router.post("/asample", responses=answers(404), openapi_extra=body_of(shapes.SampleAsked))
async def asample(request: Request, key: Submitter) -> Response:
    """Begin to draw samples."""
    sent = await request.body()
    facts = read_object(sent)
    body = read_as(shapes.SampleAsked, facts)
    live = live_of(request)
    sampler = await _sampler_of(live, key, body)
    base = await live.samplers.base_of(sampler)
    try:
        drawn, targets = _read_facts(body, facts, base), _read_targets(body)
    except LuthierError as error:
        if error.where and getattr(error, "param", None) is None:
            vars(error)["param"] = error.where
        raise
    wanted = Wanted(sampler, body.seq_id, drawn, body.num_samples, fingerprint_of(sent), targets)
    promise, names = await live.samplers.ask(wanted)
    return answer({"request_id": promise.request, "model_id": sampler.model, "sample_sequence_ids": names})


async def _sampler_of(live: Live, key: Key, body: shapes.SampleAsked) -> Sampler:
    """By its id, or, as the oldest clients ask, by what it draws from."""
    if body.sampling_session_id is not None:
        return await live.samplers.find(key.project, body.sampling_session_id)
    return await live.samplers.find_unnamed(key.project, base=body.base_model, model_path=body.model_path)


def _read_facts(body: shapes.SampleAsked, facts: dict[str, Any] | Any, base: Base) -> dict[str, Any]:
    """What a host takes; raises what names the field at fault."""
    prompt = read_prompt_json(facts.get("prompt"))
    if not len(prompt):
        raise CallError("prompt: has no tokens", where="prompt")
    if int(prompt.min()) < 0 or int(prompt.max()) >= base.vocabulary:
        place = int(((prompt < 0) | (prompt >= base.vocabulary)).argmax())
        raise CallError(
            f"prompt: token {int(prompt[place])} at place {place} is not one of the model's {base.vocabulary:,}",
            where="prompt",
        )
    params = body.sampling_params
    room = base.longest - len(prompt)
    most = room if params.max_tokens is None else params.max_tokens
    if room < 1 or most > room:
        raise CallError(
            f"prompt: {len(prompt):,} tokens, and up to {max(1, most):,} more are asked for; "
            f"the model holds {base.longest:,}",
            hint="send a shorter prompt, or ask for fewer tokens",
            where="sampling_params.max_tokens",
        )
    if body.record_stability_info:
        raise UnsupportedError("`record_stability_info`: its format is not published", where="record_stability_info")
    if body.prompt_logprobs_last_n is not None and body.prompt_logprobs_last_n >= len(prompt):
        raise CallError(
            f"`prompt_logprobs_last_n` is {body.prompt_logprobs_last_n}, and the prompt has {len(prompt)} tokens",
            where="prompt_logprobs_last_n",
        )
    return {
        "prompt": prompt.tolist(),
        "max_tokens": most,
        "seed": any_seed() if params.seed is None else params.seed,
        "temperature": params.temperature,
        "top_k": max(0, params.top_k),
        "top_p": params.top_p,
        **_read_stops(params.stop),
        "prompt_logprobs": bool(body.prompt_logprobs),
        "topk_prompt_logprobs": body.topk_prompt_logprobs,
        "topk_sample_logprobs": body.topk_sample_logprobs,
        "prompt_alt_tokens_k": body.prompt_alt_tokens_k,
        "prompt_logprobs_last_n": body.prompt_logprobs_last_n,
    }


def _read_targets(body: shapes.SampleAsked) -> bytes:
    """Long lists of tokens travel as numbers, and not among the facts."""
    if body.target_prompt_logprobs is None:
        return b""
    return write_tensor(read_tensor_json(body.target_prompt_logprobs, "target_prompt_logprobs"))


def _read_stops(stop: str | list[str] | list[int] | None) -> dict[str, Any]:
    """None ends at the model's own end of turn; an empty list ends at nothing."""
    given = [stop] if isinstance(stop, str) else stop or []
    texts = [each for each in given if isinstance(each, str)]
    if len(given) > _MOST_STOPS or not all(0 < len(each) <= _LONGEST_STOP for each in texts):
        raise problem(
            400,
            f"`stop` takes up to {_MOST_STOPS} stops, each of 1 to {_LONGEST_STOP:,} characters",
            param="sampling_params.stop",
        )
    return {
        "stop_texts": texts,
        "stop_tokens": [each for each in given if isinstance(each, int)],
        "with_stops": stop is None or bool(given),
    }
