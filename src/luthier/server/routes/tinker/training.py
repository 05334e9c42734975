"""Models of `tinker` clients: made, trained step by step, saved and loaded.

Every command is answered once it is on the disk; what came of it is asked for by `retrieve_future`. A command that is
refused uses its number up, since its client goes on with the next one.
"""

from __future__ import annotations

import logging
import secrets
import zlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel

from luthier.errors import CallError, LuthierError, UnsupportedError
from luthier.host.datums import (
    LossRequest,
    check_loss_request,
    read_loss_request,
    read_loss_request_json,
    write_loss_request,
)
from luthier.host.protobuf import Message
from luthier.jobs.keys import Key
from luthier.live import works
from luthier.live.bases import Base
from luthier.live.log import Command
from luthier.live.room import Room
from luthier.live.rows import NewModel
from luthier.runs.layout import PRACTICE
from luthier.server.auth import Reader, Submitter
from luthier.server.live import Live, live_of
from luthier.server.problems import answers, problem, status_of
from luthier.server.routes.openai.answers import answer
from luthier.server.routes.tinker import asked as shapes
from luthier.server.routes.tinker.asked import body_of, read_as, read_object
from luthier.server.service import service_of

router = APIRouter(tags=["Tinker: training"])

PROTOBUF = "application/x-protobuf"
_REFUSED = answers(404)
_NOT_CONSUMED = (401, 403, 429)
_LARGE_BYTES = 1 << 20
"""Bodies above this are read in a thread."""

log = logging.getLogger("luthier.server")

T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True)
class _Built:
    """What the log keeps of a command."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    body: bytes | None = None


@router.post("/create_model", responses=_REFUSED, openapi_extra=body_of(shapes.ModelAsked))
async def create_model(request: Request, key: Submitter) -> Response:
    """Make an adapter over a base model; the same session and number again is the same model."""
    live = live_of(request)
    body = read_as(shapes.ModelAsked, read_object(await request.body()))
    _check_optimizer(body.optimizer_config)
    lora = body.lora_config
    if lora is None:
        raise problem(
            400,
            "`lora_config` is missing: only adapters are trained live",
            hint='send one, such as {"rank": 32}',
            param="lora_config",
        )
    if not (lora.train_mlp or lora.train_attn or lora.train_unembed):
        raise problem(400, "`lora_config` trains nothing: mlp, attn and unembed are all off", param="lora_config")
    new = NewModel(
        project=key.project,
        session=body.session_id,
        model_seq_id=body.model_seq_id,
        base=body.base_model,
        rank=lora.rank,
        seed=secrets.randbits(48) if lora.seed is None else lora.seed,
        train_mlp=lora.train_mlp,
        train_attn=lora.train_attn,
        train_unembed=lora.train_unembed,
        user_metadata=body.user_metadata,
    )
    await live.house.find_base(body.base_model)
    return await _make(live, new, works.CREATE)


@router.post("/get_info", responses=_REFUSED, openapi_extra=body_of(shapes.InfoAsked))
async def get_info(request: Request, key: Reader) -> Response:
    """What a model is: its base, its tokenizer, its rank."""
    live = live_of(request)
    body = read_as(shapes.InfoAsked, read_object(await request.body()))
    model = await live.house.run(live.store.find_model, key.project, body.model_id)
    base = await live.house.find_base(model.base)
    tokenizer = _tokenizer_of(base, is_near=service_of(request).settings.is_loopback)
    return answer(
        {
            "type": "get_info",
            "model_data": {"arch": base.architecture, "model_name": model.base, "tokenizer_id": tokenizer},
            "model_id": model.id,
            "is_lora": True,
            "lora_rank": model.rank,
            "model_name": model.base,
        }
    )


@router.post("/forward_backward", responses=_REFUSED, openapi_extra=body_of(protobuf=True))
async def forward_backward(request: Request, key: Submitter) -> Response:
    """Compute a loss and add its gradients; only the loss where `forward_only` is set."""
    return await _compute(request, key, forward_only=False)


@router.post("/forward", responses=_REFUSED, openapi_extra=body_of())
async def forward(request: Request, key: Submitter) -> Response:
    """Compute a loss alone, as clients before 0.25 ask for it."""
    return await _compute(request, key, forward_only=True)


@router.post("/optim_step", responses=_REFUSED, openapi_extra=body_of(shapes.StepAsked))
async def optim_step(request: Request, key: Submitter) -> Response:
    """Take one step of Adam with the gradients that were added up, and clear them."""

    def build(body: shapes.StepAsked) -> _Built:
        _check_optimizer(body.optimizer_params, where="optimizer_params")
        facts = (body.adam_params or shapes.Adam()).model_dump()
        return _Built({**facts, "grad_clip_norm": max(0.0, facts["grad_clip_norm"])})

    return await _command(request, key, works.OPTIM_STEP, shapes.StepAsked, build)


@router.post("/save_weights", responses=_REFUSED, openapi_extra=body_of(shapes.SaveAsked))
async def save_weights(request: Request, key: Submitter) -> Response:
    """Save weights and optimizer, to train on from them."""

    def build(body: shapes.SaveAsked) -> _Built:
        named = {"name": body.path or f"{body.seq_id:06d}", "overwrite": body.overwrite}
        return _Built({**named, "ttl_seconds": body.ttl_seconds, "user_metadata": body.user_metadata})

    return await _command(request, key, works.SAVE, shapes.SaveAsked, build)


@router.post("/save_weights_for_sampler", responses=_REFUSED, openapi_extra=body_of(shapes.SaveSamplerAsked))
async def save_weights_for_sampler(request: Request, key: Submitter) -> Response:
    """Save weights to draw samples from: under a name, or for one sampler without a name."""

    def build(body: shapes.SaveSamplerAsked) -> _Built:
        if body.path is None and body.sampling_session_seq_id is None:
            raise CallError("neither `path` nor `sampling_session_seq_id` says what the weights are for", where="path")
        named = {"name": body.path, "sampling_session_seq_id": body.sampling_session_seq_id, "kind": body.kind}
        return _Built({**named, "ttl_seconds": body.ttl_seconds, "user_metadata": body.user_metadata})

    return await _command(request, key, works.SAVE_SAMPLER, shapes.SaveSamplerAsked, build)


@router.post("/save_weights_external", responses=_REFUSED, openapi_extra=body_of(shapes.SaveExternalAsked))
async def save_weights_external(request: Request, key: Submitter) -> Response:
    """Save weights for other tools, to be downloaded."""

    def build(body: shapes.SaveExternalAsked) -> _Built:
        if body.age_encryption_recipients:
            raise UnsupportedError(
                "`age_encryption_recipients`: files are not encrypted here",
                hint="save without it, and encrypt what you downloaded",
                where="age_encryption_recipients",
            )
        return _Built({"name": body.path, "ttl_seconds": body.ttl_seconds})

    return await _command(request, key, works.SAVE_EXTERNAL, shapes.SaveExternalAsked, build)


@router.post("/load_weights", responses=_REFUSED, openapi_extra=body_of(shapes.LoadAsked))
async def load_weights(request: Request, key: Submitter) -> Response:
    """Take saved weights, with the optimizer's state or without: into a model that is there, or as a new one."""
    facts = read_object(await request.body())
    if facts.get("model_id") is None:
        return await _create_from(live_of(request), key, read_as(shapes.LoadAsked, facts))

    def build(body: shapes.LoadAsked) -> _Built:
        return _Built({"path": body.path, "optimizer": body.optimizer})

    return await _command(request, key, works.LOAD, shapes.LoadAsked, build)


