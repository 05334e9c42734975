"""Many answers at once from one base model: streams join and leave between tokens, each with an adapter of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from luthier.engines.torch.even import even_out
from luthier.engines.torch.lanes import PackedStreams, can_pack_streams
from luthier.engines.torch.loading import Loaded, load_as_start
from luthier.engines.torch.padded import PaddedStreams
from luthier.engines.torch.sampling import few_threads
from luthier.engines.torch.shared import RANKS, Low, SharedLayers
from luthier.engines.torch.stream import Group, Stream
from luthier.engines.torch.tenants import TorchTenants
from luthier.engines.verbs import Drawn, PromptAsk, SampleParams
from luthier.errors import ModelError, UnsupportedError
from luthier.machine import find_machine
from luthier.runs.resolve import AdapterRef, ResolvedModel
from luthier.weights.peft import read_adapter


def build_decoder(
    resolved: ResolvedModel, home: Path, *, over: AdapterRef | None = None, precision: str = "auto"
) -> TorchDecoder:
    """The model in the format that was asked for, or that this machine computes best in."""
    machine = find_machine()
    wanted = machine.precision if precision == "auto" else precision
    loaded = load_as_start(resolved, home, precision=wanted, device=machine.device, over=over)
    return TorchDecoder(loaded, resolved)


class TorchDecoder:
    """A loaded base model, its adapters, and the streams that it answers."""

    def __init__(self, loaded: Loaded, resolved: ResolvedModel) -> None:
        self._loaded = loaded
        even_out(loaded.model)
        self._shared = SharedLayers(loaded.model)
        self._tenants = TorchTenants(loaded, self._shared, resolved)
        self._adapters: set[str] = set()
        packs = can_pack_streams(loaded)
        self._streams = PackedStreams(loaded, self._shared) if packs else PaddedStreams(loaded, self._shared)

    def tenants(self) -> TorchTenants:
        """Adapters in training over the same base; one pass at a time, theirs or that of the streams."""
        return self._tenants

    def adopt(self, adapter: str, folder: Path) -> None:
        """Read an adapter; raises UnsupportedError where it holds more than low-rank updates of linear layers."""
        config, tensors = read_adapter(folder)
        updates: dict[str, Low] = {}
        for key, down in tensors.items():
            name, _, part = key.rpartition(".")
            if part == "lora_B":
                continue
            if part != "lora_A":
                raise UnsupportedError(
                    f"{folder}: the adapter holds `{key}` whole, so it cannot share a base model with others",
                    hint="merge it first: luthier merge RUN",
                )
            up = tensors[f"{name}.lora_B"]
            if self._shared.find(name).weight.shape != (up.shape[0], down.shape[1]):
                raise ModelError(f"{folder}: `{name}` of the adapter has another shape than the base model's layer")
            more = -len(down) % RANKS
            updates[name] = Low(
                F.pad(self._placed(down), (0, 0, 0, more)), F.pad(self._placed(up), (0, more)), config.scale
            )
        for name, low in updates.items():
            self._shared.find(name).updates[adapter] = low
        self._adapters.add(adapter)

    def forget(self, adapter: str) -> None:
        """Let go of an adapter that no stream uses."""
        self._shared.forget(adapter)
        self._adapters.discard(adapter)

    def join(
        self,
        stream: int,
        prompt: Sequence[int],
        params: SampleParams,
        *,
        adapter: str | None = None,
        likeliest: int = 0,
        rated: PromptAsk | None = None,
        copies: Sequence[tuple[int, SampleParams]] = (),
    ) -> None:
        """A new stream, and others that go on from the same prompt; their first tokens come with the next steps."""
        assert adapter is None or adapter in self._adapters
        streams = [Stream(number, each, likeliest) for number, each in ((stream, params), *copies)]
        with torch.no_grad(), few_threads(self._loaded.model):
            self._streams.add(Group(list(prompt), adapter, streams, rated))

    def step(self) -> list[Drawn]:
        """One more token of every stream."""
        with torch.no_grad(), few_threads(self._loaded.model):
            return self._streams.step()

    def leave(self, stream: int) -> None:
        """No more tokens of a stream."""
        self._streams.leave(stream)

    def _placed(self, values: Any) -> Tensor:
        return torch.from_numpy(values).to(self._loaded.device, self._loaded.dtype)
