"""The `mlx` engine: five verbs over mlx_lm's model on Apple silicon, or on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from safetensors.numpy import load_file, save_file

from luthier.engines.drawing import dropout_starts
from luthier.engines.mlx.head import Arrays, chunks, place, rate, rate_again
from luthier.engines.mlx.layout import Rectangle, lay_out, rounded_up
from luthier.engines.mlx.loading import DTYPES, Loaded, choose_device, load_for_training
from luthier.engines.mlx.lora import row_keys
from luthier.engines.mlx.publish import check_same, match_files, read_trained, write_model
from luthier.engines.mlx.sampling import sample_tokens
from luthier.engines.mlx.steps import Masters, Stepper
from luthier.engines.surroundings import peak_of_this_process
from luthier.engines.verbs import (
    Batch,
    Computed,
    EngineFacts,
    Floats,
    Loss,
    OutOfMemory,
    Ready,
    SampleParams,
    StepParams,
    StepTaken,
)
from luthier.errors import CheckpointError, OutOfMemoryError
from luthier.runs.resolve import ResolvedModel
from luthier.spec.method import AdapterKeys
from luthier.spec.plan import RunPlan
from luthier.weights.mlx import name_from_mlx
from luthier.weights.peft import AdapterConfig, read_adapter, write_adapter
from luthier.weights.tensors import layer_number, read_model_shape

STATE_FILE = "optimizer.safetensors"
MASTERS_FILE = "masters.safetensors"
_HEAD = "lm_head.weight"
_OUT_OF_MEMORY = ("unable to allocate", "insufficient memory", "out of memory", "maximum allowed buffer size")
Arguments = tuple[mx.array, ...]


def build(plan: RunPlan, resolved: ResolvedModel, home: Path, *, packed: bool = True) -> MlxEngine:
    """The engine of a plan, loaded and ready to train; where not `packed`, each sequence is computed alone."""
    choose_device(plan.device)
    with _memory_errors():
        loaded = load_for_training(plan, resolved, home)
    loaded.is_padded = loaded.is_padded and packed
    return MlxEngine(plan, resolved, loaded, compiles=plan.device == "metal")


class MlxEngine:
    """The verbs over one loaded model.

    Where it `compiles`, shapes are rounded up so that compiled passes are used again.
    """

    def __init__(self, plan: RunPlan, resolved: ResolvedModel, loaded: Loaded, *, compiles: bool) -> None:
        self._plan, self._resolved, self._loaded, self._compiles = plan, resolved, loaded, compiles
        self._names = {path: name_from_mlx(path) for path in loaded.trained}
        self._in_files: dict[str, str] = {}
        if not loaded.adapters:
            self._in_files = match_files(loaded.trained, resolved.folder)
            if not resolved.adapters:
                check_same(loaded.trained, self._in_files, resolved.folder)
        self._types = {path: DTYPES[plan.spec.compute.precision] for path in loaded.trained if not _is_lora(path)}
        self._masters = Masters({self._names[path]: array for path, array in loaded.trained.items()})
        self._stepper = Stepper(plan.spec.optim.kind, self._masters, compiles=compiles)
        differentiated = mx.value_and_grad(self._pull)
        self._pulled: Callable[..., Any] = mx.compile(differentiated) if compiles else differentiated
        self._seen: Callable[..., Any] = mx.compile(self._look) if compiles else self._look

    @property
    def facts(self) -> EngineFacts:
        """What was loaded."""
        return EngineFacts(
            engine="mlx",
            device=self._plan.device,
            precision=self._plan.spec.compute.precision,
            trainable_parameters=sum(int(master.size) for master in self._masters.arrays.values()),
            total_parameters=self._plan.total_parameters,
            is_packed=self._loaded.is_padded,
            versions={"mlx": mx.__version__, "mlx_lm": mlx_lm.__version__},
            notes=self._loaded.notes,
        )

    # -- verbs -------------------------------------------------------------------------------------------------

    def forward_backward(self, batch: Batch, loss: Loss) -> Ready[Computed]:
        """Log-probabilities, the loss, and gradients added to what is there.

        All is computed before this returns, so that memory that runs out is met here, where it can be answered.
        """
        with _memory_errors():
            if loss.weights is not None:
                logprobs = self._pull_all(batch, -loss.weights * loss.scale)
                result = loss.compute(logprobs)
            else:
                logprobs = self._look_all(batch, drops=True)[0]
                result = loss.compute(logprobs)
                self._pull_all(batch, result.slope * loss.scale)
        return Ready(lambda: Computed(logprobs, result.value, result.metrics))

    def forward(self, batch: Batch) -> Ready[Computed]:
        """Log-probabilities alone, without dropout."""
        with _memory_errors():
            logprobs, hits = self._look_all(batch, drops=False)
        return Ready(lambda: Computed(logprobs, hits=hits if batch.targets.ndim == 1 else None))

    def optim_step(self, params: StepParams) -> Ready[StepTaken]:
        """Check, step or refuse; clears the gradients."""
        try:
            with _memory_errors():
                taken = self._stepper.step(params)
        except OutOfMemory as error:
            raise OutOfMemoryError(
                f"memory ran out in the optimizer step: {error}", hint='take an adapter (method.kind = "lora")'
            ) from None
        return Ready(lambda: taken)

    def discard_gradients(self) -> None:
        """Forget the gradients gathered so far."""
        self._masters.clear()

    def sample(self, prompts: Sequence[Sequence[int]], params: SampleParams) -> Ready[list[list[int]]]:
        """Tokens that follow each prompt, with the weights as they stand."""
        self._publish()
        found = sample_tokens(self._loaded, prompts, params)
        return Ready(lambda: found)

    def sum_over_processes(self, values: Floats) -> Floats:
        """The values: there is one process."""
        return values

    def peak_memory_bytes(self) -> int:
        """The most this process has held: what MLX holds of unified memory, or of the machine's memory on a CPU."""
        return int(mx.get_peak_memory()) if self._plan.device == "metal" else peak_of_this_process()

    def close(self) -> None:
        """Let go of buffers that are kept for later."""
        self._masters.clear()
        mx.clear_cache()

    # -- passes ------------------------------------------------------------------------------------------------

    def _pull_all(self, batch: Batch, slope: Floats) -> Floats:
        """Gradients of the log-probabilities times their slopes, added to what is there; the log-probabilities."""
        logprobs = np.zeros(batch.targets.shape, np.float64)
        for part in lay_out(batch, together=self._loaded.is_padded):
            arguments = self._arguments(batch, part, drops=True)
            weights = self._padded(slope[part.targets].astype(np.float32), arguments[3].shape[0])
            (_, found), gradients = self._pulled(self._weights(), mx.array(weights), *arguments)
            mx.eval(found, self._masters.gather(gradients))
            logprobs[part.targets] = _numbers(found, len(part.targets))
        self._publish()
        return logprobs

    def _look_all(self, batch: Batch, *, drops: bool) -> tuple[Floats, np.ndarray[Any, Any]]:
        logprobs = np.zeros(batch.targets.shape, np.float64)
        hits = np.zeros(len(batch.targets), bool)
        for part in lay_out(batch, together=self._loaded.is_padded):
            arguments = self._arguments(batch, part, drops=drops)
            found, likeliest = self._seen(self._weights(), *arguments)
            mx.eval(found, likeliest)
            logprobs[part.targets] = _numbers(found, len(part.targets))
            if batch.targets.ndim == 1:
                hits[part.targets] = np.array(likeliest)[: len(part.targets)] == batch.targets[part.targets]
        self._publish()
        return logprobs, hits

    def _pull(self, weights: Arrays, slope: mx.array, *arguments: mx.array) -> tuple[mx.array, mx.array]:
        """What is differentiated: the log-probabilities times their slopes, summed."""
        hidden, targets, own = self._hidden(weights, arguments)
        outer = {path: array for path, array in own.items() if layer_number(path) is None}
        logprobs = rate_again(self._loaded.parts, hidden, targets, outer, self._loaded.vocabulary)
        return (logprobs * slope).sum(), logprobs

    def _look(self, weights: Arrays, *arguments: mx.array) -> tuple[mx.array, mx.array]:
        """Log-probabilities of the targets, and the likeliest tokens."""
        hidden, targets, _ = self._hidden(weights, arguments)
        logprobs, likeliest = [], []
        for rows in chunks(targets.shape[0], self._loaded.vocabulary):
            logits = self._loaded.parts.logits(hidden[rows])
            logprobs.append(rate(logits, targets[rows]))
            likeliest.append(mx.argmax(logits, axis=-1))
        return mx.concatenate(logprobs), mx.concatenate(likeliest)

    def _hidden(self, weights: Arrays, arguments: Arguments) -> tuple[mx.array, mx.array, Arrays]:
        """Hidden states at the places that predict, what they should predict, and the weights by path."""
        tokens, rows, columns, targets, *starts = arguments
        by_path = {path: weights[name] for path, name in self._names.items()}
        own = {path: array.astype(self._types.get(path, array.dtype)) for path, array in by_path.items()}
        place(self._loaded.model, own)
        dropout = self._loaded.dropout
        dropout.starts = starts[0] if starts else None
        try:
            hidden = self._loaded.parts.decoder(tokens)
        finally:
            dropout.starts = None
        return hidden[rows, columns], targets, own

    def _weights(self) -> Arrays:
        return self._masters.arrays

    def _publish(self) -> None:
        """Leave the masters in the model, in place of what a traced pass left there."""
        types = self._types
        arrays = {path: self._masters.arrays[name] for path, name in self._names.items()}
        place(self._loaded.model, {path: each.astype(types.get(path, each.dtype)) for path, each in arrays.items()})

    def _arguments(self, batch: Batch, part: Rectangle, *, drops: bool) -> Arguments:
        """A rectangle as the passes take it, its shapes rounded up where passes are compiled."""
        rows, length = part.places.shape
        self._loaded.check_length(length)
        places, count = part.places, len(part.targets)
        if self._compiles:
            places = np.zeros((rounded_up(rows, 1, 2), rounded_up(length, 32, 4)), np.int64)
            places[:rows, :length] = part.places
            count = _share_of(places.size, count)
        found = [
            mx.array(batch.tokens[places].astype(np.int32)),
            mx.array(self._padded(part.rows.astype(np.int32), count)),
            mx.array(self._padded(part.columns.astype(np.int32), count)),
            mx.array(self._padded(batch.targets[part.targets].astype(np.int32), count)),
        ]
        if drops and self._loaded.dropout.share > 0:
            lengths = (batch.segments[:, 1] - batch.segments[:, 0]).tolist()
            keys = row_keys(batch.keys, batch.step)
            starts = dropout_starts(list(zip(keys, lengths, strict=True)), self._plan.spec.seed)
            found.append(mx.array(starts[places]))
        return tuple(found)

    def _padded(self, values: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
        more = count - len(values)
        return np.concatenate([values, np.zeros((more, *values.shape[1:]), values.dtype)]) if more > 0 else values

    # -- what is kept ------------------------------------------------------------------------------------------

    def save(self, what: str) -> _Files:
        """`weights` as they are published, or the `state` that resuming needs besides."""
        masters, is_live = self._masters.arrays, not self._loaded.adapters
        if what == "state":
            files = {STATE_FILE: self._stepper.state()}
            if is_live:
                files[MASTERS_FILE] = self._masters.named()
            return _Files(files, is_live=is_live)
        if is_live:
            by_path = {path: masters[name] for path, name in self._names.items()}
            base, names, precision = self._resolved.folder, self._in_files, self._plan.spec.compute.precision
            return _Files({}, lambda folder: write_model(folder, base, names, by_path, precision), is_live=True)
        tensors = self._with_twin(self._masters.named())
        return _Files({}, lambda folder: write_adapter(folder, self._adapter_config(tensors), tensors))

    def _with_twin(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """An embedding table that is the head too is published under both names, as PEFT reads it."""
        table = next((name for name in tensors if name.endswith("embed_tokens.weight")), None)
        is_tied = table is not None and read_model_shape(self._resolved.folder).is_tied
        return tensors | {_HEAD: tensors[table]} if table is not None and is_tied else tensors

    def _adapter_config(self, tensors: dict[str, Any]) -> AdapterConfig:
        method = self._plan.spec.method
        assert isinstance(method, AdapterKeys)
        whole = {name for name in tensors if not _is_lora(name)}
        return AdapterConfig(
            base=self._resolved.name,
            rank=method.rank,
            alpha=method.alpha,
            dropout=method.dropout,
            rslora=method.rslora,
            targets=tuple(name_from_mlx(path) for path in self._loaded.adapters),
            layers=None,
            modules_to_save=tuple(sorted({name.rpartition(".")[0] for name in whole})),
            revision=self._resolved.revision,
            tied=_HEAD in tensors and _HEAD not in self._masters.arrays,
        )

    def load(self, weights: Path, state: Path | None = None) -> None:
        """Go on from what was saved; without a state only the weights are taken."""
        masters = self._masters.arrays
        if self._loaded.adapters:
            found: dict[str, Any] = dict(read_adapter(weights)[1])
        elif state is not None:
            found = load_file(str(state / MASTERS_FILE))
        else:
            by_path = read_trained(weights, self._in_files)
            found = {self._names[path]: values for path, values in by_path.items()}
        missing = sorted(set(masters) - set(found))
        if missing:
            raise CheckpointError(f"{weights}: has no `{missing[0]}`, which this run trains", where=str(weights))
        self._masters.arrays = {name: mx.array(np.asarray(found[name], np.float32)) for name in masters}
        mx.eval(self._masters.arrays)
        self._publish()
        if state is not None:
            self._stepper.load_state(load_file(str(state / STATE_FILE)))


def _is_lora(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B"))


def _numbers(found: mx.array, count: int) -> Floats:
    values: Floats = np.array(found)[:count].astype(np.float64)
    return values


def _share_of(places: int, count: int) -> int:
    """Half of the places, or a quarter, and so on, as far as there is room for so many."""
    while places // 2 >= count and places % 2 == 0 and places > 1:
        places //= 2
    return max(places, count)


@dataclass(frozen=True)
class _Files:
    """Tensors taken at one moment, by file; and what else is to be written."""

    tensors: dict[str, dict[str, np.ndarray[Any, Any]]]
    more: Callable[[Path], None] | None = None
    is_live: bool = False

    def write(self, folder: Path) -> None:
        for name, each in self.tensors.items():
            save_file(each, str(folder / name))
        if self.more:
            self.more(folder)


class _memory_errors:  # noqa: N801 (read as a statement)
    """Turns the ways in which MLX says that memory is out into ours."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        said = str(error).lower()
        is_out = isinstance(error, RuntimeError) and any(words in said for words in _OUT_OF_MEMORY)
        if is_out or isinstance(error, MemoryError):
            mx.clear_cache()
            raise OutOfMemory(str(error).splitlines()[0] if str(error) else "no memory left") from None
