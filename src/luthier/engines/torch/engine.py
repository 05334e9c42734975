"""The `torch` engine: five verbs over transformers' model on a CPU or one CUDA device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from luthier.data.hashes import mix
from luthier.engines.torch.head import ROUNDED
from luthier.engines.torch.keeping import (
    AdapterShape,
    Files,
    copy_tensors,
    put_back,
    read_adapter_tensors,
    read_model_tensors,
    write_model,
)
from luthier.engines.torch.loading import Loaded, load_for_training, run_base
from luthier.engines.torch.memory import find_peak_bytes, memory_errors
from luthier.engines.torch.processes import Processes, join_processes
from luthier.engines.torch.sampling import sample_tokens
from luthier.engines.torch.steps import Masters, Stepper
from luthier.engines.verbs import (
    Batch,
    Computed,
    EngineFacts,
    Floats,
    Loss,
    LossResult,
    OutOfMemory,
    Ready,
    SampleParams,
    StepParams,
    StepTaken,
)
from luthier.errors import OutOfMemoryError
from luthier.runs.resolve import ResolvedModel
from luthier.spec.method import AdapterKeys
from luthier.spec.plan import RunPlan

STATE_FILE = "optimizer.safetensors"
MASTERS_FILE = "masters.safetensors"


def build(plan: RunPlan, resolved: ResolvedModel, home: Path, *, packed: bool = True) -> TorchEngine:
    """The engine of a plan, loaded and ready to train; where not `packed`, each sequence is computed alone."""
    processes = join_processes(plan.device)
    loaded = load_for_training(plan, resolved, home)
    loaded.is_packed = loaded.is_packed and packed
    return TorchEngine(plan, resolved, loaded, processes)


class TorchEngine:
    """The verbs over one loaded model."""

    def __init__(self, plan: RunPlan, resolved: ResolvedModel, loaded: Loaded, processes: Processes) -> None:
        self._plan, self._resolved, self._loaded, self._processes = plan, resolved, loaded, processes
        trained = {
            f"{name}.{part}": getattr(layer, part)
            for name, layer in loaded.adapters.items()
            for part in ("lora_A", "lora_B")
        }
        self._masters = Masters(trained | loaded.whole)
        self._stepper = Stepper(plan.spec.optim.kind, self._masters, scales_loss=loaded.dtype == torch.float16)
        if loaded.adapters:
            # The first copy for a checkpoint would wait for fresh memory: it is asked for now, and kept when freed.
            [copy_tensors(self._masters.named()) for _ in range(3)]

    @property
    def facts(self) -> EngineFacts:
        """What was loaded."""
        return EngineFacts(
            engine="torch",
            device=str(self._loaded.device),
            precision=self._plan.spec.compute.precision,
            trainable_parameters=sum(master.numel() for master in self._masters.masters),
            total_parameters=self._plan.total_parameters,
            is_packed=self._loaded.is_packed,
            versions={"torch": torch.__version__, "transformers": transformers.__version__},
        )

    # -- verbs -------------------------------------------------------------------------------------------------

    def forward_backward(self, batch: Batch, loss: Loss) -> Ready[Computed]:
        """Log-probabilities, the loss, and gradients added to what is there."""
        with memory_errors():
            work = self._forward_backward if self._loaded.can_pack(batch) else self._one_by_one
            return work(batch, loss)

    def forward(self, batch: Batch) -> Ready[Computed]:
        """Log-probabilities alone, without dropout."""
        parts = [batch] if self._loaded.can_pack(batch) else batch.alone()
        with memory_errors(), torch.no_grad():
            found = [self._forward(part) for part in parts]
        logprobs = np.concatenate([each[0] for each in found])
        hits = [each[1] for each in found if each[1] is not None]
        return Ready(lambda: Computed(logprobs, hits=np.concatenate(hits) if hits else None))

    def optim_step(self, params: StepParams) -> Ready[StepTaken]:
        """Reduce over processes, check, step or refuse; clears the gradients."""
        self._processes.sum_gradients(self._masters.masters)
        try:
            with memory_errors():
                taken = self._stepper.step(params)
        except OutOfMemory as error:
            raise OutOfMemoryError(
                f"memory ran out in the optimizer step: {error}",
                hint='set optim.kind = "adamw_8bit" or "adafactor", or take an adapter (method.kind = "lora")',
            ) from None
        return Ready(lambda: taken)

    def discard_gradients(self) -> None:
        """Forget the gradients gathered so far."""
        self._masters.clear()

    def sample(self, prompts: Sequence[Sequence[int]], params: SampleParams) -> Ready[list[list[int]]]:
        """Tokens that follow each prompt, with the weights as they stand."""
        self._loaded.dropout.stop()
        found = sample_tokens(self._loaded.model, prompts, params)
        return Ready(lambda: found)

    def sum_over_processes(self, values: Floats) -> Floats:
        """The sum of the values over all processes of the run."""
        summed: Floats = self._processes.sum_values(values)
        return summed

    def peak_memory_bytes(self) -> int:
        """The most this process has held: of the device, or of the machine's memory on a CPU."""
        return find_peak_bytes(self._loaded.device)

    def close(self) -> None:
        """Let go of the other processes."""
        self._processes.leave()

    # -- passes ------------------------------------------------------------------------------------------------

    def _forward(self, batch: Batch) -> tuple[Floats, np.ndarray | None]:
        self._loaded.dropout.stop()
        hidden = self._hidden(batch)
        logprobs, hits = self._loaded.head.score(hidden, self._tensor(batch.targets), with_hits=True)
        return logprobs.double().cpu().numpy(), None if hits is None else hits.cpu().numpy()

    def _forward_backward(self, batch: Batch, loss: Loss) -> Ready[Computed]:
        head, targets = self._loaded.head, self._tensor(batch.targets)
        hidden = self._hidden(batch, drops=True)
        weight = head.weight
        if loss.weights is not None:
            slope = self._slope(-loss.weights, loss)
            # Nothing on the way needs the numbers, so they are fetched when asked for and the device is not waited for.
            logprobs, by_hidden, by_trained = head.pull(hidden.detach(), targets, slope, weight)
            done = Ready(lambda: _computed(loss, logprobs))
        else:
            scored, _ = head.score(hidden.detach(), targets, with_hits=False)
            found = scored.double().cpu().numpy()
            result = loss.compute(found)
            done = Ready(lambda: Computed(found, result.value, result.metrics))
            _, by_hidden, by_trained = head.pull(hidden.detach(), targets, self._slope(result.slope, loss), weight)
        slopes = {root: each.to(root.dtype) for root, each in by_trained.items()}
        if hidden.requires_grad:
            slopes[hidden] = by_hidden
        torch.autograd.backward(list(slopes), list(slopes.values()))
        self._loaded.dropout.stop()
        return done

    def _one_by_one(self, batch: Batch, loss: Loss) -> Ready[Computed]:
        """For models in which packed segments leak: each sequence alone, the loss over all of them."""
        parts = batch.alone()
        if loss.weights is None:
            found = self.forward(batch).result().logprobs
            result = loss.compute(found)
            slope = result.slope
        else:
            slope = -loss.weights
        ends = batch.offsets
        values = []
        for number, part in enumerate(parts):
            weights = -slope[int(ends[number]) : int(ends[number + 1])]
            done = self._forward_backward(part, Loss(_weighted(weights), loss.scale, weights))
            values.append(done.result().logprobs)
        logprobs = np.concatenate(values)
        result = loss.compute(logprobs)
        return Ready(lambda: Computed(logprobs, result.value, result.metrics))

    def _slope(self, slope: Floats, loss: Loss) -> Tensor:
        scaled = slope * (loss.scale * self._stepper.loss_scale)
        return torch.from_numpy(scaled).to(self._loaded.device, torch.float32)

    def _hidden(self, batch: Batch, *, drops: bool = False) -> Tensor:
        """Hidden states at the places that predict."""
        rounded = batch.rounded(ROUNDED) if self._loaded.is_packed else batch
        if drops:
            self._start_dropout(rounded)
        return run_base(self._loaded, rounded)[self._tensor(batch.sources)]

    def _start_dropout(self, batch: Batch) -> None:
        keys = mix(batch.keys.astype(np.uint64), batch.step).tolist()
        lengths = (batch.segments[:, 1] - batch.segments[:, 0]).tolist()
        self._loaded.dropout.start(list(zip(keys, lengths, strict=True)))

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._loaded.device)

    # -- what is kept ------------------------------------------------------------------------------------------

    def save(self, what: str) -> Files:
        """`weights` as they are published, or the `state` that resuming needs besides."""
        is_live = not self._loaded.adapters
        if what == "state":
            files = {STATE_FILE: self._stepper.state()}
            if is_live:
                files[MASTERS_FILE] = self._masters.named()
                return Files(files, is_live=True)
            return Files({name: copy_tensors(tensors) for name, tensors in files.items()})
        if is_live:
            base = self._resolved.folder
            return Files({}, lambda folder: write_model(self._loaded.model, base, folder), is_live=True)
        return self._adapter_shape().take(self._masters.named())

    def _adapter_shape(self) -> AdapterShape:
        loaded, method = self._loaded, self._plan.spec.method
        assert isinstance(method, AdapterKeys)
        return AdapterShape(method, self._resolved, tuple(loaded.adapters), frozenset(loaded.whole), loaded.twins)

    def load(self, weights: Path, state: Path | None = None) -> None:
        """Go on from what was saved; without a state only the weights are taken."""
        if self._loaded.adapters:
            found = read_adapter_tensors(weights)
        elif state is not None:
            found = load_file(str(state / MASTERS_FILE))
        else:
            found = read_model_tensors(weights, self._loaded.dtype)
        put_back(self._masters.named(), found, weights)
        self._masters.publish()
        if state is not None:
            self._stepper.load_state(load_file(str(state / STATE_FILE)))


def _computed(loss: Loss, logprobs: Tensor) -> Computed:
    found = logprobs.double().cpu().numpy()
    result = loss.compute(found)
    return Computed(found, result.value, result.metrics)


def _weighted(weights: Floats) -> Callable[[Floats], LossResult]:
    return lambda logprobs: LossResult(float(-(weights * logprobs).sum()), -weights)
