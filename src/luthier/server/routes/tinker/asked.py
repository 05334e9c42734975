"""Bodies of the requests that train and sample; keys that are missing have the protocol's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import orjson
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from luthier.server.problems import problem

MOST_RANK = 256
_MOST_SECONDS = 10 * 366 * 86400
_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}$"

T = TypeVar("T", bound=BaseModel)

Seq = Annotated[int, Field(ge=1, le=2**62)]
Id = Annotated[str, Field(min_length=1, max_length=200)]
Name = Annotated[str, Field(pattern=_NAME)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class Body(BaseModel):
    """A body whose unknown keys are passed over: newer clients send keys that older servers have never heard of."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class LoraAsked(Body):
    """The adapter that is wanted."""

    rank: Annotated[int, Field(ge=1, le=MOST_RANK)]
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class Optimizer(Body):
    """The optimizer of a model."""

    type: str = "adamw"


class ModelAsked(Body):
    """A new model over a base."""

    session_id: Id
    model_seq_id: Annotated[int, Field(ge=0, le=2**31)]
    base_model: Annotated[str, Field(min_length=1, max_length=400)]
    user_metadata: dict[str, Any] | None = None
    lora_config: LoraAsked | None = None
    optimizer_config: Optimizer | None = None


class InfoAsked(Body):
    """Which model."""

    model_id: Id


class Command(Body):
    """What every command to a model has."""

    model_id: Id
    seq_id: Seq


class Adam(Body):
    """Settings of one optimizer step."""

    learning_rate: Annotated[Number, Field(ge=0)] = 1e-4
    beta1: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[Number, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[Number, Field(ge=0)] = 1e-12
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    grad_clip_norm: Number = 0.0


class StepAsked(Command):
    """One optimizer step."""

    adam_params: Adam | None = None
    optimizer_params: Optimizer | None = None


class SaveAsked(Command):
    """The whole state, to go on from."""

    path: Name | None = None
    ttl_seconds: Annotated[int, Field(ge=1, le=_MOST_SECONDS)] | None = None
    overwrite: bool = False
    user_metadata: dict[str, Any] | None = None


class SaveSamplerAsked(Command):
    """Weights to draw samples from: under a name, or for one sampler."""

    path: Name | None = None
    sampling_session_seq_id: Annotated[int, Field(ge=0, le=2**31)] | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: Annotated[int, Field(ge=1, le=_MOST_SECONDS)] | None = None
    user_metadata: dict[str, Any] | None = None


class SaveExternalAsked(Command):
    """Weights in a format that other tools read."""

    path: Name
    ttl_seconds: Annotated[int, Field(ge=1, le=_MOST_SECONDS)] | None = None
    age_encryption_recipients: list[str] | None = None


class LoadAsked(Body):
    """Weights to go on from: in a model that is there, or as a new one."""

    model_id: Id | None = None
    seq_id: Seq | None = None
    session_id: Id | None = None
    model_seq_id: Annotated[int, Field(ge=0, le=2**31)] | None = None
    base_model: Annotated[str, Field(max_length=400)] | None = None
    path: Annotated[str, Field(max_length=600)]
    optimizer: bool = False
    optimizer_config: Optimizer | None = None
    user_metadata: dict[str, Any] | None = None


class SamplerAsked(Body):
    """A sampler of a base model, or of weights that were saved."""

    session_id: Id
    sampling_session_seq_id: Annotated[int, Field(ge=0, le=2**31)]
    base_model: Annotated[str, Field(max_length=400)] | None = None
    model_path: Annotated[str, Field(max_length=600)] | None = None


class JoinAsked(Body):
    """One more client of a sampler."""

    sampling_session_id: Id


class Sampling(Body):
    """How tokens are drawn."""

    max_tokens: Annotated[int, Field(ge=1, le=2**24)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: Annotated[Number, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=2**31)] = -1
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0


class SampleAsked(Body):
    """Samples, and log-probabilities of the prompt."""

    num_samples: Annotated[int, Field(ge=1, le=1024)] = 1
    prompt: dict[str, Any]
    sampling_params: Sampling = Sampling()
    base_model: Annotated[str, Field(max_length=400)] | None = None
    model_path: Annotated[str, Field(max_length=600)] | None = None
    sampling_session_id: Id | None = None
    seq_id: Annotated[int, Field(ge=0, le=2**62)] | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: Annotated[int, Field(ge=0, le=1024)] = 0
    topk_sample_logprobs: Annotated[int, Field(ge=0, le=1024)] = 0
    target_prompt_logprobs: dict[str, Any] | None = None
    prompt_alt_tokens_k: Annotated[int, Field(ge=0, le=1024)] = 0
    prompt_logprobs_last_n: Annotated[int, Field(ge=1)] | None = None
    record_stability_info: bool | None = None


class ResultAsked(Body):
    """Which result."""

    request_id: Id
    allow_metadata_only: bool = False


class FeedTarget(Body):
    """Whose results."""

    type: str = "sampling_session"
    sampling_session_id: Id
    cloned_sampler_id: Annotated[int, Field(ge=0, le=2**31)] = 0


class FeedAsked(Body):
    """Results of one sampler behind a cursor."""

    target: FeedTarget
    prev_cursor: Annotated[int, Field(ge=0)] = 0
    timeout: Annotated[Number, Field(ge=0)] | None = None
    retrieved_request_ids: list[str] = []


class CancelAsked(Body):
    """A result that nobody waits for any more."""

    request_id: Id


def read_object(body: bytes) -> Mapping[str, Any]:
    """The JSON object of a body. Read once and fast: prompts are long lists of numbers."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise problem(400, f"the body is not JSON: {error}", hint="send one JSON object, as UTF-8") from None
    if not isinstance(found, dict):
        raise problem(400, "the body is not a JSON object")
    return found


def read_as(shape: type[T], facts: Mapping[str, Any]) -> T:
    """The body as its shape; what is wrong is told field by field, as everywhere."""
    try:
        return shape.model_validate(facts)
    except ValidationError as error:
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in error.errors()]) from None


def body_of(*shapes: type[BaseModel], protobuf: bool = False) -> dict[str, Any]:
    """The body of a route as the OpenAPI document shows it."""
    schemas = [shape.model_json_schema() for shape in shapes] or [{"type": "object"}]
    content: dict[str, Any] = {"application/json": {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}}}
    if protobuf:
        content["application/x-protobuf"] = {"schema": {"type": "string", "format": "binary"}}
    return {"requestBody": {"required": True, "content": content}}
