"""The tables of a server. Each row names its project; each question about a row names it, too."""

from __future__ import annotations

from typing import Any

import orjson
from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.types import TypeDecorator

from luthier.jobs.job import State

_LARGEST = 2**63 - 1


class PlainText(TypeDecorator[str]):
    """Text that every database takes: what UTF-8 or PostgreSQL refuses (lone surrogates, NUL) is replaced."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else plain(value)


class Json(TypeDecorator[Any]):
    """JSON as text, read and written by orjson. Numbers that are none become null."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else dump(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        return None if value is None else orjson.loads(value)


def plain(value: str) -> str:
    """The text without what a database would refuse."""
    if value.isascii() and "\x00" not in value:
        return value
    return value.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def dump(value: Any) -> str:
    """JSON of anything: what JSON cannot hold is shown as text."""
    try:
        rendered = orjson.dumps(value, default=_shown, option=orjson.OPT_NON_STR_KEYS)
    except (TypeError, UnicodeError):
        rendered = b"\\u0000"
    if b"\\u0000" in rendered:
        rendered = orjson.dumps(_plain_value(value), default=_shown)
    return rendered.decode()


def _shown(value: Any) -> Any:
    return dict(value) if hasattr(value, "keys") else str(value)


def _plain_value(value: Any) -> Any:
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value if abs(value) <= _LARGEST else str(value)
    if hasattr(value, "keys"):
        return {plain(str(key)): _plain_value(value[key]) for key in value.keys()}  # noqa: SIM118
    if isinstance(value, list | tuple):
        return [_plain_value(each) for each in value]
    return value


def _number() -> Column[int]:
    """Counts rows in the order in which they came, whatever the clock says; never given twice."""
    return Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True)


_STATES = ", ".join(f"'{state}'" for state in State)
_WAITING = "holder IS NULL AND state IN ('validating', 'queued')"

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