@router.post("/create_custom_loss", responses=_REFUSED, openapi_extra=body_of())
async def create_custom_loss(request: Request, key: Submitter) -> Response:
    """Refused: code of clients is not run here."""
    raise problem(
        400,
        "a server does not run losses that clients wrote",
        code="unsupported",
        hint="`forward_backward_custom` computes them in the client, and needs nothing of the server",
        param="loss",
    )


async def _make(live: Live, new: NewModel, kind: str) -> Response:
    await live.house.run(live.store.find_session, new.project, new.session)
    most = live.house.settings.most_models

    def create() -> Any:
        return live.store.create_model(new, most=most)

    model = await live.house.run(create)
    room = await live.house.enter(new.project, model.id)
    facts = {"path": new.origin, "optimizer": new.origin_optimizer} if new.origin else {}
    return _taken(room, await room.submit(0, kind, facts))


async def _create_from(live: Live, key: Key, body: shapes.LoadAsked) -> Response:
    """A model whose first command is a load: its rank and layout are those of the checkpoint."""
    if body.session_id is None or body.model_seq_id is None:
        raise problem(422, "`model_id` and `seq_id`, or `session_id` and `model_seq_id`, say which model it is for")
    _check_optimizer(body.optimizer_config)
    found = await live.house.run(live.store.find_checkpoint, key.project, body.path)
    works.check_loadable(found, optimizer=body.optimizer)
    if body.base_model not in (None, found.base):
        raise problem(
            400,
            f"`base_model` is {body.base_model!r}, and the checkpoint was trained over {found.base!r}",
            hint="leave `base_model` out",
            param="base_model",
        )
    new = NewModel(
        project=key.project,
        session=body.session_id,
        model_seq_id=body.model_seq_id,
        base=found.base,
        rank=found.rank,
        seed=secrets.randbits(48),
        train_mlp=found.train_mlp,
        train_attn=found.train_attn,
        train_unembed=found.train_unembed,
        origin=body.path,
        origin_folder=found.folder,
        origin_optimizer=body.optimizer,
        user_metadata=body.user_metadata,
    )
    return await _make(live, new, works.LOAD_NEW)


