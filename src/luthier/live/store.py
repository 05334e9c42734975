"""Rows of sessions, models, samplers and checkpoints. Every question names the project that asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, Connection, Select, Table, delete, func, insert, or_, select, update

from luthier.errors import ConflictError, QuotaError
from luthier.jobs.database import Database
from luthier.jobs.ids import new_id
from luthier.jobs.rows import no_such
from luthier.jobs.tables import live_checkpoints, live_commands, live_models, live_samplers, live_sessions
from luthier.live.rows import (
    CHECKPOINT_COLUMNS,
    MODEL_COLUMNS,
    SAMPLER_COLUMNS,
    SESSION_COLUMNS,
    Checkpoint,
    LiveModel,
    NewModel,
    NewSession,
    Sampler,
    Session,
)

T = TypeVar("T")

_FOLDER = "live"
_SILENT_SECONDS = 600.0
"""A client that lives says so every ten seconds."""
_CHECKPOINTS = select(*CHECKPOINT_COLUMNS).join(live_models, live_models.c.id == live_checkpoints.c.model)


@dataclass(frozen=True)
class Listed(Generic[T]):
    """Some of a list, and how many there are in all."""

    items: Sequence[T]
    total: int


class LiveStore:
    """What clients of the live service made, by project; another project's is not there, unless it was published."""

    def __init__(self, database: Database, home: Path, *, now: Callable[[], float] = time.time) -> None:
        self.database, self.home, self.now = database, home, now

    def folder_of(self, model: str) -> Path:
        """Where a model's snapshots and checkpoints lie."""
        return self.home / _FOLDER / model.replace(":", "_")

    def relative(self, folder: Path) -> str:
        """A folder as rows name it."""
        return folder.relative_to(self.home).as_posix()

    def create_session(self, project: str, new: NewSession) -> Session:
        """A new session, whose id is safe as a part of paths."""
        now = self.now()
        made = Session(new_id("session-"), project, list(new.tags), *_said(new), None, now, now, None)
        with self.database.write() as connection:
            connection.execute(insert(live_sessions).values(asdict(made)))
        return made

    def find_session(self, project: str, session: str) -> Session:
        """The session; NotFoundError when this project has none of that id."""
        query = select(*SESSION_COLUMNS).where(live_sessions.c.id == session, live_sessions.c.project == project)
        return Session(*self._one(query, "session", session))

    def touch_session(self, project: str, session: str) -> Session:
        """Note that its client lives; a session that has finished stays as it is."""
        mine = (live_sessions.c.id == session, live_sessions.c.project == project)
        with self.database.write() as connection:
            going_on = update(live_sessions).where(*mine, live_sessions.c.finished_at.is_(None))
            connection.execute(going_on.values(seen_at=self.now()))
        return self.find_session(project, session)

    def finish_session(self, project: str, session: str, ending: Mapping[str, Any]) -> Session:
        """The client says that it is over; to say so again changes nothing."""
        mine = (live_sessions.c.id == session, live_sessions.c.project == project)
        with self.database.write() as connection:
            going_on = update(live_sessions).where(*mine, live_sessions.c.finished_at.is_(None))
            connection.execute(going_on.values(finished_at=self.now(), ending=dict(ending)))
        return self.find_session(project, session)

    def change_session(self, project: str, session: str, **values: Any) -> Session:
        """Change what a session is called: `label`, `display_name`."""
        mine = (live_sessions.c.id == session, live_sessions.c.project == project)
        with self.database.write() as connection:
            connection.execute(update(live_sessions).where(*mine).values(**values))
        return self.find_session(project, session)

    def list_sessions(self, project: str, *, offset: int = 0, limit: int = 20) -> Listed[Session]:
        """Sessions, the newest first."""
        where = (live_sessions.c.project == project,)
        return self._list(select(*SESSION_COLUMNS), live_sessions, where, Session, offset, limit)

    def create_model(self, new: NewModel, *, most: int | None = None) -> LiveModel:
        """A new model, or the one that the same session made before under this number; QuotaError above `most`."""
        now = self.now()
        with self.database.write() as connection:
            self.database.lock(connection, f"live models of {new.project}")
            mine = (live_models.c.session == new.session, live_models.c.model_seq_id == new.model_seq_id)
            query = select(*MODEL_COLUMNS).where(*mine, live_models.c.project == new.project)
            if (row := connection.execute(query).one_or_none()) is not None:
                return LiveModel(*row)
            _check_quota(connection, new.project, most, now - _SILENT_SECONDS)
            values = {**asdict(new), "id": new.id, "snapshot_steps": 0, "created_at": now, "last_request_at": now}
            connection.execute(insert(live_models).values(values))
            return LiveModel(*connection.execute(query).one())

    def find_model(self, project: str, model: str) -> LiveModel:
        """The model; NotFoundError when this project has none of that id."""
        query = select(*MODEL_COLUMNS).where(
            live_models.c.id == model, live_models.c.project == project, live_models.c.deleted_at.is_(None)
        )
        return LiveModel(*self._one(query, "model", model))

    def list_models(
        self,
        project: str,
        *,
        session: str | None = None,
        label: str | None = None,
        offset: int = 0,
        limit: int = 20,
    ) -> Listed[LiveModel]:
        """Models, the newest first; those of one session, or of the sessions with one label."""
        where: list[ColumnElement[bool]] = [live_models.c.project == project, live_models.c.deleted_at.is_(None)]
        if session is not None:
            where.append(live_models.c.session == session)
        if label is not None:
            labelled = select(live_sessions.c.id).where(
                live_sessions.c.project == project, live_sessions.c.label == label
            )
            where.append(live_models.c.session.in_(labelled))
        return self._list(select(*MODEL_COLUMNS), live_models, where, LiveModel, offset, limit)

    def list_unfinished(self) -> Sequence[LiveModel]:
        """Models of all projects for which commands wait: what a server that starts has to go on with."""
        waiting = select(live_commands.c.model).where(live_commands.c.state == "waiting")
        query = select(*MODEL_COLUMNS).where(live_models.c.number.in_(waiting), live_models.c.deleted_at.is_(None))
        with self.database.read() as connection:
            return [LiveModel(*row) for row in connection.execute(query.order_by(live_models.c.number))]

    def find_sampler(self, project: str, sampler: str) -> Sampler:
        """The sampler; NotFoundError when this project has none of that id."""
        query = select(*SAMPLER_COLUMNS).where(live_samplers.c.id == sampler, live_samplers.c.project == project)
        return Sampler(*self._one(query, "sampler", sampler))

    def list_samplers(self, project: str, session: str) -> Sequence[Sampler]:
        """The samplers of a session, in the order in which they were made."""
        where = (live_samplers.c.project == project, live_samplers.c.session == session)
        with self.database.read() as connection:
            rows = connection.execute(select(*SAMPLER_COLUMNS).where(*where).order_by(live_samplers.c.number))
            return [Sampler(*row) for row in rows]

    def create_sampler(self, sampler: Sampler) -> Sampler:
        """A new sampler, or the one that the same session made before under this number."""
        with self.database.write() as connection:
            return insert_sampler(connection, sampler)

    def touch_sampler(self, sampler: str) -> None:
        """Note that it is used, so that its weights are kept."""
        with self.database.write() as connection:
            used = update(live_samplers).where(live_samplers.c.id == sampler)
            connection.execute(used.values(used_at=self.now()))

    def find_checkpoint(self, project: str, path: str) -> Checkpoint:
        """The checkpoint at a `tinker://` path: of this project, or published by another."""
        return self._find_checkpoint(project, live_checkpoints.c.path == path, path)

    def find_checkpoint_model(self, project: str, ft_id: str) -> Checkpoint:
        """The checkpoint that is offered under this `ft:` id."""
        return self._find_checkpoint(project, live_checkpoints.c.id == ft_id.rpartition(":")[2], ft_id)

    def list_checkpoints(
        self,
        project: str,
        *,
        model: str | None = None,
        kind: str | None = None,
        unlike: str | None = None,
        offset: int = 0,
        limit: int = 100,
    ) -> Listed[Checkpoint]:
        """Checkpoints, the newest first; those of one model or kind, or without those of a kind."""
        where = [live_checkpoints.c.project == project, self._is_there()]
        if model is not None:
            where.append(live_checkpoints.c.model == model)
        if kind is not None:
            where.append(live_checkpoints.c.kind == kind)
        if unlike is not None:
            where.append(live_checkpoints.c.kind != unlike)
        return self._list(_CHECKPOINTS, live_checkpoints, where, Checkpoint, offset, limit)

    def change_checkpoint(self, project: str, path: str, **values: Any) -> Checkpoint:
        """Change what may change: `is_public`, `expires_at`, `user_metadata`. Only its own project may."""
        mine = (live_checkpoints.c.path == path, live_checkpoints.c.project == project, self._is_there())
        with self.database.write() as connection:
            if not connection.execute(update(live_checkpoints).where(*mine).values(**values)).rowcount:
                raise no_such("checkpoint", path)
        return self.find_checkpoint(project, path)

    def delete_checkpoint(self, project: str, path: str) -> None:
        """Forget a checkpoint; its files go with the next sweep, and samplers that use them go on until then."""
        mine = (live_checkpoints.c.path == path, live_checkpoints.c.project == project, self._is_there())
        with self.database.write() as connection:
            if not connection.execute(delete(live_checkpoints).where(*mine)).rowcount:
                raise no_such("checkpoint", path)

    def _find_checkpoint(self, project: str, which: ColumnElement[bool], named: str) -> Checkpoint:
        may_see = or_(live_checkpoints.c.project == project, live_checkpoints.c.is_public.is_(True))
        return Checkpoint(*self._one(_CHECKPOINTS.where(which, may_see, self._is_there()), "checkpoint", named))

    def _one(self, query: Select[Any], what: str, named: str) -> Any:
        with self.database.read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise no_such(what, named)
        return row

    def _is_there(self) -> ColumnElement[bool]:
        return or_(live_checkpoints.c.expires_at.is_(None), live_checkpoints.c.expires_at > self.now())

    def _list(
        self,
        query: Select[Any],
        table: Table,
        where: Sequence[ColumnElement[bool]],
        build: Callable[..., T],
        offset: int,
        limit: int,
    ) -> Listed[T]:
        with self.database.read() as connection:
            total = connection.scalar(select(func.count()).select_from(table).where(*where))
            page = query.where(*where).order_by(table.c.number.desc()).offset(offset).limit(limit)
            return Listed([build(*row) for row in connection.execute(page)], int(total or 0))


