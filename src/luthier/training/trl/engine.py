"""The `trl` engine: a model in the hands of a trainer of TRL, as evaluation, checkpoints and proofs see it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
import trl
from safetensors.torch import load_file
from torch import Tensor

from luthier.engines.torch.engine import MASTERS_FILE, STATE_FILE
from luthier.engines.torch.keeping import (
    AdapterShape,
    Files,
    copy_tensors,
    put_back,
    read_adapter_tensors,
    read_model_tensors,
    write_model,
)
from luthier.engines.torch.loading import DTYPES
from luthier.engines.torch.memory import find_peak_bytes, memory_errors
from luthier.engines.torch.processes import Processes, join_processes
from luthier.engines.torch.steps import put_moments, read_moments
from luthier.engines.verbs import Batch, Computed, EngineFacts, Floats, Ready
from luthier.runs.resolve import ResolvedModel
from luthier.spec.method import AdapterKeys
from luthier.spec.plan import RunPlan
from luthier.training.trl.model import Loaded, cast_weights, load_model, name_trained, start_adapters
from luthier.training.trl.rows import pad
from luthier.training.trl.trainers import build_trainer

_IGNORED = -100


def build_engine(plan: RunPlan, resolved: ResolvedModel, home: Path) -> TrlEngine:
    """The model of a plan and its trainer."""
    processes = join_processes(plan.device)
    return TrlEngine(plan, resolved, load_model(plan, resolved, home), processes)


class TrlEngine:
    """A trainer of TRL and its model; a job takes its steps."""

    def __init__(self, plan: RunPlan, resolved: ResolvedModel, loaded: Loaded, processes: Processes) -> None:
        self._plan, self._resolved, self._loaded, self._processes = plan, resolved, loaded, processes
        self._config = copy.deepcopy(loaded.model.config)
        self._dtype = DTYPES[plan.spec.compute.precision]
        self.trainer: Any = build_trainer(plan, loaded)
        self._trained = name_trained(self.trainer.model)
        if loaded.lora is not None:
            start_adapters(self._trained, loaded.targets, plan.spec.seed)
        self.trainer.create_optimizer()

    @property
    def facts(self) -> EngineFacts:
        """What was loaded."""
        return EngineFacts(
            engine="trl",
            device=self._plan.device,
            precision=self._plan.spec.compute.precision,
            trainable_parameters=sum(each.numel() for each in self._trained.values()),
            total_parameters=self._plan.total_parameters,
            is_packed=False,
            packs=False,
            versions={"torch": torch.__version__, "trl": trl.__version__},
        )

    # -- measuring ---------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Ready[Computed]:
        """Log-probabilities alone, without dropout."""
        parts = batch.alone()
        found: dict[int, tuple[Floats, np.ndarray | None]] = {}
        self.trainer.model.eval()
        with memory_errors(), torch.no_grad(), self.trainer.accelerator.autocast():
            for group in _group(parts):
                found |= self._score(parts, group)
        scored = [found[number] for number in range(len(parts))]
        logprobs = np.concatenate([each[0] for each in scored])
        hits = [each[1] for each in scored if each[1] is not None]
        return Ready(lambda: Computed(logprobs, hits=np.concatenate(hits) if hits else None))

    def _score(self, parts: list[Batch], group: list[int]) -> dict[int, tuple[Floats, np.ndarray | None]]:
        tokens, attended = pad([parts[number].tokens for number in group])
        inputs = {"input_ids": self._here(tokens), "attention_mask": self._here(attended), "use_cache": False}
        if not all(_asks_for_what_comes(parts[number]) for number in group):
            logits = self.trainer.model(**inputs).logits
            return {number: _read_targets(logits[row], parts[number]) for row, number in enumerate(group)}
        labels = torch.full_like(tokens, _IGNORED)
        for row, number in enumerate(group):
            labels[row, parts[number].sources + 1] = torch.from_numpy(parts[number].targets)
        said = self.trainer.model(**inputs, labels=self._here(labels), fused_lm_head=True)
        logprobs, hits = said.log_probs.double().cpu().numpy(), said.is_top1.cpu().numpy()
        places = [parts[number].sources for number in group]
        return {
            number: (logprobs[row, place], hits[row, place].astype(bool))
            for row, (number, place) in enumerate(zip(group, places, strict=True))
        }

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._plan.device)

    def sum_over_processes(self, values: Floats) -> Floats:
        """The sum of the values over all processes of the run."""
        summed: Floats = self._processes.sum_values(values)
        return summed

    def sum_gradients(self) -> None:
        """The gradients of all processes in each of them."""
        self._processes.sum_gradients(list(self._trained.values()))

    def discard_gradients(self) -> None:
        """Forget the gradients gathered so far."""
        self.trainer.model.zero_grad(set_to_none=True)

    def peak_memory_bytes(self) -> int:
        """The most memory the device has held for this run so far."""
        return find_peak_bytes(torch.device(self._plan.device))

    def close(self) -> None:
        """Let go of the other processes."""
        self._processes.leave()

    # -- what is kept ------------------------------------------------------------------------------------------

    def save(self, what: str) -> Files:
        """`weights` as they are published, or the `state` that resuming needs besides: safetensors, and no pickle."""
        is_live = self._loaded.lora is None
        if what == "state":
            state = read_moments(self._optimizer, self._trained)
            if is_live:
                masters: dict[str, Tensor] = {name: each.detach() for name, each in self._trained.items()}
                return Files({STATE_FILE: state, MASTERS_FILE: masters}, is_live=True)
            return Files({STATE_FILE: copy_tensors(state)})
        if is_live:
            return Files({}, self._write_model, is_live=True)
        return self._adapter_shape().take(self._trained)

    def _adapter_shape(self) -> AdapterShape:
        method = self._plan.spec.method
        assert isinstance(method, AdapterKeys)
        whole = frozenset(name for name in self._trained if not name.endswith((".lora_A", ".lora_B")))
        return AdapterShape(method, self._resolved, self._loaded.targets, whole, self._loaded.twins)

    def _write_model(self, folder: Path) -> None:
        model = self._loaded.model
        config, model.config = model.config, self._config  # TRL sets some of its own
        try:
            write_model(model, self._resolved.folder, folder, cast_weights(model, self._dtype))
        finally:
            model.config = config
        path = folder / "config.json"
        said = orjson.loads(path.read_bytes())
        said["dtype"] = str(self._dtype).removeprefix("torch.")
        path.write_bytes(orjson.dumps(said, option=orjson.OPT_INDENT_2))

    def load(self, weights: Path, state: Path | None = None) -> None:
        """Go on from what was saved; without a state only the weights are taken."""
        if self._loaded.lora is not None:
            found = read_adapter_tensors(weights)
        elif state is not None:
            found = load_file(str(state / MASTERS_FILE))
        else:
            found = read_model_tensors(weights, self._dtype)
        put_back({name: each.detach() for name, each in self._trained.items()}, found, weights)
        if state is not None:
            put_moments(self._optimizer, self._trained, load_file(str(state / STATE_FILE)))

    @property
    def _optimizer(self) -> Any:
        """The optimizer itself, under what accelerate puts around it."""
        return getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)


def _group(parts: list[Batch]) -> list[list[int]]:
    """Sequences computed as rows of one length: like lengths together, padded to no more than all have together."""
    budget = sum(len(part.tokens) for part in parts)
    groups: list[list[int]] = []
    for number in sorted(range(len(parts)), key=lambda number: -len(parts[number].tokens)):
        if groups and (len(groups[-1]) + 1) * len(parts[groups[-1][0]].tokens) <= budget:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def _asks_for_what_comes(part: Batch) -> bool:
    """Whether each place is asked for one token, and once, as in training."""
    sources = part.sources
    is_within = not len(sources) or int(sources.max()) + 1 < len(part.tokens)
    return part.targets.ndim == 1 and is_within and len(np.unique(sources)) == len(sources)


def _read_targets(logits: Tensor, part: Batch) -> tuple[Floats, None]:
    chosen = torch.from_numpy(part.targets).to(logits.device)
    rated = logits[torch.from_numpy(part.sources).to(logits.device)].float().log_softmax(-1)
    found = rated.gather(1, chosen if chosen.dim() == 2 else chosen[:, None])
    return (found if chosen.dim() == 2 else found[:, 0]).double().cpu().numpy(), None
