"""What training through the service leaves behind, written straight into the tables and onto the disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import insert

from luthier.jobs.database import Database
from luthier.jobs.ids import new_id
from luthier.jobs.tables import live_checkpoints
from luthier.live.rows import Checkpoint, LiveModel, NewModel, NewSession, build_path
from luthier.live.store import LiveStore
from luthier.runs.manifest import seal
from luthier.weights.peft import AdapterConfig, write_adapter

_SITE = "model.layers.0.self_attn.q_proj"


@dataclass
class LeftBehind:
    """The live service's rows and folders of one project."""

    store: LiveStore
    project: str = "default"

    @classmethod
    def at(cls, home: Path, project: str = "default") -> LeftBehind:
        """In a home of its own, whose database this opens."""
        database = Database.at_home(home)
        database.migrate()
        return cls(LiveStore(database, home), project)

    def a_model(self, session: str | None = None, *, number: int = 0, **more: Any) -> LiveModel:
        """A model, in a session of its own unless one is named."""
        session = session or self.store.create_session(self.project, NewSession(label=more.pop("label", None))).id
        given = {"base": "practice", "rank": 8, "seed": 1, **more}
        return self.store.create_model(NewModel(self.project, session, number, **given))

    def a_checkpoint(self, model: LiveModel, kind: str = "sampler_weights", name: str = "final", **more: Any) -> str:
        """A checkpoint of the model with real files; returns its path."""
        folder = self.store.folder_of(model.id) / f"{kind}_{abs(hash(name)) % 1000}"
        size = seal(folder, write_practice_adapter, {"kind": "live_adapter"}).size_bytes
        path = build_path(model.id, kind, name)
        values = {
            "id": new_id("ckpt-"),
            "project": self.project,
            "model": model.id,
            "kind": kind,
            "name": name,
            "path": path,
            "folder": self.store.relative(folder),
            "seq": 3,
            "steps": 1,
            "bytes": size,
            "is_public": False,
            "user_metadata": None,
            "created_at": self.store.now(),
            "expires_at": None,
        }
        with self.store.database.write() as connection:
            connection.execute(insert(live_checkpoints).values(values | more))
        return path

    def find(self, path: str) -> Checkpoint:
        """The checkpoint at a path."""
        return self.store.find_checkpoint(self.project, path)


def write_practice_adapter(folder: Path) -> None:
    """An adapter over one layer of the practice model, that changes what it says."""
    random = np.random.default_rng(1)
    tensors = {f"{_SITE}.lora_A": random.normal(0, 0.3, (8, 192)), f"{_SITE}.lora_B": random.normal(0, 0.3, (256, 8))}
    config = AdapterConfig(base="practice", rank=8, alpha=32, targets=(_SITE,))
    write_adapter(folder, config, {name: values.astype(np.float32) for name, values in tensors.items()})
