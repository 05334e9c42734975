"""Checkpoints of a run: weights and training state saved whole, old ones pruned, the newest valid one found.

`checkpoint_step_N` holds the weights and is sealed first; `training_state/step_N` holds what resuming needs besides,
is sealed second, and its manifest names the hash of the weights' manifest: both, or neither, are a checkpoint.
The fact `needs` lists steps whose weights a checkpoint cannot do without, such as the best so far: they are kept as
long as it is, and where they are broken it is of no use either.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.errors import CheckpointError
from luthier.runs.layout import TRAINING_STATE, checkpoint_name, state_name
from luthier.runs.manifest import Manifest, drop_drafts, pass_crash_point, read_manifest, reserve_check, seal

Writer = Callable[[Path], None]
"""Fills the folder it is given; called in the saving thread, so it must own what it writes."""

CRASH_POINTS = ("before_state", "after_state", "in_prune", "after_prune")
NEEDS = "needs"
_WEIGHTS_HASH = "weights_manifest"
_HINT = "`luthier resume` goes on from the newest checkpoint that is whole"
_STEP_OF_WEIGHTS = re.compile(r"checkpoint_step_(\d+)")
_STEP_OF_STATE = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class SavedCheckpoint:
    """What was saved, how long it took and how large it is; the folders were read back and found whole."""

    step: int
    weights: Path
    state: Path
    seconds: float
    size_bytes: int


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint whose files are all what their manifests say."""

    step: int
    weights: Path
    state: Path
    facts: dict[str, Any]


@dataclass(frozen=True)
class BrokenPoint:
    """A checkpoint that cannot be used, and why."""

    step: int
    path: Path
    reason: str


@dataclass(frozen=True)
class _Saving:
    step: int
    write_weights: Writer
    write_state: Writer
    facts: Mapping[str, Any]


