"""What each kind of command asks of the process that holds the model, and what its client is told."""

from __future__ import annotations

import base64
import hashlib
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import Connection, delete, insert, select, update

from luthier.errors import CallError, CheckpointError, ConflictError, LuthierError, StorageError
from luthier.host.work import Done
from luthier.jobs.tables import live_checkpoints, live_samplers
from luthier.live import saving
from luthier.live.bases import Base
from luthier.live.futures import Outcome
from luthier.live.log import Command
from luthier.live.rows import EXTERNAL_WEIGHTS, SAMPLER_WEIGHTS, WEIGHTS, Checkpoint, LiveModel, Sampler, build_path
from luthier.live.store import LiveStore, insert_sampler
from luthier.runs.layout import model_id

CREATE, LOAD_NEW = "create_model", "load_new_model"
FORWARD_BACKWARD, OPTIM_STEP, LOAD = "forward_backward", "optim_step", "load_weights"
SAVE, SAVE_SAMPLER, SAVE_EXTERNAL = "save_weights", "save_weights_for_sampler", "save_weights_external"
CHANGES = (FORWARD_BACKWARD, OPTIM_STEP, LOAD)
"""What is done again when a model is rebuilt from a snapshot."""

Run = Callable[..., Awaitable[Any]]


class Bench(Protocol):
    """Where a model is worked on; `luthier.host.bench.Bench`."""

    @property
    def is_alive(self) -> bool:
        """Whether it still answers."""

    async def do(self, kind: str, model: str = "", *, body: bytes = b"", **facts: Any) -> Done:
        """Have one work done."""


@dataclass(frozen=True)
class Made:
    """What a command came to, and what becomes true with it."""

    outcome: Outcome
    also: Callable[[Connection], None] | None = None


@dataclass(frozen=True)
class Shop:
    """What works need besides the bench."""

    store: LiveStore
    run: Run
    model: LiveModel
    base: Base
    steps: int
    """Optimizer steps that the model has taken."""


async def open_model(bench: Bench, model: LiveModel, folder: Path | None, *, optimizer: bool) -> None:
    """Have the model on the bench: from its folder, or with its first values."""
    path = model.origin if model.snapshot_seq is None and model.origin else "the newest snapshot of the model"
    with _told_by_path(folder, path):
        await bench.do(
            "open",
            model.id,
            rank=model.rank,
            alpha=saving.ALPHA,
            seed=model.seed,
            train_mlp=model.train_mlp,
            train_attn=model.train_attn,
            train_unembed=model.train_unembed,
            folder=None if folder is None else str(folder),
            optimizer=optimizer,
            project=model.project,
        )


@contextmanager
def _told_by_path(folder: Path | None, path: str) -> Iterator[None]:
    """What is wrong with the files of a checkpoint, told of its path and not of where they lie on this disk."""
    try:
        yield
    except LuthierError as error:
        if folder is None or error.code != CheckpointError.code:
            raise
        words = error.message.replace(str(folder), folder.name).removeprefix(f"{folder.name}: ")
        raise CheckpointError(f"{path}: {words}", hint="save and load another checkpoint") from error


async def change(bench: Bench, model: LiveModel, command: Command, body: bytes, home: Path) -> Done:
    """Do one of the commands that change the model."""
    if command.kind == FORWARD_BACKWARD:
        return await bench.do("forward_backward", model.id, body=body)
    if command.kind == OPTIM_STEP:
        return await bench.do("optim_step", model.id, **command.facts)
    folder = home / str(command.facts["folder"])
    with _told_by_path(folder, str(command.facts["path"])):
        return await bench.do("load", model.id, folder=str(folder), optimizer=bool(command.facts["optimizer"]))


