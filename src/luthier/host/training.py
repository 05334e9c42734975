"""Models in training at a host: works of each in their order, those of different models joined into one pass.

A large request is cut into pieces by its own data alone, so that small ones are not held up for long and so that a
result does not depend on who else was there. A piece comes from the project that was given least, and there from the
model that was given least.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from luthier.engines.verbs import (
    AdapterLayout,
    Batch,
    Computed,
    Loss,
    OutOfMemory,
    Share,
    StepParams,
    Tenants,
)
from luthier.errors import CallError, HostError, LuthierError, NonFiniteError, OutOfMemoryError
from luthier.host.computing import Turns
from luthier.host.datums import Datum, LossOutput, LossRequest, check_loss_request, read_loss_request, write_loss_output
from luthier.host.token_losses import batch_of_datums, build_loss, outputs_of
from luthier.host.work import Done, Work
from luthier.runs.manifest import check_manifest, seal

KINDS = ("open", "forward_backward", "optim_step", "save", "load", "drop")
_TARGETS_OF_A_TOKEN = 64
Hear = Callable[[Done], None]


@dataclass(frozen=True)
class _Piece:
    """Some datums of a request, computed at once."""

    data: tuple[Datum, ...]
    batch: Batch
    loss: Loss | None

    @property
    def cost(self) -> int:
        """What it takes of a budget, in tokens."""
        return sum(map(_cost_of, self.data))


@dataclass
class _Passes:
    """A request in pieces, and what came of those that are done."""

    request: LossRequest
    pieces: list[_Piece]
    taken: int = 0
    done: list[Computed] = field(default_factory=list)
    is_alone: bool = False
    """Whether it is computed without others, after something went wrong among them."""

    @property
    def is_finished(self) -> bool:
        return len(self.done) == len(self.pieces)

    def output(self) -> LossOutput:
        """What the client is told."""
        outputs: list[Mapping[str, Any]] = []
        metrics: dict[str, float] = {}
        for piece, computed in zip(self.pieces, self.done, strict=True):
            outputs += outputs_of(piece.data, computed.logprobs)
            for name, value in self._metrics(piece, computed).items():
                metrics[name] = metrics.get(name, 0.0) + value
        return LossOutput(tuple(outputs), metrics)

    def _metrics(self, piece: _Piece, computed: Computed) -> Mapping[str, float]:
        """The loss and its kin; those of a mere forward pass are computed here, since no slope was asked for."""
        if piece.loss is not None:
            return computed.metrics
        return build_loss(replace(self.request, data=piece.data)).compute(computed.logprobs).metrics


@dataclass
class _Task:
    """One work that waits, and who hears of it."""

    work: Work
    hear: Hear
    passes: _Passes | None = None

    def tell(self, facts: Mapping[str, Any] | None = None, body: bytes = b"") -> None:
        self.hear(Done(self.work.id, facts or {}, body))

    def fail(self, error: Exception) -> None:
        self.hear(Done(self.work.id, error=as_told(error).as_dict()))


@dataclass
class _Model:
    """A model and its works in the order in which they were sent."""

    name: str
    project: str = ""
    is_open: bool = False
    steps: int = 0
    tasks: deque[_Task] = field(default_factory=deque)

    @property
    def passes(self) -> _Passes | None:
        """The request at its head that is in pieces."""
        return self.tasks[0].passes if self.tasks else None


class Training:
    """The works of all models; `submit` may be called from any thread, the rest belongs to the one that computes."""

    def __init__(self, tenants: Tenants, wake: Callable[[], None], *, longest: int = 0) -> None:
        self._tenants, self._wake = tenants, wake
        self._longest = longest or 1 << 20
        self._budget = tenants.budget
        self._piece_tokens = max(1, tenants.budget // 2)
        self._lock = threading.Lock()
        self._arrived: deque[_Task] = deque()
        self._models: dict[str, _Model] = {}
        self._projects, self._turns = Turns(), Turns()
        self._writer = ThreadPoolExecutor(1, "writes")
        self._writing: set[str] = set()

    def submit(self, work: Work, hear: Hear) -> None:
        """One more work; what is wrong with a request is told at once, and it is as if it had not come."""
        task = _Task(work, hear)
        try:
            if work.kind == "forward_backward":
                task.passes = self._cut(self._read(work.body), self._piece_tokens)
        except LuthierError as error:
            task.fail(error)
            return
        with self._lock:
            self._arrived.append(task)
        self._wake()

    def close(self) -> None:
        """What is being written is written to its end."""
        self._writer.shutdown()

    # -- pieces ------------------------------------------------------------------------------------------------

    def _read(self, body: bytes) -> LossRequest:
        request = read_loss_request(body)
        check_loss_request(request, vocabulary=self._tenants.vocabulary, longest=self._longest)
        return request

    def _cut(self, request: LossRequest, most: int) -> _Passes:
        """Neighbours together as far as they fit; a datum is never cut, and none is made as wide as its neighbour."""
        groups: list[list[Datum]] = []
        room = 0
        for datum in request.data:
            cost = _cost_of(datum)
            if not groups or cost > room or _width_of(datum) != _width_of(groups[-1][0]):
                groups.append([])
                room = most
            groups[-1].append(datum)
            room -= cost
        return _Passes(request, [_piece(request, tuple(group)) for group in groups])

    # -- the thread's side -------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """Whether there is anything to do now."""
        return bool(self._arrived) or any(self._is_ready(model) for model in self._models.values())

    def _is_ready(self, model: _Model) -> bool:
        """A folder that is still being written cannot be read yet."""
        folder = model.tasks[0].work.facts.get("folder") if model.tasks else None
        is_read = bool(model.tasks) and model.tasks[0].work.kind in ("open", "load")
        return bool(model.tasks) and not (is_read and str(folder) in self._writing)

    def work(self) -> None:
        """All that is quickly done, and one pass for those whose turn it is."""
        self._sort_arrived()
        for model in list(self._models.values()):
            while self._is_ready(model) and not (model.passes and model.is_open):
                self._do(model, model.tasks[0])
        if chosen := self._choose():
            self._compute(chosen)

    def _sort_arrived(self) -> None:
        with self._lock:
            arrived, self._arrived = self._arrived, deque()
        for task in arrived:
            model = self._models.setdefault(task.work.model, _Model(task.work.model))
            if task.work.kind == "open":
                model.project = str(task.work.facts.get("project") or "")
            model.tasks.append(task)

    def _do(self, model: _Model, task: _Task) -> None:
        do = {"open": self._open, "optim_step": self._step, "save": self._save, "load": self._load, "drop": self._drop}
        try:
            if task.work.kind not in ("open", "drop") and not model.is_open:
                raise HostError(f"no model `{model.name}` is open here", hint="open it first")
            do[task.work.kind](model, task)
        except Exception as error:  # the edge of the thread: whoever waits must hear of it
            task.fail(error)
        model.tasks.popleft()
        if not model.tasks and not model.is_open:
            self._models.pop(model.name, None)

    def _open(self, model: _Model, task: _Task) -> None:
        facts = task.work.facts
        layout = AdapterLayout(
            _whole(facts, "rank"),
            _whole(facts, "seed", 0) % 2**63,
            float(facts.get("alpha") or 32.0),
            *(bool(facts.get(name, True)) for name in ("train_mlp", "train_attn", "train_unembed")),
        )
        self._tenants.open(model.name, layout)
        model.is_open, model.steps = True, 0
        if facts.get("folder"):
            try:
                self._read_folder(model, facts)
            except Exception:
                self._tenants.drop(model.name)
                model.is_open = False
                raise
        task.tell()

    def _load(self, model: _Model, task: _Task) -> None:
        self._read_folder(model, task.work.facts)
        task.tell()

    def _read_folder(self, model: _Model, facts: Mapping[str, Any]) -> None:
        folder = Path(str(facts["folder"]))
        steps = int(check_manifest(folder).get("steps") or 0)
        self._tenants.load(model.name, folder, optimizer=bool(facts.get("optimizer")))
        model.steps = steps

    def _drop(self, model: _Model, task: _Task) -> None:
        self._tenants.drop(model.name)
        model.is_open = False
        task.tell()

    def _step(self, model: _Model, task: _Task) -> None:
        taken = self._tenants.optim_step(model.name, _step_params(task.work.facts))
        if not taken.taken:
            raise NonFiniteError(
                f"the gradient is not finite (norm {taken.grad_norm}): the step was refused, and the gradient dropped",
                hint="look at the data of the last forward_backward, or take a smaller learning rate",
            )
        model.steps += 1
        task.tell({"metrics": {"grad_norm": taken.grad_norm, "optimizer_steps": float(model.steps)}})

    def _save(self, model: _Model, task: _Task) -> None:
        """Taken now, written by another thread."""
        what, folder = str(task.work.facts.get("what")), str(task.work.facts["folder"])
        if what not in ("state", "adapter"):
            raise CallError(f"what: is {what!r}; `state` or `adapter` is saved", where="what")
        saved = self._tenants.save(model.name, what)
        facts = {"kind": f"live_{what}", "model": model.name, "steps": model.steps}

        def write() -> None:
            try:
                manifest = seal(Path(folder), saved.write, facts)
                task.tell({"bytes": manifest.size_bytes})
            except Exception as error:  # the edge of the thread: whoever waits must hear of it
                task.fail(error)
            finally:
                self._writing.discard(folder)
                self._wake()

        self._writing.add(folder)
        self._writer.submit(write)

    # -- passes ------------------------------------------------------------------------------------------------

    def _choose(self) -> list[_Model]:
        """Whose pieces are computed now; a model is there once for each of its pieces."""
        chosen: list[_Model] = []
        room = self._budget
        waiting = {model.name: model for model in self._models.values() if self._next(model)}
        while waiting:
            projects = list(dict.fromkeys(model.project for model in waiting.values()))
            project = self._projects.choose(projects)
            name = self._turns.choose([each.name for each in waiting.values() if each.project == project])
            model = waiting[name]
            piece, passes = self._next(model), model.passes
            assert piece
            assert passes
            cost = piece.cost
            if chosen and (cost > room or not _goes_with(passes, chosen)):
                del waiting[name]
                continue
            self._projects.charge(project, cost)
            self._turns.charge(name, cost)
            passes.taken += 1
            chosen.append(model)
            room -= cost
            if passes.is_alone or self._next(model) is None:
                del waiting[name]
            if passes.is_alone:
                break
        return chosen

    def _next(self, model: _Model) -> _Piece | None:
        """The next piece of the request at its head; one whose model is not open fails at once."""
        passes = model.passes
        if passes is None or passes.taken >= len(passes.pieces):
            return None
        return passes.pieces[passes.taken]

    def _compute(self, chosen: list[_Model]) -> None:
        names = {model.name for model in chosen}
        try:
            done = self._tenants.compute([_share(model, chosen[:place]) for place, model in enumerate(chosen)])
        except OutOfMemory as error:
            self._shrink(chosen, error)
            return
        except Exception as error:  # the edge of the thread: whoever waits must hear of it
            if len(names) == 1:
                self._fail(chosen[0], error)
            else:
                self._part(chosen)
            return
        for model, computed in zip(chosen, done, strict=True):
            assert model.passes
            model.passes.done.append(computed)
        for name in names:
            self._finish(self._models[name])

    def _finish(self, model: _Model) -> None:
        passes = model.passes
        if passes is None or not passes.is_finished:
            return
        self._tenants.keep(model.name)
        model.tasks.popleft().tell(body=write_loss_output(passes.output()))

    def _fail(self, model: _Model, error: Exception) -> None:
        self._tenants.discard(model.name)
        model.tasks.popleft().fail(error)

    def _part(self, chosen: list[_Model]) -> None:
        """One of them spoilt it for all: each begins again by itself, so that only the guilty one hears of it."""
        for model in {each.name: each for each in chosen}.values():
            assert model.passes
            self._begin_again(model, model.passes)

    def _begin_again(self, model: _Model, passes: _Passes) -> None:
        self._tenants.discard(model.name)
        model.tasks[0].passes = replace(passes, taken=0, done=[], is_alone=True)

    def _shrink(self, chosen: list[_Model], error: OutOfMemory) -> None:
        """Each by itself first; what is too large even so is cut smaller, as far as its datums allow."""
        self._budget = max(self._piece_tokens, self._budget // 2)
        if len(chosen) > 1:
            self._part(chosen)
            return
        (model,) = chosen
        passes = model.passes
        assert passes
        largest = max((piece.cost for piece in passes.pieces if len(piece.data) > 1), default=0)
        smaller = self._cut(passes.request, largest // 2)
        if len(smaller.pieces) > len(passes.pieces):
            self._begin_again(model, smaller)
            return
        longest = max(len(datum.tokens) for datum in passes.request.data)
        told = f"memory ran out with one sequence at once; the longest has {longest:,} tokens: {error}"
        self._fail(model, OutOfMemoryError(told, hint="send shorter sequences, or take a smaller rank"))


def as_told(error: Exception) -> LuthierError:
    """Any error as one that can be told."""
    if isinstance(error, LuthierError):
        return error
    if isinstance(error, OutOfMemory):
        return OutOfMemoryError(f"memory ran out: {error}", hint="take a smaller rank, or close models that rest")
    return LuthierError(f"{type(error).__name__}: {error}")


def _width_of(datum: Datum) -> int:
    """How many targets each of its places has."""
    targets = datum.inputs["target_tokens"]
    return int(targets.shape[1]) if targets.ndim == 2 else 1


def _cost_of(datum: Datum) -> int:
    """What it takes of a budget, in tokens: a few dozen targets take as much memory as a place of their own."""
    return len(datum.tokens) * (1 + _width_of(datum) // _TARGETS_OF_A_TOKEN)


def _piece(request: LossRequest, data: tuple[Datum, ...]) -> _Piece:
    part = replace(request, data=data)
    return _Piece(data, batch_of_datums(data), None if request.forward_only else build_loss(part))


def _share(model: _Model, before: list[_Model]) -> Share:
    """The piece that was taken for this place among those chosen."""
    passes = model.passes
    assert passes
    piece = passes.pieces[len(passes.done) + sum(each is model for each in before)]
    return Share(model.name, piece.batch, piece.loss)


def _goes_with(passes: _Passes, chosen: list[_Model]) -> bool:
    """Gradients and mere log-probabilities are not computed in one pass."""
    first = chosen[0].passes
    assert first
    return not passes.is_alone and passes.request.forward_only == first.request.forward_only


def _whole(facts: Mapping[str, Any], name: str, default: int | None = None) -> int:
    found = facts.get(name, default)
    if not isinstance(found, int) or isinstance(found, bool):
        raise CallError(f"{name}: is {found!r}; expected a whole number", where=name)
    return found


def _step_params(facts: Mapping[str, Any]) -> StepParams:
    """Adam's settings of one step; those that are left out are the protocol's."""
    found = {name: _number(facts, name, default) for name, default in _ADAM.items()}
    return StepParams(
        found["learning_rate"],
        found["weight_decay"],
        found["grad_clip_norm"],
        (found["beta1"], found["beta2"]),
        found["eps"],
    )


_ADAM = {
    "learning_rate": 1e-4,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-12,
    "weight_decay": 0.0,
    "grad_clip_norm": 0.0,
}


def _number(facts: Mapping[str, Any], name: str, default: float) -> float:
    found = facts.get(name)
    if found is None:
        return default
    is_number = isinstance(found, int | float) and not isinstance(found, bool)
    if not is_number or not math.isfinite(found) or found < 0 or (name.startswith("beta") and found >= 1):
        where = f"adam_params.{name}"
        limit = "a number from 0 to below 1" if name.startswith("beta") else "a finite number of 0 or more"
        raise CallError(f"{where}: is {found!r}; expected {limit}", where=where)
    return float(found)