async def _compute(request: Request, key: Submitter, *, forward_only: bool) -> Response:
    live, sent = live_of(request), await request.body()
    is_protobuf = request.headers.get("content-type", "").partition(";")[0].strip().lower() == PROTOBUF
    refused = None
    if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
        refused = problem(415, "the body is compressed, which `client/config` does not ask for")
        most = service_of(request).settings.limits.live_bytes
        sent = await live.house.run(_unpack, sent, encoding, most)

    def read_address() -> tuple[Mapping[str, Any] | None, object, object]:
        if is_protobuf:
            return None, *_address_of(sent)
        told = read_object(sent)
        return told, told.get("model_id"), told.get("seq_id")

    try:
        is_large = len(sent) > _LARGE_BYTES
        facts, model, seq = await live.house.run(read_address) if is_large else read_address()
    except LuthierError:
        if refused is not None:
            raise refused from None
        raise

    def build(room: Room) -> _Built:
        if refused is not None:
            raise refused
        asked = read_loss_request(sent) if facts is None else read_loss_request_json(facts, forward_only=forward_only)
        _check(asked, room.base)
        kept = {"forward_only": asked.forward_only, "loss_fn": asked.loss, "datums": len(asked.data)}
        return _Built(kept, sent if facts is None else write_loss_request(asked))

    async def build_in_thread(room: Room) -> _Built:
        return await live.house.run(build, room)  # type: ignore[no-any-return]

    return await _submit(live, key, works.FORWARD_BACKWARD, model, seq, build_in_thread)


def _unpack(sent: bytes, encoding: str, most: int) -> bytes:
    """A body that is compressed though nobody asked for that: only to learn whose number is used up by it."""
    if encoding not in ("gzip", "deflate"):
        return b""
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(sent, most)
    except zlib.error:
        return b""


def _check(asked: LossRequest, base: Base) -> None:
    check_loss_request(asked, vocabulary=base.vocabulary, longest=base.longest)


def _address_of(sent: bytes) -> tuple[str, int]:
    """Which model and number a protobuf request is for, also where the rest of it cannot be read."""
    message = Message(sent)
    return message.text(1, "model_id"), message.int32(2)


async def _command(
    request: Request, key: Submitter, kind: str, shape: type[T], build: Callable[[T], _Built]
) -> Response:
    facts = read_object(await request.body())

    async def build_here(room: Room) -> _Built:
        return build(read_as(shape, facts))

    return await _submit(live_of(request), key, kind, facts.get("model_id"), facts.get("seq_id"), build_here)


async def _submit(
    live: Live, key: Submitter, kind: str, model: object, seq: object, build: Callable[[Room], Awaitable[_Built]]
) -> Response:
    """Take a command in; one that is refused uses its number up."""
    if not isinstance(model, str) or not model:
        raise problem(422, "`model_id` is missing", param="model_id")
    if not isinstance(seq, int) or isinstance(seq, bool) or not 1 <= seq < 2**62:
        raise problem(422, "`seq_id` is missing or not a number from 1 on", param="seq_id")
    room = await live.house.enter(key.project, model)
    try:
        built = await build(room)
    except RequestValidationError:
        await room.reject(seq, kind, CallError("the request was refused: its fields do not hold"))
        raise
    except LuthierError as error:
        if status_of(error) < 500 and status_of(error) not in _NOT_CONSUMED:
            await room.reject(seq, kind, error)
        raise _naming(error) from None
    except Exception as error:  # the number is used up in any case, since the client goes on with the next one
        log.exception("seq_id %s of %s could not be read", seq, model)
        refusal = CallError(f"the request cannot be read: {type(error).__name__}")
        await room.reject(seq, kind, refusal)
        raise refusal from None
    return _taken(room, await room.submit(seq, kind, built.facts, built.body))


def _naming(error: LuthierError) -> LuthierError:
    """The same with the field at fault where clients look for it."""
    if error.where and getattr(error, "param", None) is None:
        vars(error)["param"] = error.where
    return error


def _taken(room: Room, command: Command) -> Response:
    return answer({"request_id": command.request, "model_id": room.model.id})


def _check_optimizer(found: shapes.Optimizer | None, where: str = "optimizer_config") -> None:
    if found is not None and found.type not in ("adamw", "adam"):
        raise UnsupportedError(
            f"`{where}.type` is {found.type[:40]!r}; models are trained with Adam (`adamw`) here", where=where
        )


def _tokenizer_of(base: Base, *, is_near: bool) -> str:
    """What AutoTokenizer loads: a folder where the base is one, or lies here and so does the client."""
    is_folder = base.name == PRACTICE or base.name.startswith("/")
    is_given = base.resolved.revision is None
    return str(base.folder) if is_folder or (is_near and is_given) else base.name
