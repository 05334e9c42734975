"""The `tinker` engine: five verbs as requests to a service, sent in order and read when their results are wanted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from luthier.engines.tinker.address import check_service, find_service
from luthier.engines.tinker.connection import Connection, Layout, list_offered
from luthier.engines.tinker.datums import Asked, build_data, list_asked, read_logprobs
from luthier.engines.tinker.sampling import ServiceSampler
from luthier.engines.tinker.saving import SAMPLER, STATE, Final, Saving, read_state_path
from luthier.engines.tinker.waiting import Watch, translate
from luthier.engines.verbs import (
    Batch,
    Computed,
    EngineFacts,
    Floats,
    Loss,
    Ready,
    SampleParams,
    StepParams,
    StepTaken,
)
from luthier.errors import ServerError, UnsupportedError
from luthier.runs.resolve import ResolvedModel
from luthier.spec.method import LoraMethod
from luthier.spec.plan import RunPlan
from luthier.weights.groups import find_groups
from luthier.weights.peft import AdapterConfig

FINAL = "final"
_LOSS = "cross_entropy"
_NOT_FINITE = "not finite"
Result = TypeVar("Result")


def build(
    plan: RunPlan,
    resolved: ResolvedModel,
    home: Path,
    *,
    packed: bool = True,
    watch: Watch | None = None,
    is_new: bool = False,
) -> TinkerEngine:
    """The engine of a plan, its service asked whether it is there; a model `is_new`, or is made from what is loaded."""
    del home, packed
    if resolved.adapters:
        raise UnsupportedError(
            f"{plan.spec.model.base} is an adapter over another model, which a Tinker service does not start from",
            hint="name the base model itself; engine `torch` trains on from an adapter",
        )
    service = find_service()
    check_service(service)
    connection = Connection(service, watch)
    base = plan.spec.engine.model or plan.spec.model.base
    longest = {each.name: each.max_context_length for each in list_offered(service)}.get(base)
    wanted = plan.spec.data.max_length
    engine = TinkerEngine(plan, resolved, connection, base, longest if longest and longest < wanted else None)
    if is_new:
        engine.begin()
    return engine


@dataclass
class Sent(Generic[Result]):
    """A result that is on its way; it is read once."""

    read: Callable[[], Result]
    _found: list[Result] = field(default_factory=list)

    def result(self) -> Result:
        """Wait for it."""
        if not self._found:
            self._found.append(self.read())
        return self._found[0]


class TinkerEngine:
    """The verbs over one adapter on a service."""

    def __init__(
        self, plan: RunPlan, resolved: ResolvedModel, connection: Connection, base: str, limit: int | None = None
    ) -> None:
        self._plan, self._resolved, self._connection, self._base = plan, resolved, connection, base
        self._limit = limit
        self._training: Any = None
        self._step = 0
        self._pending: list[tuple[list[Asked], Floats]] = []
        self._is_broken = False
        self._saving: Saving | None = None

    @property
    def facts(self) -> EngineFacts:
        """What is known of the service's model."""
        return EngineFacts(
            engine="tinker",
            device=self._connection.service.url,
            precision=self._plan.spec.compute.precision,
            trainable_parameters=self._plan.trainable_parameters,
            total_parameters=self._plan.total_parameters,
            is_packed=True,
            versions={"tinker": _sdk_version()},
            packs=False,
            runs_ahead=True,
        )

    def begin(self) -> None:
        """Make the model now, so that no step waits for it."""
        _ = self._model

    @property
    def _model(self) -> Any:
        """The model in training; it is made when it is first needed, since a run that goes on makes another."""
        if self._training is None:
            method = self._plan.spec.method
            assert isinstance(method, LoraMethod)
            groups = find_groups(method.targets)
            layout = Layout(method.rank, self._plan.spec.seed, "attn" in groups, "mlp" in groups, "unembed" in groups)
            self._training = self._connection.create_model(self._base, layout)
        return self._training

    # -- verbs -------------------------------------------------------------------------------------------------

    def forward_backward(self, batch: Batch, loss: Loss) -> Sent[Computed]:
        """Log-probabilities, the loss, and gradients added to what is there.

        The service knows one loss, whose slope is its weights. A loss whose slope is known only from the
        log-probabilities asks for those first, and sends its slope as weights.
        """
        asked = self._asked(batch)
        self._step = batch.step + 1
        if loss.weights is not None:
            weights = np.asarray(loss.weights, np.float64).reshape(-1) * loss.scale
            future = self._send(asked, weights, "forward_backward")
            return Sent(lambda: self._computed(batch, loss, self._read(future, asked, batch, "forward_backward")))
        logprobs = self._read(self._send(asked, None, "forward"), asked, batch, "forward")
        result = loss.compute(logprobs)
        done = Computed(logprobs, result.value, result.metrics)
        slope = np.asarray(result.slope, np.float64).reshape(-1) * loss.scale
        if not np.isfinite(slope).all():
            self._is_broken = True  # no service takes it, and no step follows from it
            return Sent(lambda: done)
        future = self._send(asked, -slope, "forward_backward")

        def read() -> Computed:
            self._read(future, asked, batch, "forward_backward")
            return done

        return Sent(read)

    def forward(self, batch: Batch) -> Sent[Computed]:
        """Log-probabilities alone; which token was the likeliest the service does not say."""
        asked = self._asked(batch)
        future = self._send(asked, None, "forward")
        return Sent(lambda: Computed(self._read(future, asked, batch, "forward")))

    def optim_step(self, params: StepParams) -> Sent[StepTaken]:
        """Take a step with the gradients gathered, which clears them."""
        from tinker import types

        what = f"optim_step {self._step}"
        adam = types.AdamParams(
            learning_rate=params.learning_rate,
            beta1=params.betas[0],
            beta2=params.betas[1],
            eps=params.eps,
            weight_decay=params.weight_decay,
            grad_clip_norm=params.max_grad_norm,
        )
        if self._is_broken:
            self.discard_gradients()
            return Sent(lambda: StepTaken(False, math.nan))
        self._pending.clear()
        future = self._call("optim_step", adam)
        return Sent(lambda: self._taken(future, what))

    def _taken(self, future: Any, what: str) -> StepTaken:
        """Whether the step was taken; a service that refuses gradients that are not finite fails the request."""
        try:
            return _read_taken(self._connection.wait(future, what).metrics)
        except ServerError as error:
            if _NOT_FINITE in error.message:
                return StepTaken(False, math.nan)
            raise

    def discard_gradients(self) -> None:
        """Forget the gradients gathered so far: the protocol has no word for it, so their negatives are added."""
        pending, self._pending = self._pending, []
        for asked, weights in pending:
            self._connection.wait(self._send(asked, -weights, "forward_backward"), "discarding gradients")
        self._pending, self._is_broken = [], False

    def sample(self, prompts: Sequence[Sequence[int]], params: SampleParams) -> Ready[list[list[int]]]:
        """Tokens that follow each prompt, with the weights as they stand."""
        future = self._call("save_weights_and_get_sampling_client")
        client = self._connection.wait(future, "a sampler of the weights as they stand")
        found = ServiceSampler(self._connection, client).sample(prompts, params)
        return Ready(lambda: found)

    def sum_over_processes(self, values: Floats) -> Floats:
        """The values: there is one process."""
        return values

    def peak_memory_bytes(self) -> int:
        """None that counts: the model is with the service, which does not tell what it holds."""
        return 0

    def close(self) -> None:
        """Finish the session."""
        self._connection.close()

    # -- requests ----------------------------------------------------------------------------------------------

    def _asked(self, batch: Batch) -> list[Asked]:
        asked = list_asked(batch)
        longest = max((len(each.tokens) for each in asked), default=0)
        if self._limit is not None and longest > self._limit:
            raise UnsupportedError(
                f"a row has {longest:,} tokens, and the service takes {self._limit:,} of {self._base}",
                hint=f"set data.max_length = {self._limit}",
            )
        return asked

    def _send(self, asked: list[Asked], weights: Floats | None, verb: str) -> Any:
        """The future of a request; None where there is nothing to ask."""
        if not asked:
            return None
        if weights is not None:
            self._pending.append((asked, weights))
        return self._call(verb, build_data(asked, weights), _LOSS)

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._model, method)(*arguments)
        except Exception as error:  # the edge to the SDK
            raise translate(error, method, self._connection.service) from None

    def _read(self, future: Any, asked: list[Asked], batch: Batch, verb: str) -> Floats:
        if future is None:
            return np.zeros(batch.targets.shape)
        outputs = self._connection.wait(future, f"{verb} of step {batch.step + 1}").loss_fn_outputs
        try:
            return read_logprobs(asked, outputs, batch.targets.shape)
        except (ValueError, KeyError, IndexError) as error:
            raise translate(error, verb, self._connection.service) from None

    def _computed(self, batch: Batch, loss: Loss, logprobs: Floats) -> Computed:
        result = loss.compute(logprobs)
        return Computed(logprobs, result.value, result.metrics)

    # -- what is kept ------------------------------------------------------------------------------------------

    def save(self, what: str) -> Saving | Final:
        """A checkpoint on the service: `weights` asks for it, `state` is of the same one, `final` is the last."""
        if what == "state":
            assert self._saving is not None, "the weights of a checkpoint are saved first"
            return self._saving
        name = FINAL if what == FINAL else f"step_{self._step:04d}"
        futures = {STATE: self._call("save_state", name), SAMPLER: self._call("save_weights_for_sampler", name)}
        self._saving = Saving(self._connection, self._base, name, futures)
        if what != FINAL:
            return self._saving
        return Final(self._saving, lambda: self._call("save_weights_external", name), self._adapter_config())

    def _adapter_config(self) -> AdapterConfig:
        method = self._plan.spec.method
        assert isinstance(method, LoraMethod)
        return AdapterConfig(
            self._resolved.name, method.rank, method.alpha, targets=(), revision=self._resolved.revision
        )

    def load(self, weights: Path, state: Path | None = None) -> None:
        """Go on from what was saved, in a new model of the service; without a state its optimizer begins anew."""
        path = read_state_path(weights if state is None else state)
        self._pending = []
        self._training = self._connection.create_from_state(path, optimizer=state is not None)


def _read_taken(metrics: Mapping[str, float] | None) -> StepTaken:
    """What a service says of a step; a norm that it does not tell is not known, and no reason to doubt the step."""
    told = {name.partition(":")[0]: value for name, value in (metrics or {}).items()}
    norm = next(
        (float(value) for name, value in told.items() if "grad" in name and ("norm" in name or "l2" in name)), None
    )
    is_taken = bool(told.get("taken", 1.0)) and (norm is None or math.isfinite(norm))
    return StepTaken(is_taken, math.nan if norm is None else norm)


def _sdk_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("tinker")