async def work(shop: Shop, bench: Bench, command: Command) -> Made:
    """Do a command; raises what the bench, the disk or the rules say against it."""
    model = shop.model
    if command.kind == CREATE:
        return Made(Outcome({"type": "create_model", "model_id": model.id}))
    if command.kind == LOAD_NEW:
        return Made(Outcome({"type": "load_weights", "model_id": model.id, "path": model.origin}))
    if command.kind == LOAD:
        return await _load(shop, bench, command)
    if command.kind in CHANGES:
        done = await change(bench, model, command, command.body or b"", shop.store.home)
        return Made(_changed(command, done))
    if command.kind == SAVE_SAMPLER and command.facts.get("name") is None:
        return await _publish(shop, bench, command)
    return await _save(shop, bench, command)


def _changed(command: Command, done: Done) -> Outcome:
    if command.kind == FORWARD_BACKWARD:
        return Outcome({}, done.body)
    return Outcome({"type": "optim_step", "metrics": done.facts.get("metrics")})


async def _load(shop: Shop, bench: Bench, command: Command) -> Made:
    """The path is looked up now, since a command before this one may have made it; the log keeps where it led."""
    path = str(command.facts["path"])
    found = await shop.run(shop.store.find_checkpoint, shop.model.project, path)
    optimizer = bool(command.facts["optimizer"])
    check_loadable(found, optimizer=optimizer)
    _check_same(shop.model, found)
    command.facts = {**command.facts, "folder": found.folder}
    await change(bench, shop.model, command, b"", shop.store.home)
    return Made(Outcome({"type": "load_weights", "model_id": shop.model.id, "path": path}))


def check_loadable(found: Checkpoint, *, optimizer: bool) -> None:
    """Refuse to take an optimizer from where none was saved."""
    if optimizer and found.kind != WEIGHTS:
        raise CallError(
            f"`{found.path}` was saved as {found.kind}, which has no state of an optimizer",
            hint="load it without the optimizer, or save the state too: `save_state(name)` in the SDK",
            where="path",
        )


def _check_same(model: LiveModel, found: Checkpoint) -> None:
    """Refuse weights of another base, rank or layout."""
    for name in ("base", "rank", "train_mlp", "train_attn", "train_unembed"):
        mine, theirs = getattr(model, name), getattr(found, name)
        if mine != theirs:
            raise CallError(
                f"`{found.path}` has {name} {theirs!r}, and this model {mine!r}",
                hint="make a new model from it: `create_training_client_from_state(path)` in the SDK",
                where="path",
            )


async def _save(shop: Shop, bench: Bench, command: Command) -> Made:
    kind = {SAVE: WEIGHTS, SAVE_SAMPLER: SAMPLER_WEIGHTS, SAVE_EXTERNAL: EXTERNAL_WEIGHTS}[command.kind]
    facts = command.facts
    path = build_path(shop.model.id, kind, str(facts["name"]))
    await shop.run(_check_free, shop, path, bool(facts.get("overwrite")))
    row = {
        "id": _checkpoint_id(shop.model, command.seq),
        "project": shop.model.project,
        "model": shop.model.id,
        "kind": kind,
        "name": facts["name"],
        "path": path,
        "seq": command.seq,
        "steps": shop.steps,
        "is_public": False,
        "user_metadata": facts.get("user_metadata"),
    }
    folder = shop.store.folder_of(shop.model.id) / f"{kind}_{command.seq}"
    ft_id = model_id(shop.model.base, str(row["id"]))
    size = await (
        _save_state(shop, bench, folder)
        if kind == WEIGHTS
        else _save_adapter(shop, bench, folder, seq=command.seq, ft_id=ft_id)
    )
    row |= {"folder": shop.store.relative(folder), "bytes": size}

    def write(connection: Connection) -> None:
        now = shop.store.now()
        ttl = facts.get("ttl_seconds")
        connection.execute(delete(live_checkpoints).where(live_checkpoints.c.path == path))
        expires = None if ttl is None else now + float(ttl)
        connection.execute(insert(live_checkpoints).values({**row, "created_at": now, "expires_at": expires}))

    return Made(Outcome({"type": command.kind, "path": path}), write)


