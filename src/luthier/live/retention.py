"""What of the live service's checkpoints and samplers is kept, counted, and swept away."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Connection, and_, delete, func, or_, select, update

from luthier.adapters.certificate import CERTIFICATE
from luthier.jobs.tables import live_checkpoints, live_commands, live_models, live_samplers, live_sessions
from luthier.live.store import LiveStore

SAMPLER_SECONDS = 6 * 3600.0
"""How long a sampler without a name is kept after its last use."""
IN_USE_SECONDS = 3600.0
"""How long a sampler keeps the weights of a checkpoint that was deleted or has expired."""
MODEL_SECONDS = 30 * 86400.0
"""How long a model can be trained on after its client was last heard of."""
FINISHED_SECONDS = 3600.0
"""The same once its session is over."""
_YOUNG_SECONDS = 3600.0
"""Folders younger than this may belong to a save that is not in the tables yet."""
_SWEPT = re.compile(r"(weights|sampler_weights|external_weights|sampler)_\d+(\.made)?(\.tmp-[0-9a-f]+)?")
_STATE = re.compile(r"state_(\d+)(\.tmp-[0-9a-f]+)?")
_SWEPT_AWAY = "its client was not heard of for a month, and what it had not saved is gone"


def count_checkpoints(
    store: LiveStore, project: str, *, session: str | None = None, label: str | None = None
) -> tuple[int, int]:
    """How many checkpoints a project has, and their bytes: of one session, or of those filed under one label."""
    where = [live_checkpoints.c.project == project]
    where.append(or_(live_checkpoints.c.expires_at.is_(None), live_checkpoints.c.expires_at > store.now()))
    if session is not None:
        where.append(live_models.c.session == session)
    if label is not None:
        labelled = select(live_sessions.c.id).where(live_sessions.c.project == project, live_sessions.c.label == label)
        where.append(live_models.c.session.in_(labelled))
    query = select(func.count(), func.coalesce(func.sum(live_checkpoints.c.bytes), 0))
    query = query.select_from(live_checkpoints).join(live_models, live_models.c.id == live_checkpoints.c.model)
    with store.database.read() as connection:
        count, size = connection.execute(query.where(*where)).one()
    return int(count), int(size)


def sweep(store: LiveStore) -> list[Path]:
    """Forget what has expired, and remove the folders that nothing leads to any more; returns those."""
    with store.database.write() as connection:
        _forget_expired(connection, store.now())
        left = _give_up_models(connection, store.now())
        kept = set(_named_folders(connection, store.now()))
    removed = []
    for folder in _folders(store):
        if store.relative(folder) not in kept and _is_old(folder, store.now()):
            shutil.rmtree(folder, ignore_errors=True)
            folder.with_name(f"{folder.name}.{CERTIFICATE}").unlink(missing_ok=True)
            removed.append(folder)
    for model in left:
        removed += remove_states(store, model)
    return removed


def remove_states(store: LiveStore, model: str, keep: int | None = None) -> list[Path]:
    """Remove the snapshots of a model but for one: those that a crash left behind, or all; returns their folders."""
    place, removed = store.folder_of(model), []
    for folder in place.glob("state_*"):
        if (found := _STATE.fullmatch(folder.name)) and (found[2] or int(found[1]) != keep):
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
    return removed


def _is_old(folder: Path, now: float) -> bool:
    """Whether it cannot be a save that is not in the tables yet; one that went meanwhile is not, either."""
    try:
        return now - folder.stat().st_mtime > _YOUNG_SECONDS
    except FileNotFoundError:
        return False


def _give_up_models(connection: Connection, now: float) -> list[str]:
    """Models whose client is gone for good can no longer be trained; those without a checkpoint are forgotten."""
    long_ago = now - MODEL_SECONDS
    silent = select(live_sessions.c.id).where(live_sessions.c.seen_at <= long_ago)
    query = select(live_models.c.id, live_models.c.number).where(
        live_models.c.session.in_(silent),
        live_models.c.last_request_at <= long_ago,
        live_models.c.deleted_at.is_(None),
        or_(live_models.c.corrupted.is_(None), live_models.c.corrupted != _SWEPT_AWAY),
    )
    found = connection.execute(query).all()
    for model, number in found:
        mine = live_models.c.number == number
        connection.execute(delete(live_commands).where(live_commands.c.model == number))
        gone = {"corrupted": _SWEPT_AWAY, "origin_folder": None, "origin_optimizer": False}
        connection.execute(update(live_models).where(mine).values(gone))
        saved = select(live_checkpoints.c.number).where(live_checkpoints.c.model == model)
        connection.execute(update(live_models).where(mine, ~saved.exists()).values(deleted_at=now))
    return [model for model, _ in found]


def _forget_expired(connection: Connection, now: float) -> None:
    connection.execute(delete(live_checkpoints).where(live_checkpoints.c.expires_at <= now))
    over = select(live_sessions.c.id).where(live_sessions.c.finished_at.is_not(None))
    is_unused = or_(
        live_samplers.c.used_at <= now - SAMPLER_SECONDS,
        and_(live_samplers.c.used_at <= now - FINISHED_SECONDS, live_samplers.c.session.in_(over)),
    )
    is_nameless = and_(live_samplers.c.model_path.is_(None), live_samplers.c.folder.is_not(None))
    connection.execute(delete(live_samplers).where(is_nameless, is_unused))


def _named_folders(connection: Connection, now: float) -> Iterator[str]:
    """Folders that checkpoints, samplers, models that started there, or commands that may be done again name."""
    is_held = or_(live_samplers.c.model_path.is_(None), live_samplers.c.used_at > now - IN_USE_SECONDS)
    queries = (
        select(live_checkpoints.c.folder),
        select(live_samplers.c.folder).where(live_samplers.c.folder.is_not(None), is_held),
        select(live_models.c.origin_folder).where(
            live_models.c.origin_folder.is_not(None), live_models.c.deleted_at.is_(None)
        ),
    )
    for query in queries:
        yield from connection.scalars(query)
    loads = (
        select(live_commands.c.facts)
        .join(live_models, live_models.c.number == live_commands.c.model)
        .where(
            live_commands.c.kind == "load_weights",
            live_commands.c.seq > func.coalesce(live_models.c.snapshot_seq, -1),
        )
    )
    yield from (str(facts.get("folder")) for facts in connection.scalars(loads))


def _folders(store: LiveStore) -> Iterator[Path]:
    """Folders of checkpoints and samplers; snapshots are their model's own business."""
    for place in (store.home / "live").glob("*/*"):
        if place.is_dir() and _SWEPT.fullmatch(place.name):
            yield place