class CheckpointStore:
    """Saves and finds the checkpoints of one run folder; one process may save at a time."""

    def __init__(self, run_folder: Path, *, keep_weights: int | None = None, keep_states: int = 2) -> None:
        self._folder = run_folder
        self._keep_weights = keep_weights
        self._keep_states = keep_states
        self._needs_of_verified: dict[int, tuple[int, ...]] = {}
        self._size_bytes = 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved: SavedCheckpoint | None = None

    def weights_path(self, step: int) -> Path:
        """Where the weights of a step lie."""
        return self._folder / checkpoint_name(step)

    def state_path(self, step: int) -> Path:
        """Where the training state of a step lies."""
        return self._folder / TRAINING_STATE / state_name(step)

    def save(self, step: int, write_weights: Writer, write_state: Writer, facts: Mapping[str, Any]) -> SavedCheckpoint:
        """Save both folders durably, read them back, and only then prune older ones."""
        self.wait()
        return self._save(_Saving(step, write_weights, write_state, facts))

    def save_in_background(
        self,
        step: int,
        write_weights: Writer,
        write_state: Writer,
        facts: Mapping[str, Any],
        *,
        on_saved: Callable[[SavedCheckpoint], None] | None = None,
    ) -> None:
        """The same in a thread, after the save before it is done; raises what that one failed with.

        `on_saved` is called in the thread. The writers must not read what training goes on to change.
        """
        self.wait()
        saving = _Saving(step, write_weights, write_state, dict(facts))

        def work() -> None:
            try:
                self._saved = self._save(saving)
                if on_saved:
                    on_saved(self._saved)
            except BaseException as error:  # the edge of the thread: `wait` raises it where it is seen
                self._error = error

        self._thread = threading.Thread(target=work, name=f"save step {step}", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> SavedCheckpoint | None:
        """Wait for the save in the background, raise what it failed with, and tell what was saved last.

        With `seconds`, not longer than so many: then it may be under way still.
        """
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return self._saved
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._saved

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way in the background."""
        return self._thread is not None and self._thread.is_alive()

    def list_steps(self) -> list[int]:
        """Steps of which weights or state are there, the newest first; nothing is checked."""
        weights = _steps(self._folder, _STEP_OF_WEIGHTS)
        return sorted(weights | _steps(self._folder / TRAINING_STATE, _STEP_OF_STATE), reverse=True)

    def find_newest(self) -> tuple[ResumePoint | None, list[BrokenPoint]]:
        """The newest checkpoint that is whole in both parts, and the newer ones that are not, each with its reason."""
        broken: list[BrokenPoint] = []
        for step in self.list_steps():
            try:
                return self.check(step), broken
            except CheckpointError as error:
                broken.append(BrokenPoint(step, Path(error.where), error.message))
        return None, broken

    def check(self, step: int) -> ResumePoint:
        """The checkpoint of a step, every byte checked of it and of what it needs; raises CheckpointError."""
        point = self._check_own(step)
        for other in _needs(point.facts):
            try:
                read_manifest(self.weights_path(other))
            except CheckpointError as error:
                raise CheckpointError(
                    f"{checkpoint_name(step)} cannot do without another one: {error.message}",
                    hint=_HINT,
                    where=error.where,
                ) from None
        return point

    def _check_own(self, step: int) -> ResumePoint:
        weights, state = self._read(step)
        facts = {key: value for key, value in state.facts.items() if key != _WEIGHTS_HASH}
        if state.facts.get(_WEIGHTS_HASH) != weights.digest:
            raise CheckpointError(
                f"{checkpoint_name(step)}: its weights and its training state are not of one save",
                hint=_HINT,
                where=str(self.weights_path(step)),
            )
        self._size_bytes = weights.size_bytes + state.size_bytes
        return ResumePoint(step, self.weights_path(step), self.state_path(step), facts)

    def _read(self, step: int) -> tuple[Manifest, Manifest]:
        weights = read_manifest(self.weights_path(step))
        state = self.state_path(step)
        if not state.is_dir():
            raise CheckpointError(
                f"{TRAINING_STATE}/{state_name(step)} is missing",
                hint=_HINT,
                where=str(state),
            )
        return weights, read_manifest(state)

    def _save(self, saving: _Saving) -> SavedCheckpoint:
        started = time.monotonic()
        step = saving.step
        weights, state = self.weights_path(step), self.state_path(step)
        self._needs_of_verified.pop(step, None)
        self._drop_drafts()
        reserve_check(self._folder, self._size_bytes)
        facts = {**saving.facts, "step": step}
        of_weights = seal(weights, saving.write_weights, {"step": step})
        pass_crash_point("before_state")
        seal(state, saving.write_state, {**facts, _WEIGHTS_HASH: of_weights.digest})
        pass_crash_point("after_state")
        self._needs_of_verified[step] = _needs(self._check_own(step).facts)
        self._prune()
        pass_crash_point("after_prune")
        return SavedCheckpoint(step, weights, state, time.monotonic() - started, self._size_bytes)

    def _drop_drafts(self) -> None:
        drop_drafts(self._folder, checkpoint_name("*"))
        drop_drafts(self._folder / TRAINING_STATE, state_name("*"))

    def _prune(self) -> None:
        """Remove states beyond the newest valid ones, then weights that nothing needs."""
        kept_states = self._newest_valid_states()
        if not kept_states:
            return
        oldest_kept = min(kept_states)
        for step in _steps(self._folder / TRAINING_STATE, _STEP_OF_STATE):
            if step < oldest_kept and len(kept_states) == self._keep_states:
                self._remove(self.state_path(step))
        if self._keep_weights is None:
            return
        steps = sorted(_steps(self._folder, _STEP_OF_WEIGHTS), reverse=True)
        needed = {*steps[: self._keep_weights], *kept_states}
        needed.update(*(self._needs_of_verified[step] for step in kept_states))
        for step in steps:
            if step not in needed:
                self._remove(self.weights_path(step))

    def _newest_valid_states(self) -> list[int]:
        """The steps of the newest `keep_states` valid checkpoints; each is hashed once in a process."""
        found: list[int] = []
        for step in self.list_steps():
            if len(found) == self._keep_states:
                break
            if step in self._needs_of_verified or self._verify(step):
                found.append(step)
        return found

    def _verify(self, step: int) -> bool:
        try:
            self._needs_of_verified[step] = _needs(self.check(step).facts)
        except CheckpointError:
            return False
        return True

    def _remove(self, folder: Path) -> None:
        """Out of sight in one rename first: half a folder must never look like a checkpoint that broke."""
        doomed = folder.with_name(f"{folder.name}.tmp-old")
        folder.rename(doomed)
        pass_crash_point("in_prune")
        shutil.rmtree(doomed, ignore_errors=True)


def _steps(folder: Path, pattern: re.Pattern[str]) -> set[int]:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return {int(match[1]) for name in names if (match := pattern.fullmatch(name))}


def _needs(facts: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(int(step) for step in facts.get(NEEDS, ()))
