"""What a project lets every other of the server see: checkpoints that it published, and as much of their runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import or_, select

from luthier.jobs.rows import no_such
from luthier.jobs.tables import live_checkpoints, live_models
from luthier.live.rows import CHECKPOINT_COLUMNS, MODEL_COLUMNS, Checkpoint, LiveModel
from luthier.live.store import LiveStore


def list_published(store: LiveStore, model: str) -> Sequence[Checkpoint]:
    """The published checkpoints of a model, the newest first; NotFoundError where there are none."""
    query = (
        select(*CHECKPOINT_COLUMNS)
        .join(live_models, live_models.c.id == live_checkpoints.c.model)
        .where(
            live_checkpoints.c.model == model,
            live_checkpoints.c.is_public.is_(True),
            or_(live_checkpoints.c.expires_at.is_(None), live_checkpoints.c.expires_at > store.now()),
        )
        .order_by(live_checkpoints.c.number.desc())
    )
    with store.database.read() as connection:
        found = [Checkpoint(*row) for row in connection.execute(query)]
    if not found:
        raise no_such("model", model)
    return found


def find_published_model(store: LiveStore, model: str) -> LiveModel:
    """The model of published checkpoints, without what its client said of it; NotFoundError as for one not there."""
    list_published(store, model)
    query = select(*MODEL_COLUMNS).where(live_models.c.id == model, live_models.c.deleted_at.is_(None))
    with store.database.read() as connection:
        row = connection.execute(query).one_or_none()
    if row is None:
        raise no_such("model", model)
    return replace(LiveModel(*row), user_metadata=None)
