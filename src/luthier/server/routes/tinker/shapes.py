"""Sessions, runs and checkpoints as the `tinker` SDK reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import Path, Request, Response
from pydantic import BaseModel, ConfigDict

from luthier.live.retention import count_checkpoints
from luthier.live.rows import EXTERNAL_WEIGHTS, SAMPLER_WEIGHTS, WEIGHTS, Checkpoint, LiveModel, Session, build_path
from luthier.live.store import LiveStore
from luthier.server.service import service_of

if TYPE_CHECKING:
    from luthier.server.base_models import BaseModel as ServedModel

_TYPES = {WEIGHTS: "training", SAMPLER_WEIGHTS: "sampler", EXTERNAL_WEIGHTS: "external"}

_EXTERNAL_SINCE = (0, 28)

Kind = Literal["weights", "sampler_weights", "external_weights"]
RunId = Annotated[str, Path(max_length=200, description="Id of a training run: `SESSION:train:N`")]
SessionId = Annotated[str, Path(max_length=100, description="Id of a session")]
CheckpointName = Annotated[str, Path(max_length=200, description="Name that the checkpoint was saved under")]


class Asked(BaseModel):
    """A body whose unknown keys are passed over: newer clients send keys that older servers have never heard of."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


def store_of(request: Request) -> LiveStore:
    """The rows of the live service."""
    service = service_of(request)
    return LiveStore(service.database, service.home)


def unreadable_kind(request: Request) -> str | None:
    """The kind of checkpoint that spoils a whole list for the client: SDKs before 0.28 know no external ones."""
    said = re.match(r"(\d+)\.(\d+)", request.headers.get("x-stainless-package-version", ""))
    is_old = said is not None and (int(said[1]), int(said[2])) < _EXTERNAL_SINCE
    return EXTERNAL_WEIGHTS if is_old else None


def empty() -> Response:
    """An answer whose body no client reads."""
    return Response(b"{}", media_type="application/json")


def path_of(run: str, kind: str, name: str) -> str:
    """The `tinker://` path of a checkpoint that is named in parts."""
    return build_path(run, kind, name)


def render_moment(seconds: float) -> str:
    """A time in ISO 8601."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def render_metadata(found: Mapping[str, Any] | None) -> dict[str, str] | None:
    """What a client said of its work; the SDK reads texts only, so anything else is shown as JSON."""
    if found is None:
        return None
    return {str(key): value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}


def render_model(model: ServedModel) -> dict[str, Any]:
    """A base model that can be trained and sampled."""
    return {
        "model_name": model.name,
        "max_context_length": model.context,
        "trainable": True,
        "sampleable": True,
    }


def render_checkpoint(found: Checkpoint) -> dict[str, Any]:
    """A checkpoint."""
    return {
        "checkpoint_id": f"{found.kind}/{found.name}",
        "checkpoint_type": _TYPES[found.kind],
        "time": render_moment(found.created_at),
        "tinker_path": found.path,
        "size_bytes": found.bytes,
        "public": found.is_public,
        "user_metadata": render_metadata(found.user_metadata),
        "expires_at": None if found.expires_at is None else render_moment(found.expires_at),
    }


def find_newest(store: LiveStore, model: LiveModel) -> list[Checkpoint]:
    """The newest state of a model, and the newest weights to sample from."""
    kinds = (WEIGHTS, SAMPLER_WEIGHTS)
    found = (store.list_checkpoints(model.project, model=model.id, kind=kind, limit=1).items for kind in kinds)
    return [checkpoint for items in found for checkpoint in items]


def render_run(model: LiveModel, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """A training run with the newest of its checkpoints, which come the newest first."""
    shown: dict[str, Any] = dict.fromkeys((WEIGHTS, SAMPLER_WEIGHTS))
    for checkpoint in reversed(checkpoints):
        shown[checkpoint.kind] = render_checkpoint(checkpoint)
    return {
        "training_run_id": model.id,
        "base_model": model.base,
        "model_owner": model.project,
        "is_lora": True,
        "corrupted": model.corrupted is not None,
        "lora_rank": model.rank,
        "last_request_time": render_moment(model.last_request_at),
        "last_checkpoint": shown[WEIGHTS],
        "last_sampler_checkpoint": shown[SAMPLER_WEIGHTS],
        "user_metadata": render_metadata(model.user_metadata),
    }


def render_weights(found: Checkpoint) -> dict[str, Any]:
    """What has to be known of a checkpoint to go on from it."""
    return {
        "base_model": found.base,
        "is_lora": True,
        "lora_rank": found.rank,
        "train_unembed": found.train_unembed,
        "train_mlp": found.train_mlp,
        "train_attn": found.train_attn,
    }


def render_summary(store: LiveStore, session: Session) -> dict[str, Any]:
    """A session in a list, with how many checkpoints it left."""
    count, size = count_checkpoints(store, session.project, session=session.id)
    return {
        "session_id": session.id,
        "created_at": render_moment(session.created_at),
        "owner": session.project,
        "project_id": session.label or "",
        "status": render_status(session),
        "checkpoints_count": count,
        "display_name": session.display_name,
        "user_metadata": render_metadata(session.user_metadata),
        "checkpoint_storage_bytes": size,
    }


def render_status(session: Session) -> dict[str, Any]:
    """Whether a session goes on, and how it ended."""
    if session.finished_at is None:
        return {"type": "active"}
    ending = session.ending or {}
    return {"type": "client_finished", "reason": ending.get("reason"), "detail": ending.get("detail")}


def render_cursor(offset: int, limit: int, total: int) -> dict[str, int]:
    """Where a page stands in its list."""
    return {"offset": offset, "limit": limit, "total_count": total}