def insert_sampler(connection: Connection, sampler: Sampler) -> Sampler:
    """The same inside a transaction that does more."""
    mine = (
        live_samplers.c.session == sampler.session,
        live_samplers.c.sampling_session_seq_id == sampler.sampling_session_seq_id,
    )
    found = connection.execute(select(*SAMPLER_COLUMNS).where(*mine)).one_or_none()
    if found is None:
        connection.execute(insert(live_samplers).values(asdict(sampler)))
        return sampler
    same = Sampler(*found)
    if (same.project, same.model_path, same.model) != (sampler.project, sampler.model_path, sampler.model):
        raise ConflictError(
            f"sampling session {sampler.sampling_session_seq_id} of this session draws from something else",
            hint="each sampling session takes a number of its own",
        )
    return same


def _said(new: NewSession) -> tuple[Mapping[str, Any] | None, str, str | None, str | None]:
    return new.user_metadata, new.sdk_version, new.label, new.display_name


def _check_quota(connection: Connection, project: str, most: int | None, heard_since: float) -> None:
    """Models of sessions that go on count; those of sessions that ended or fell silent are only rows and files."""
    if most is None:
        return
    going_on = select(live_sessions.c.id).where(
        live_sessions.c.project == project, live_sessions.c.finished_at.is_(None), live_sessions.c.seen_at > heard_since
    )
    query = select(func.count()).where(live_models.c.session.in_(going_on), live_models.c.deleted_at.is_(None))
    if int(connection.scalar(query) or 0) >= most:
        raise QuotaError(
            f"{most} models of this project are in sessions that go on",
            hint="finish a session; `luthier serve --limit live_models=N` allows more",
        )
