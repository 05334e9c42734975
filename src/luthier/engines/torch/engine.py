"""The `torch` engine: five verbs over transformers' model on a CPU or one CUDA device."""

from __future__ import annotations

import resource
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.data.hashes import mix
from luthier.engines.torch.head import ROUNDED
from luthier.engines.torch.loading import Loaded, load_for_training, read_model, run_base
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
from luthier.errors import CheckpointError, OutOfMemoryError
from luthier.runs.resolve import ResolvedModel
from luthier.spec.method import AdapterKeys
from luthier.spec.plan import RunPlan
from luthier.weights.peft import AdapterConfig, read_adapter, write_adapter

STATE_FILE = "optimizer.safetensors"
MASTERS_FILE = "masters.safetensors"
GENERATION_FILE = "generation_config.json"
_CPU_OUT_OF_MEMORY = "can't allocate memory"


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
            [_taken(self._masters.named()) for _ in range(3)]

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
        with _memory_errors():
            work = self._forward_backward if self._loaded.can_pack(batch) else self._one_by_one
            return work(batch, loss)

    def forward(self, batch: Batch) -> Ready[Computed]:
        """Log-probabilities alone, without dropout."""
        parts = [batch] if self._loaded.can_pack(batch) else batch.alone()
        with _memory_errors(), torch.no_grad():
            found = [self._forward(part) for part in parts]
        logprobs = np.concatenate([each[0] for each in found])
        hits = [each[1] for each in found if each[1] is not None]
        return Ready(lambda: Computed(logprobs, hits=np.concatenate(hits) if hits else None))

    def optim_step(self, params: StepParams) -> Ready[StepTaken]:
        """Reduce over processes, check, step or refuse; clears the gradients."""
        self._processes.sum_gradients(self._masters.masters)
        try:
            with _memory_errors():
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
        if self._loaded.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._loaded.device)
        return _peak_of_this_process()

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

    def save(self, what: str) -> _Files:
        """`weights` as they are published, or the `state` that resuming needs besides."""
        is_live = not self._loaded.adapters
        if what == "state":
            files = {STATE_FILE: self._stepper.state()}
            if is_live:
                files[MASTERS_FILE] = self._masters.named()
                return _Files(files, is_live=True)
            return _Files({name: _taken(tensors) for name, tensors in files.items()})
        if is_live:
            return _Files({}, self._write_model, is_live=True)
        tensors = self._with_twin(_taken(self._masters.named()))
        return _Files(
            {},
            lambda folder: write_adapter(
                folder, self._adapter_config(), {name: each.numpy() for name, each in tensors.items()}
            ),
        )

    def _with_twin(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """An embedding table that is the head too is published under both names, as PEFT reads it."""
        twins = self._loaded.twins
        known = next((name for name in twins if name in tensors), None)
        return tensors if known is None else tensors | dict.fromkeys(twins, tensors[known])

    def _adapter_config(self) -> AdapterConfig:
        method = self._plan.spec.method
        assert isinstance(method, AdapterKeys)
        whole = set(self._loaded.whole)
        if whole & set(self._loaded.twins):
            whole |= set(self._loaded.twins)
        return AdapterConfig(
            base=self._resolved.name,
            rank=method.rank,
            alpha=method.alpha,
            dropout=method.dropout,
            rslora=method.rslora,
            targets=tuple(self._loaded.adapters),
            layers=None,
            modules_to_save=tuple(sorted({name.rpartition(".")[0] for name in whole})),
            revision=self._resolved.revision,
            tied=bool(whole & set(self._loaded.twins)),
        )

    def _write_model(self, folder: Path) -> None:
        model, base = self._loaded.model, self._resolved.folder / GENERATION_FILE
        # What the base asks of generation stays as its file has it: transformers refuses to write some that it reads.
        asked, model.generation_config = model.generation_config, transformers.GenerationConfig()
        try:
            model.save_pretrained(folder)
        finally:
            model.generation_config = asked
        (folder / GENERATION_FILE).unlink(missing_ok=True)
        if base.is_file():
            shutil.copyfile(base, folder / GENERATION_FILE)

    def load(self, weights: Path, state: Path | None = None) -> None:
        """Go on from what was saved; without a state only the weights are taken."""
        masters = self._masters.named()
        if self._loaded.adapters:
            found = {name: torch.from_numpy(value) for name, value in read_adapter(weights)[1].items()}
        elif state is not None:
            found = load_file(str(state / MASTERS_FILE))
        else:
            # Through transformers, which may keep weights under other names in files than in the model.
            found = dict(read_model(weights, self._loaded.dtype, torch.device("cpu")).named_parameters())
        missing = sorted(set(masters) - set(found))
        if missing:
            raise CheckpointError(f"{weights}: has no `{missing[0]}`, which this run trains", where=str(weights))
        with torch.no_grad():
            for name, master in masters.items():
                master.copy_(found[name])
        self._masters.publish()
        if state is not None:
            self._stepper.load_state(load_file(str(state / STATE_FILE)))


def _peak_of_this_process() -> int:
    """Linux keeps it for the process alone; elsewhere what a parent held may count."""
    with suppress(OSError, StopIteration), Path("/proc/self/status").open() as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _computed(loss: Loss, logprobs: Tensor) -> Computed:
    found = logprobs.double().cpu().numpy()
    result = loss.compute(found)
    return Computed(found, result.value, result.metrics)


def _taken(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, which later steps do not change."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class _Files:
    """Tensors taken at one moment, by file; and what else is to be written."""

    tensors: dict[str, dict[str, Tensor]]
    more: Callable[[Path], None] | None = None
    is_live: bool = False

    def write(self, folder: Path) -> None:
        for name, each in self.tensors.items():
            save_file(each, str(folder / name))
        if self.more:
            self.more(folder)


def _weighted(weights: Floats) -> Callable[[Floats], LossResult]:
    return lambda logprobs: LossResult(float(-(weights * logprobs).sum()), -weights)


class _memory_errors:  # noqa: N801 (read as a statement)
    """Turns the ways in which torch says that memory is out into ours."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        is_out = isinstance(error, torch.OutOfMemoryError | MemoryError) or (
            isinstance(error, RuntimeError) and _CPU_OUT_OF_MEMORY in str(error)
        )
        if is_out:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            raise OutOfMemory(str(error).splitlines()[0]) from None
