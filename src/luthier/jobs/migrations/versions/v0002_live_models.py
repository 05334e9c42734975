"""The tables of models that clients train step by step."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "v0002"
down_revision = "v0001"

_STATES = "'waiting', 'done', 'failed', 'rejected'"
_KINDS = "'weights', 'sampler_weights', 'external_weights'"


def upgrade() -> None:
    """Make them; nothing that was there is touched."""
    _make_sessions()
    _make_models()
    _make_commands()
    _make_checkpoints()
    _make_samplers()


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


def _flags(*names: str) -> list[sa.Column[Any]]:
    return [sa.Column(name, sa.Boolean(), nullable=False) for name in names]


def _make_sessions() -> None:
    op.create_table(
        "live_sessions",
        _number(),
        *_id("live_sessions"),
        *_texts("project", "tags"),
        *_texts("user_metadata", nullable=True),
        *_texts("sdk_version"),
        *_texts("label", "display_name", "ending", nullable=True),
        *_times("created_at", "seen_at"),
        *_times("finished_at", nullable=True),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_live_sessions_project_number", "live_sessions", ["project", "number"])


def _make_models() -> None:
    op.create_table(
        "live_models",
        _number(),
        *_id("live_models"),
        *_texts("project", "session"),
        *_counts("model_seq_id"),
        *_texts("base"),
        sa.Column("rank", sa.Integer(), nullable=False),
        *_counts("seed"),
        *_flags("train_mlp", "train_attn", "train_unembed"),
        *_texts("origin", "origin_folder", nullable=True),
        *_flags("origin_optimizer"),
        *_texts("user_metadata", nullable=True),
        *_counts("snapshot_seq", nullable=True),
        *_counts("snapshot_steps"),
        *_texts("corrupted", nullable=True),
        *_times("created_at", "last_request_at"),
        *_times("deleted_at", nullable=True),
        sa.UniqueConstraint("session", "model_seq_id", name="uq_live_models_session_model_seq_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_live_models_project_number", "live_models", ["project", "number"])


def _make_commands() -> None:
    waiting = sa.text("state = 'waiting'")
    op.create_table(
        "live_commands",
        sa.Column("model", _whole(), sa.ForeignKey("live_models.number", ondelete="CASCADE"), primary_key=True),
        sa.Column("seq", sa.BigInteger(), primary_key=True, autoincrement=False),
        *_texts("project", "request", "kind", "facts"),
        sa.Column("body", sa.LargeBinary(), nullable=True),
        *_texts("state"),
        *_texts("answer", nullable=True),
        sa.Column("result", sa.LargeBinary(), nullable=True),
        *_times("created_at"),
        *_times("ended_at", nullable=True),
        sa.UniqueConstraint("request", name="uq_live_commands_request"),
        sa.CheckConstraint(f"state IN ({_STATES})", name="ck_live_commands_state"),
    )
    op.create_index(
        "ix_live_commands_waiting", "live_commands", ["model"], sqlite_where=waiting, postgresql_where=waiting
    )
    op.create_index("ix_live_commands_ended_at", "live_commands", ["ended_at"])


def _make_checkpoints() -> None:
    op.create_table(
        "live_checkpoints",
        _number(),
        *_id("live_checkpoints"),
        *_texts("project", "model", "kind", "name"),
        *_texts("path", "folder"),
        *_counts("seq", "steps", "bytes"),
        *_flags("is_public"),
        *_texts("user_metadata", nullable=True),
        *_times("created_at"),
        *_times("expires_at", nullable=True),
        sa.UniqueConstraint("path", name="uq_live_checkpoints_path"),
        sa.CheckConstraint(f"kind IN ({_KINDS})", name="ck_live_checkpoints_kind"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_live_checkpoints_expires_at", "live_checkpoints", ["expires_at"])
    op.create_index("ix_live_checkpoints_project_number", "live_checkpoints", ["project", "number"])
    op.create_index("ix_live_checkpoints_model_number", "live_checkpoints", ["model", "number"])


def _make_samplers() -> None:
    op.create_table(
        "live_samplers",
        _number(),
        *_id("live_samplers"),
        *_texts("project", "session"),
        *_counts("sampling_session_seq_id"),
        *_texts("base"),
        *_texts("model", "model_path", "folder", nullable=True),
        *_texts("kind"),
        *_times("created_at", "used_at"),
        sa.UniqueConstraint(
            "session", "sampling_session_seq_id", name="uq_live_samplers_session_sampling_session_seq_id"
        ),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_live_samplers_project_number", "live_samplers", ["project", "number"])
    op.create_index("ix_live_samplers_model", "live_samplers", ["model"])
