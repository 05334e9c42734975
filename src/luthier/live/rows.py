"""What the tables of live models hold, as the rest of the package sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from luthier.jobs.tables import live_checkpoints, live_models, live_samplers, live_sessions
from luthier.runs.layout import model_id

WEIGHTS, SAMPLER_WEIGHTS, EXTERNAL_WEIGHTS = "weights", "sampler_weights", "external_weights"
KINDS = (WEIGHTS, SAMPLER_WEIGHTS, EXTERNAL_WEIGHTS)
SCHEME = "tinker://"


@dataclass(frozen=True)
class NewSession:
    """What a client says of itself when it comes."""

    tags: tuple[str, ...] = ()
    user_metadata: Mapping[str, Any] | None = None
    sdk_version: str = ""
    label: str | None = None
    """What the client calls its project; it has nothing to do with the project of the key."""
    display_name: str | None = None


@dataclass(frozen=True)
class Session:
    """A client that came, and when it was last heard of."""

    id: str
    project: str
    tags: list[str]
    user_metadata: Mapping[str, Any] | None
    sdk_version: str
    label: str | None
    display_name: str | None
    ending: Mapping[str, Any] | None
    created_at: float
    seen_at: float
    finished_at: float | None


@dataclass(frozen=True)
class NewModel:
    """A model that a client wants: a fresh adapter, or one that starts from a checkpoint."""

    project: str
    session: str
    model_seq_id: int
    base: str
    rank: int
    seed: int
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = True
    origin: str | None = None
    """The `tinker://` path that it starts from."""
    origin_folder: str | None = None
    """Where that lay, below the server's home."""
    origin_optimizer: bool = False
    """Whether the optimizer's state is taken from there, too."""
    user_metadata: Mapping[str, Any] | None = None

    @property
    def id(self) -> str:
        """The id that clients compute by themselves, too."""
        return f"{self.session}:train:{self.model_seq_id}"


@dataclass(frozen=True)
class LiveModel(NewModel):
    """A model as it is kept; `number` names it in the log of commands."""

    number: int = 0
    snapshot_seq: int | None = None
    """The command after which its newest snapshot was taken; None while there is none."""
    snapshot_steps: int = 0
    """Optimizer steps taken up to there."""
    corrupted: str | None = None
    """Why its state can no longer be trusted, if so."""
    created_at: float = 0.0
    last_request_at: float = 0.0
    deleted_at: float | None = None


@dataclass(frozen=True)
class Checkpoint:
    """Weights that were saved, with what is known of the model they came from."""

    id: str
    project: str
    model: str
    kind: str
    name: str
    path: str
    folder: str
    """Below the server's home."""
    seq: int
    steps: int
    bytes: int
    is_public: bool
    user_metadata: Mapping[str, Any] | None
    created_at: float
    expires_at: float | None
    session: str
    base: str
    rank: int
    train_mlp: bool
    train_attn: bool
    train_unembed: bool

    @property
    def ft_id(self) -> str:
        """The name under which it is an ordinary model; the last colon part is its id."""
        return model_id(self.base, self.id)


@dataclass(frozen=True)
class Sampler:
    """A client's place to draw samples from: a base model, or an adapter as it stood when the sampler was made."""

    id: str
    project: str
    session: str
    sampling_session_seq_id: int
    base: str
    model: str | None
    model_path: str | None
    folder: str | None
    """The adapter, below the server's home; None draws from the base itself."""
    kind: str
    """`snapshot`, or `inflight`: the newest weights that the model published so."""
    created_at: float
    used_at: float


SESSION_COLUMNS = tuple(live_sessions.c[each.name] for each in fields(Session))
MODEL_COLUMNS = tuple(live_models.c[each.name] for each in fields(LiveModel))
SAMPLER_COLUMNS = tuple(live_samplers.c[each.name] for each in fields(Sampler))
_OF_MODEL = ("session", "base", "rank", "train_mlp", "train_attn", "train_unembed")
CHECKPOINT_COLUMNS = tuple(
    live_models.c[each.name] if each.name in _OF_MODEL else live_checkpoints.c[each.name] for each in fields(Checkpoint)
)


def build_path(model: str, kind: str, name: str) -> str:
    """The `tinker://` path of a checkpoint."""
    return f"{SCHEME}{model}/{kind}/{name}"