keys = Table(
    "keys",
    metadata,
    _number(),
    Column("id", PlainText, nullable=False, unique=True),
    Column("project", PlainText, nullable=False),
    Column("name", PlainText, nullable=False),
    Column("scopes", PlainText, nullable=False),
    Column("sha256", PlainText, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Column("revoked_at", Double),
    Column("last_used_at", Double),
    sqlite_autoincrement=True,
)

files = Table(
    "files",
    metadata,
    _number(),
    Column("id", PlainText, nullable=False, unique=True),
    Column("project", PlainText, nullable=False),
    Column("purpose", PlainText, nullable=False),
    Column("filename", PlainText, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", PlainText, nullable=False, index=True),
    Column("status", PlainText, nullable=False),
    Column("rows", BigInteger),
    Column("report", Json),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Index(None, "project", "number"),
    sqlite_autoincrement=True,
)

uploads = Table(
    "uploads",
    metadata,
    _number(),
    Column("id", PlainText, nullable=False, unique=True),
    Column("project", PlainText, nullable=False),
    Column("purpose", PlainText, nullable=False),
    Column("filename", PlainText, nullable=False),
    Column("mime_type", PlainText, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("status", PlainText, nullable=False),
    Column("file", PlainText),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    sqlite_autoincrement=True,
)

upload_parts = Table(
    "upload_parts",
    metadata,
    _number(),
    Column("id", PlainText, nullable=False, unique=True),
    Column("upload", ForeignKey("uploads.number", ondelete="CASCADE"), nullable=False, index=True),
    Column("project", PlainText, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
    sqlite_autoincrement=True,
)

jobs = Table(
    "jobs",
    metadata,
    _number(),
    Column("id", PlainText, nullable=False, unique=True),
    Column("project", PlainText, nullable=False),
    Column("dialect", PlainText, nullable=False),
    Column("state", PlainText, nullable=False),
    Column("spec", Json, nullable=False),
    Column("request", Json, nullable=False),
    Column("base", PlainText, nullable=False),
    Column("training_file", PlainText, index=True),
    Column("validation_file", PlainText, index=True),
    Column("suffix", PlainText),
    Column("metadata", Json, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("needs", Json, nullable=False),
    Column("key", PlainText),
    Column("attempt", Integer, nullable=False, default=0),
    Column("holder", PlainText),
    Column("crashes", Integer, nullable=False, default=0),
    Column("relayed", BigInteger, nullable=False, default=0),
    Column("last_seq", BigInteger, nullable=False, default=0),
    Column("model", PlainText, index=True),
    Column("model_deleted_at", Double),
    Column("trained_tokens", BigInteger),
    Column("step", BigInteger),
    Column("steps", BigInteger),
    Column("error_code", PlainText),
    Column("error_message", PlainText),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Column("started_at", Double),
    Column("finished_at", Double),
    CheckConstraint(f"state IN ({_STATES})", name="state"),
    Index(None, "project", "number"),
    Index(None, "state", "project"),
    Index(
        "ix_jobs_waiting", "priority", "project", "number", sqlite_where=text(_WAITING), postgresql_where=text(_WAITING)
    ),
    sqlite_autoincrement=True,
)

attempts = Table(
    "attempts",
    metadata,
    Column("job", ForeignKey("jobs.number", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("project", PlainText, nullable=False),
    Column("kind", PlainText, nullable=False),
    Column("worker", PlainText, nullable=False, index=True),
    Column("machine", PlainText, nullable=False, index=True),
    Column("renewals", BigInteger, nullable=False, default=0),
    Column("pid", BigInteger),
    Column("process_started", PlainText),
    Column("token", PlainText),
    Column("started_at", Double, nullable=False),
    Column("ended_at", Double),
    Column("ending", PlainText),
    Column("error_code", PlainText),
    Column("message", PlainText, nullable=False, default=""),
    # The database itself lets no second attempt hold a job.
    Index(
        "uq_attempts_holding",
        "job",
        unique=True,
        sqlite_where=text("ended_at IS NULL"),
        postgresql_where=text("ended_at IS NULL"),
    ),
)

events = Table(
    "events",
    metadata,
    Column("job", ForeignKey("jobs.number", ondelete="CASCADE"), primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("project", PlainText, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("level", PlainText, nullable=False),
    Column("kind", PlainText, nullable=False),
    Column("message", PlainText, nullable=False),
    Column("step", BigInteger),
    Column("data", Json, nullable=False),
    Index(None, "job", "kind", "seq"),
    Index(
        "ix_events_steps",
        "job",
        "kind",
        "step",
        "seq",
        sqlite_where=text("step IS NOT NULL"),
        postgresql_where=text("step IS NOT NULL"),
    ),
    sqlite_with_rowid=False,
)

workers = Table(
    "workers",
    metadata,
    Column("id", PlainText, primary_key=True),
    Column("machine", PlainText, nullable=False),
    Column("capacity", Json, nullable=False),
    Column("free", Json, nullable=False),
    Column("versions", Json, nullable=False),
    Column("beats", BigInteger, nullable=False, default=0),
    Column("started_at", Double, nullable=False),
    Column("seen_at", Double, nullable=False),
)

idempotency = Table(
    "idempotency",
    metadata,
    _number(),
    Column("project", PlainText, nullable=False),
    Column("key", PlainText, nullable=False),
    Column("header", PlainText),
    Column("body_hash", PlainText, nullable=False),
    Column("job", ForeignKey("jobs.number", ondelete="CASCADE"), nullable=False, index=True),
    Column("created_at", Double, nullable=False, index=True),
    UniqueConstraint("project", "key", "header"),
    Index(None, "key", "body_hash"),
    sqlite_autoincrement=True,
)

live_sessions = Table(
    "live_sessions",
    metadata,
    _number(),
    Column("id", PlainText, nullable=False, unique=True),
    Column("project", PlainText, nullable=False),
    Column("tags", Json, nullable=False),
    Column("user_metadata", Json),
    Column("sdk_version", PlainText, nullable=False),
    Column("label", PlainText),
    Column("display_name", PlainText),
    Column("ending", Json),
    Column("created_at", Double, nullable=False),
    Column("seen_at", Double, nullable=False),
    Column("finished_at", Double),
    Index(None, "project", "number"),
    sqlite_autoincrement=True,
)

live_models = Table(
    "live_models",
    metadata,
    _number(),
    Column("id", PlainText, nullable=False, unique=True),
    Column("project", PlainText, nullable=False),
    Column("session", PlainText, nullable=False),
    Column("model_seq_id", BigInteger, nullable=False),
    Column("base", PlainText, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("train_mlp", Boolean, nullable=False),
    Column("train_attn", Boolean, nullable=False),
    Column("train_unembed", Boolean, nullable=False),
    Column("origin", PlainText),
    Column("origin_folder", PlainText),
    Column("origin_optimizer", Boolean, nullable=False),
    Column("user_metadata", Json),
    Column("snapshot_seq", BigInteger),
    Column("snapshot_steps", BigInteger, nullable=False),
    Column("corrupted", PlainText),
    Column("created_at", Double, nullable=False),
    Column("last_request_at", Double, nullable=False),
    Column("deleted_at", Double),
    UniqueConstraint("session", "model_seq_id"),
    Index(None, "project", "number"),
    sqlite_autoincrement=True,
)

live_commands = Table(
    "live_commands",
    metadata,
    Column("model", ForeignKey("live_models.number", ondelete="CASCADE"), primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("project", PlainText, nullable=False),
    Column("request", PlainText, nullable=False, unique=True),
    Column("kind", PlainText, nullable=False),
    Column("facts", Json, nullable=False),
    Column("body", LargeBinary),
    Column("state", PlainText, nullable=False),
    Column("answer", Json),
    Column("result", LargeBinary),
    Column("created_at", Double, nullable=False),
    Column("ended_at", Double),
    CheckConstraint("state IN ('waiting', 'done', 'failed', 'rejected')", name="state"),
    Index(
        "ix_live_commands_waiting",
        "model",
        sqlite_where=text("state = 'waiting'"),
        postgresql_where=text("state = 'waiting'"),
    ),
    Index(None, "ended_at"),
)

live_checkpoints = Table(
    "live_checkpoints",
    metadata,
    _number(),
    Column("id", PlainText, nullable=False, unique=True),
    Column("project", PlainText, nullable=False),
    Column("model", PlainText, nullable=False),
    Column("kind", PlainText, nullable=False),
    Column("name", PlainText, nullable=False),
    Column("path", PlainText, nullable=False, unique=True),
    Column("folder", PlainText, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("steps", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("is_public", Boolean, nullable=False),
    Column("user_metadata", Json),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, index=True),
    CheckConstraint("kind IN ('weights', 'sampler_weights', 'external_weights')", name="kind"),
    Index(None, "project", "number"),
    Index(None, "model", "number"),
    sqlite_autoincrement=True,
)

live_samplers = Table(
    "live_samplers",
    metadata,
    _number(),
    Column("id", PlainText, nullable=False, unique=True),
    Column("project", PlainText, nullable=False),
    Column("session", PlainText, nullable=False),
    Column("sampling_session_seq_id", BigInteger, nullable=False),
    Column("base", PlainText, nullable=False),
    Column("model", PlainText),
    Column("model_path", PlainText),
    Column("folder", PlainText),
    Column("kind", PlainText, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("used_at", Double, nullable=False),
    UniqueConstraint("session", "sampling_session_seq_id"),
    Index(None, "project", "number"),
    Index(None, "model"),
    sqlite_autoincrement=True,
)
