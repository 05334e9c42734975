"""What is kept of a transformers model in training: adapters and models as they are published, and read again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from luthier.engines.torch.loading import read_model
from luthier.errors import CheckpointError
from luthier.runs.resolve import ResolvedModel
from luthier.spec.method import AdapterKeys
from luthier.weights.peft import AdapterConfig, read_adapter, write_adapter

GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class Files:
    """Tensors taken at one moment, by file; and what else is to be written."""

    tensors: dict[str, dict[str, Tensor]]
    more: Callable[[Path], None] | None = None
    is_live: bool = False

    def write(self, folder: Path) -> None:
        """Write them into the folder."""
        for name, each in self.tensors.items():
            save_file(each, str(folder / name))
        if self.more:
            self.more(folder)


def copy_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, which later steps do not change."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class AdapterShape:
    """What an adapter in training is made of: the layers it adapts, and the parameters trained whole beside it."""

    method: AdapterKeys
    resolved: ResolvedModel
    targets: tuple[str, ...]
    whole: frozenset[str]
    twins: tuple[str, ...]
    """Names of the embedding table and of the head, where they are one."""

    def take(self, tensors: Mapping[str, Tensor]) -> Files:
        """The adapter as it stands, to be written in PEFT's format."""
        found = self._with_twin(copy_tensors(tensors))
        config = self._config()
        return Files(
            {}, lambda folder: write_adapter(folder, config, {key: each.numpy() for key, each in found.items()})
        )

    def _with_twin(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """An embedding table that is the head too is published under both names, as PEFT reads it."""
        known = next((name for name in self.twins if name in tensors), None)
        return tensors if known is None else tensors | dict.fromkeys(self.twins, tensors[known])

    def _config(self) -> AdapterConfig:
        method, is_tied = self.method, bool(self.whole & set(self.twins))
        whole = self.whole | set(self.twins) if is_tied else self.whole
        return AdapterConfig(
            base=self.resolved.name,
            rank=method.rank,
            alpha=method.alpha,
            dropout=method.dropout,
            rslora=method.rslora,
            targets=self.targets,
            layers=None,
            modules_to_save=tuple(sorted({name.rpartition(".")[0] for name in whole})),
            revision=self.resolved.revision,
            tied=is_tied,
        )


def write_model(model: Any, base: Path, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """The whole model as transformers writes it; `state` are its weights where they are not those it computes with."""
    # What the base asks of generation stays as its file has it: transformers refuses to write some that it reads.
    asked, model.generation_config = model.generation_config, transformers.GenerationConfig()
    try:
        model.save_pretrained(folder, **({} if state is None else {"state_dict": state}))
    finally:
        model.generation_config = asked
    (folder / GENERATION_FILE).unlink(missing_ok=True)
    if (base / GENERATION_FILE).is_file():
        shutil.copyfile(base / GENERATION_FILE, folder / GENERATION_FILE)


def read_adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """An adapter that was published, as fp32 by our names."""
    return {name: torch.from_numpy(value) for name, value in read_adapter(folder)[1].items()}


def read_model_tensors(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """A model that was published; through transformers, which may keep weights under other names in files."""
    return dict(read_model(folder, dtype, torch.device("cpu")).named_parameters())


@torch.no_grad()
def put_back(trained: Mapping[str, Tensor], found: Mapping[str, Tensor], weights: Path) -> None:
    """What was saved into what is trained; CheckpointError where something of it is missing."""
    missing: Iterable[str] = sorted(set(trained) - set(found))
    for name in missing:
        raise CheckpointError(f"{weights}: has no `{name}`, which this run trains", where=str(weights))
    for name, value in trained.items():
        value.copy_(found[name])