def _checkpoint_id(model: LiveModel, seq: int) -> str:
    """The same in each life of a command: a folder that was sealed before a crash names it already."""
    digest = hashlib.sha256(f"{model.project}/{model.number}/{model.id}/{seq}".encode()).digest()
    return "ckpt-" + base64.b32encode(digest[:15]).decode().lower()


def _check_free(shop: Shop, path: str, overwrite: bool) -> None:
    """A name that is taken stays what it is, unless the client says otherwise."""
    if overwrite:
        return
    where = (live_checkpoints.c.path == path, live_checkpoints.c.project == shop.model.project)
    with shop.store.database.read() as connection:
        row = connection.execute(select(live_checkpoints.c.expires_at).where(*where)).one_or_none()
    if row is not None and (row[0] is None or row[0] > shop.store.now()):
        raise ConflictError(
            f"there is a checkpoint at `{path}` already",
            hint="take another name, save with overwrite=True where the call has it, or delete that one first",
            where="path",
        )


async def _save_state(shop: Shop, bench: Bench, folder: Path) -> int:
    """Weights and optimizer; what an earlier life of the same command finished is taken as it is."""
    size = await shop.run(saving.find_size, folder)
    if size is None:
        done = await _write(shop, bench, "state", folder)
        size = int(done.facts.get("bytes", 0))
    return int(size)


async def _save_adapter(shop: Shop, bench: Bench, folder: Path, *, seq: int, ft_id: str) -> int:
    size = await shop.run(saving.find_size, folder)
    if size is None:
        made = folder.with_name(f"{folder.name}.made")
        await shop.run(_clear, made)
        await _write(shop, bench, "adapter", made)

        def finish() -> int:
            return saving.seal_adapter(made, folder, shop.model, shop.base, seq=seq, steps=shop.steps, ft_id=ft_id)

        size = await shop.run(finish)
    return int(size)


async def _write(shop: Shop, bench: Bench, what: str, folder: Path) -> Done:
    """Once more where it fails: the process of a server that was killed may still be writing the same folder."""
    try:
        return await bench.do("save", shop.model.id, what=what, folder=str(folder))
    except LuthierError as error:
        if error.code != StorageError.code:
            raise
        await shop.run(_clear, folder)
        return await bench.do("save", shop.model.id, what=what, folder=str(folder))


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


async def save_snapshot(shop: Shop, bench: Bench, seq: int) -> None:
    """The state after a command, to rebuild the model from; what a crash left there before is written again."""
    folder = snapshot_folder(shop.store, shop.model, seq)
    await bench.do("save", shop.model.id, what="state", folder=str(folder))


def snapshot_folder(store: LiveStore, model: LiveModel, seq: int) -> Path:
    """Where the snapshot after a command lies."""
    return store.folder_of(model.id) / f"state_{seq}"


async def _publish(shop: Shop, bench: Bench, command: Command) -> Made:
    """Weights for one sampler, without a name; an inflight one is for all such samplers of the model."""
    model, facts = shop.model, command.facts
    folder = shop.store.folder_of(model.id) / f"sampler_{command.seq}"
    await _save_adapter(shop, bench, folder, seq=command.seq, ft_id=f"{model.id}/{command.seq}")
    relative, now = shop.store.relative(folder), shop.store.now()
    sampler = Sampler(
        id=f"{model.session}:sample:{facts['sampling_session_seq_id']}",
        project=model.project,
        session=model.session,
        sampling_session_seq_id=int(facts["sampling_session_seq_id"]),
        base=model.base,
        model=model.id,
        model_path=None,
        folder=relative,
        kind=str(facts.get("kind") or "snapshot"),
        created_at=now,
        used_at=now,
    )

    def write(connection: Connection) -> None:
        made = insert_sampler(connection, sampler)
        if made.kind == "inflight":
            shared = (live_samplers.c.model == model.id, live_samplers.c.kind == "inflight")
            connection.execute(update(live_samplers).where(*shared).values(folder=relative))

    answer = {"type": "save_weights_for_sampler", "path": None, "sampling_session_id": sampler.id}
    return Made(Outcome(answer), write)
