"""What a `tinker` client asks of the service itself: its settings, its models, and who the key belongs to."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field
from sqlalchemy import select

from luthier.jobs.keys import list_keys
from luthier.jobs.tables import keys
from luthier.live.retention import count_checkpoints
from luthier.server.auth import Admin, Reader
from luthier.server.base_models import list_base_models
from luthier.server.bodies import StrictRoute
from luthier.server.problems import answers, problem
from luthier.server.routes.openai.answers import answer
from luthier.server.routes.tinker.shapes import Asked, render_model, store_of
from luthier.server.service import service_of

router = APIRouter(route_class=StrictRoute, tags=["Tinker: service"])

_GIGABYTE = 1e9
_CONFIG = {
    "pjwt_auth_enabled": False,
    "credential_default_source": "api_key",
    "parallel_fwdbwd_chunks": True,
    "proto_compress_fwdbwd": False,
    "fwdbwd_max_chunk_len": 1024,
    "fwdbwd_max_chunk_bytes_count": 5_000_000,
    "sample_use_retrieve_futures": False,
    "custom_loss_server_side": False,
    "sample_join_sampling_session": False,
}
_DYNAMIC_CONFIG = {"refresh_interval_sec": 300, "sample_cancel_enabled": True, "sample_cancel_max_batch_size": 64}


class ClientAsked(Asked):
    """Which client asks for its settings."""

    sdk_version: Annotated[str, Field(max_length=100)] = ""


class TelemetrySent(Asked):
    """What a client tells of itself; nothing of it is kept."""

    events: list[Any] = []
    session_id: str = ""


@router.post("/client/config")
def show_client_config(key: Reader, body: ClientAsked) -> Response:
    """How clients should behave towards this server."""
    return answer(_CONFIG)


@router.post("/client/dynamic_config")
def show_dynamic_config(key: Reader, body: ClientAsked) -> Response:
    """The same for what may change while a client runs."""
    return answer(_DYNAMIC_CONFIG)


@router.get("/get_server_capabilities")
def show_capabilities(request: Request, key: Reader) -> Response:
    """The base models that can be trained and sampled."""
    found = list_base_models(service_of(request).settings)
    return answer({"supported_models": [render_model(model) for model in found]})


@router.get("/healthz")
def show_health(key: Reader) -> Response:
    """The server answers."""
    return answer({"status": "ok"})


@router.post("/telemetry")
def take_telemetry(key: Reader, body: TelemetrySent) -> Response:
    """Taken, and kept nowhere."""
    return answer({"status": "accepted"})


@router.get("/auth/apikey/me")
def show_own_key(request: Request, key: Reader) -> Response:
    """The key that asks, without its secret."""
    service = service_of(request)
    row = next(each for each in list_keys(service.database, key.project) if each.id == key.id)
    with service.database.read() as connection:
        number = connection.scalar(select(keys.c.number).where(keys.c.id == key.id))
    details = {"org_details": {"name": key.project}, "user_details": {"email": ""}}
    return answer({"key_id": number, "name": row.name or row.id, "note": ",".join(row.scopes), "details": details})


@router.get("/billing/usage/events")
def list_billing_events(key: Admin) -> Response:
    """Nothing is billed here."""
    return answer({"data": [], "sessions": {}, "cost_data_through": None})


@router.get("/billing/usage/checkpoints/current")
def show_storage(
    request: Request, key: Admin, project_id: Annotated[str | None, Query(max_length=200)] = None
) -> Response:
    """What the project's checkpoints take on the disk."""
    count, size = count_checkpoints(store_of(request), key.project, label=project_id)
    usage = {
        "project_id": project_id,
        "org_user_urn": None,
        "checkpoint_count": count,
        "size_bytes": size,
        "size_gigabytes": size / _GIGABYTE,
    }
    return answer({"effective_rate_usd_per_gigabyte_month": None, "data": [usage]})


@router.get("/audit", responses=answers(404))
def show_audit(key: Admin) -> Response:
    """Refused: nothing here keeps an audit log."""
    raise problem(404, "this server keeps no audit log", code="unsupported", hint="`luthier serve --log-requests`")


@router.post("/copy_weights", responses=answers(404))
def copy_weights(key: Reader) -> Response:
    """Refused: a checkpoint is shared within a server by publishing it."""
    hint = "publish the checkpoint: every project of this server can then load and sample it by its path"
    raise problem(404, "checkpoints are not copied from project to project", code="unsupported", hint=hint)
