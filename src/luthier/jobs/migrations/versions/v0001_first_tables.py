"""The first tables, and the rules about jobs that the database itself keeps."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "v0001"
down_revision = None

_STATES = ("validating", "queued", "running", "pausing", "paused", "cancelling", "succeeded", "failed", "cancelled")
_FOLLOWS = {
    "validating": ("queued", "failed", "cancelled"),
    "queued": ("running", "paused", "failed", "cancelled"),
    "running": ("queued", "pausing", "cancelling", "paused", "succeeded", "failed"),
    "pausing": ("paused", "queued", "cancelling", "succeeded", "failed"),
    "paused": ("queued", "cancelled"),
    "cancelling": ("cancelled",),
}
_FINAL = ("succeeded", "failed", "cancelled")
_FROZEN = ("model", "error_code", "error_message", "finished_at", "attempt", "trained_tokens", "last_seq")
_WAITING = "holder IS NULL AND state IN ('validating', 'queued')"


def upgrade() -> None:
    """Make everything."""
    _make_keys()
    _make_files()
    _make_jobs()
    _make_attempts_and_events()
    _make_workers_and_idempotency()
    if op.get_bind().dialect.name == "sqlite":
        _guard_jobs_in_sqlite()
    else:
        _guard_jobs_in_postgres()


def _number() -> sa.Column[Any]:
    return sa.Column("number", _whole(), primary_key=True, autoincrement=True)


def _whole() -> Any:
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _id(table: str) -> list[Any]:
    return [sa.Column("id", sa.Text(), nullable=False), sa.UniqueConstraint("id", name=f"uq_{table}_id")]


def _texts(*names: str, nullable: bool = False) -> list[sa.Column[Any]]:
    return [sa.Column(name, sa.Text(), nullable=nullable) for name in names]


def _counts(*names: str, nullable: bool = False) -> list[sa.Column[Any]]:
    return [sa.Column(name, sa.BigInteger(), nullable=nullable) for name in names]


def _times(*names: str, nullable: bool = False) -> list[sa.Column[Any]]:
    return [sa.Column(name, sa.Double(), nullable=nullable) for name in names]


def _job(*, primary_key: bool = False) -> sa.Column[Any]:
    return sa.Column(
        "job", _whole(), sa.ForeignKey("jobs.number", ondelete="CASCADE"), primary_key=primary_key, nullable=False
    )


def _where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def _make_keys() -> None:
    op.create_table(
        "keys",
        _number(),
        *_id("keys"),
        *_texts("project", "name"),
        *_texts("scopes", "sha256"),
        *_times("created_at"),
        *_times("expires_at", "revoked_at", "last_used_at", nullable=True),
        sqlite_autoincrement=True,
    )


def _make_files() -> None:
    op.create_table(
        "files",
        _number(),
        *_id("files"),
        *_texts("project", "purpose", "filename"),
        *_counts("bytes"),
        *_texts("sha256", "status"),
        *_counts("rows", nullable=True),
        *_texts("report", nullable=True),
        *_times("created_at"),
        *_times("expires_at", nullable=True),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_files_sha256", "files", ["sha256"])
    op.create_index("ix_files_project_number", "files", ["project", "number"])
    op.create_table(
        "uploads",
        _number(),
        *_id("uploads"),
        *_texts("project", "purpose", "filename", "mime_type"),
        *_counts("bytes"),
        *_texts("status"),
        *_texts("file", nullable=True),
        *_times("created_at", "expires_at"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "upload_parts",
        _number(),
        *_id("upload_parts"),
        sa.Column("upload", _whole(), sa.ForeignKey("uploads.number", ondelete="CASCADE"), nullable=False),
        *_texts("project"),
        *_counts("bytes"),
        *_times("created_at"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_upload_parts_upload", "upload_parts", ["upload"])


def _make_jobs() -> None:
    states = ", ".join(f"'{state}'" for state in _STATES)
    op.create_table(
        "jobs",
        _number(),
        *_id("jobs"),
        *_texts("project"),
        *_texts("dialect", "state"),
        *_texts("spec", "request", "base"),
        *_texts("training_file", "validation_file", nullable=True),
        *_texts("suffix", nullable=True),
        *_texts("metadata"),
        sa.Column("priority", sa.Integer(), nullable=False),
        *_texts("needs"),
        *_texts("key", nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        *_texts("holder", nullable=True),
        sa.Column("crashes", sa.Integer(), nullable=False),
        *_counts("relayed", "last_seq"),
        *_texts("model", nullable=True),
        *_times("model_deleted_at", nullable=True),
        *_counts("trained_tokens", "step", "steps", nullable=True),
        *_texts("error_code", "error_message", nullable=True),
        *_times("created_at", "updated_at"),
        *_times("started_at", "finished_at", nullable=True),
        sa.CheckConstraint(f"state IN ({states})", name="ck_jobs_state"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_jobs_project_number", "jobs", ["project", "number"])
    op.create_index("ix_jobs_state_project", "jobs", ["state", "project"])
    for column in ("training_file", "validation_file", "model"):
        op.create_index(f"ix_jobs_{column}", "jobs", [column])
    op.create_index("ix_jobs_waiting", "jobs", ["priority", "project", "number"], **_where(_WAITING))


def _make_attempts_and_events() -> None:
    op.create_table(
        "attempts",
        _job(primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
        *_texts("project"),
        *_texts("kind", "worker"),
        *_texts("machine"),
        *_counts("renewals"),
        *_counts("pid", nullable=True),
        *_texts("process_started", "token", nullable=True),
        *_times("started_at"),
        *_times("ended_at", nullable=True),
        *_texts("ending", nullable=True),
        *_texts("error_code", nullable=True),
        *_texts("message"),
    )
    op.create_index("ix_attempts_worker", "attempts", ["worker"])
    op.create_index("ix_attempts_machine", "attempts", ["machine"])
    op.create_index("uq_attempts_holding", "attempts", ["job"], unique=True, **_where("ended_at IS NULL"))
    op.create_table(
        "events",
        _job(primary_key=True),
        sa.Column("seq", sa.BigInteger(), primary_key=True, autoincrement=False),
        *_texts("project"),
        *_times("created_at"),
        *_texts("level"),
        *_texts("kind", "message"),
        *_counts("step", nullable=True),
        *_texts("data"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_events_job_kind_seq", "events", ["job", "kind", "seq"])
    op.create_index("ix_events_steps", "events", ["job", "kind", "step", "seq"], **_where("step IS NOT NULL"))


def _make_workers_and_idempotency() -> None:
    op.create_table(
        "workers",
        sa.Column("id", sa.Text(), primary_key=True),
        *_texts("machine", "capacity", "free", "versions"),
        *_counts("beats"),
        *_times("started_at", "seen_at"),
    )
    op.create_table(
        "idempotency",
        _number(),
        *_texts("project"),
        *_texts("key"),
        *_texts("header", nullable=True),
        *_texts("body_hash"),
        _job(),
        *_times("created_at"),
        sa.UniqueConstraint("project", "key", "header", name="uq_idempotency_project_key_header"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_idempotency_job", "idempotency", ["job"])
    op.create_index("ix_idempotency_created_at", "idempotency", ["created_at"])
    op.create_index("ix_idempotency_key_body_hash", "idempotency", ["key", "body_hash"])


def _steps() -> str:
    return ", ".join(f"'{before} {after}'" for before, follows in _FOLLOWS.items() for after in follows)


def _guard_jobs_in_sqlite() -> None:
    final = ", ".join(f"'{state}'" for state in _FINAL)
    frozen = " OR ".join(f"OLD.{column} IS NOT NEW.{column}" for column in _FROZEN)
    op.execute(
        "CREATE TRIGGER jobs_follow BEFORE UPDATE ON jobs WHEN OLD.state <> NEW.state "  # noqa: S608 our own words
        f"AND (OLD.state || ' ' || NEW.state) NOT IN ({_steps()}) "
        "BEGIN SELECT RAISE(ABORT, 'a job does not go from its state to this one'); END"
    )
    op.execute(
        f"CREATE TRIGGER jobs_end BEFORE UPDATE ON jobs WHEN OLD.state IN ({final}) AND ({frozen}) "
        "BEGIN SELECT RAISE(ABORT, 'a job that has ended does not change'); END"
    )


def _guard_jobs_in_postgres() -> None:
    final = ", ".join(f"'{state}'" for state in _FINAL)
    frozen = " OR ".join(f"OLD.{column} IS DISTINCT FROM NEW.{column}" for column in _FROZEN)
    op.execute(
        "CREATE FUNCTION guard_jobs() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF OLD.state <> NEW.state AND (OLD.state || ' ' || NEW.state) NOT IN ({_steps()}) THEN "
        "RAISE integrity_constraint_violation USING MESSAGE = 'a job does not go from its state to this one'; END IF; "
        f"IF OLD.state IN ({final}) AND ({frozen}) THEN "
        "RAISE integrity_constraint_violation USING MESSAGE = 'a job that has ended does not change'; END IF; "
        "RETURN NEW; END $$"
    )
    op.execute("CREATE TRIGGER jobs_guard BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION guard_jobs()")
