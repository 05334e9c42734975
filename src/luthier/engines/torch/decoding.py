"""Many answers at once from one base model: streams join and leave between tokens, each with an adapter of its own.

The streams of a batch share one forward pass for each token. Their keys and values lie padded on the left, which the
mask makes invisible. A model that keeps another kind of state gets one stream in a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from luthier.engines.torch.loading import load_as_start, own_attention
from luthier.engines.torch.lora import FrozenLinear, replace_module
from luthier.engines.torch.sampling import few_threads
from luthier.engines.verbs import Drawn, SampleParams
from luthier.errors import ModelError, UnsupportedError
from luthier.machine import find_machine
from luthier.runs.resolve import AdapterRef, ResolvedModel
from luthier.weights.peft import read_adapter

_PREFILL_TOKENS = 8192


def build_decoder(resolved: ResolvedModel, home: Path, *, over: AdapterRef | None = None) -> TorchDecoder:
    """The model in the format this machine computes best in."""
    machine = find_machine()
    loaded = load_as_start(resolved, home, precision=machine.precision, device=machine.device, over=over)
    return TorchDecoder(loaded.model)


@dataclass
class _Low:
    """The low-rank update of one layer by one adapter."""

    down: Tensor
    up: Tensor
    scale: float


@dataclass
class _Rows:
    """Which rows of the pass that runs now belong to which adapter."""

    of: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0


class SharedLinear(nn.Module):
    """A frozen linear layer under many adapters, each for rows of its own."""

    def __init__(self, base: nn.Linear | FrozenLinear, rows: _Rows) -> None:
        super().__init__()
        self.base, self._rows = base, rows
        self.updates: dict[str, _Low] = {}

    @property
    def weight(self) -> Tensor:
        """The frozen weight."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x)
        for name, rows in self._rows.of.items():
            low = self.updates.get(name)
            if low is None:
                continue
            if len(rows) == self._rows.count:
                result = result + _update(x, low)
            else:
                result = result.index_add(0, rows, _update(x[rows], low))
        return result


def _update(x: Tensor, low: _Low) -> Tensor:
    return F.linear(F.linear(x, low.down), low.up) * low.scale


@dataclass
class _Stream:
    """One answer on its way."""

    id: int
    prompt: list[int]
    params: SampleParams
    adapter: str | None
    likeliest: int
    draws: torch.Generator
    last: int = 0

    def draw(self, logits: Tensor) -> Drawn:
        """The next token by the stream's own draws, from the logits of one place."""
        logprobs = logits.float().log_softmax(-1)
        params = self.params
        self.last = int(logits.argmax()) if params.temperature <= 0 else self._random(logits.float())
        top: tuple[tuple[int, float], ...] = ()
        if self.likeliest:
            values, tokens = logprobs.topk(min(self.likeliest, len(logprobs)))
            top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
        return Drawn(self.id, self.last, float(logprobs[self.last]), top)

    def _random(self, logits: Tensor) -> int:
        chances, tokens = (logits / self.params.temperature).softmax(-1).sort(descending=True, stable=True)
        if self.params.top_k > 0:
            chances = chances[: self.params.top_k]
        if self.params.top_p < 1:
            # The token that crosses the limit stays, so one always does.
            chances = chances[: int((chances.cumsum(0) < self.params.top_p).sum()) + 1]
        sums = chances.double().cumsum(0)
        place = float(torch.rand((), generator=self.draws, dtype=torch.float64)) * float(sums[-1])
        return int(tokens[min(int((sums <= place).sum()), len(sums) - 1)])


@dataclass
class _Batch:
    """Streams that go on together: their state in the model, and which of its places each of them sees."""

    streams: list[_Stream]
    cache: Any
    seen: Tensor

    @property
    def can_join(self) -> bool:
        """Whether the state is keys and values alone, which can lie side by side."""
        return all(type(layer).__name__ == "DynamicLayer" for layer in getattr(self.cache, "layers", [None]))


class TorchDecoder:
    """A loaded base model, its adapters, and the streams that it answers."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._rows = _Rows()
        self._shared: dict[str, SharedLinear] = {}
        self._adapters: set[str] = set()
        self._waiting: list[_Stream] = []
        self._batches: list[_Batch] = []
        self._can_pad = not getattr(model, "_is_stateful", False)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def adopt(self, adapter: str, folder: Path) -> None:
        """Read an adapter; raises UnsupportedError where it holds more than low-rank updates of linear layers."""
        config, tensors = read_adapter(folder)
        updates: dict[str, _Low] = {}
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
            if self._shared_layer(name).base.weight.shape != (up.shape[0], down.shape[1]):
                raise ModelError(f"{folder}: `{name}` of the adapter has another shape than the base model's layer")
            updates[name] = _Low(self._placed(down), self._placed(up), config.scale)
        for name, low in updates.items():
            self._shared[name].updates[adapter] = low
        self._adapters.add(adapter)

    def forget(self, adapter: str) -> None:
        """Let go of an adapter that no stream uses."""
        for layer in self._shared.values():
            layer.updates.pop(adapter, None)
        self._adapters.discard(adapter)

    def join(
        self,
        stream: int,
        prompt: Sequence[int],
        params: SampleParams,
        *,
        adapter: str | None = None,
        likeliest: int = 0,
    ) -> None:
        """A new stream; its first token comes with the next step."""
        assert adapter is None or adapter in self._adapters
        draws = torch.Generator().manual_seed(params.seed % 2**63)
        self._waiting.append(_Stream(stream, list(prompt), params, adapter, likeliest, draws))

    @torch.no_grad()
    def step(self) -> list[Drawn]:
        """One more token of every stream."""
        drawn: list[Drawn] = []
        with own_attention(self._model), few_threads(self._model):
            for batch in self._batches:
                tokens = torch.tensor([[stream.last] for stream in batch.streams], device=self._model.device)
                drawn += self._advance(batch, tokens, torch.ones_like(tokens))
            for group in self._take_waiting():
                batch, first = self._begin(group)
                drawn += first
                self._add(batch)
        return drawn

    def leave(self, stream: int) -> None:
        """No more tokens of a stream."""
        self._waiting = [each for each in self._waiting if each.id != stream]
        for batch in self._batches:
            stay = [row for row, each in enumerate(batch.streams) if each.id != stream]
            if len(stay) < len(batch.streams):
                _keep_rows(batch, stay)
        self._batches = [batch for batch in self._batches if batch.streams]

    def _advance(self, batch: _Batch, tokens: Tensor, fresh: Tensor) -> list[Drawn]:
        """Tokens go in where `fresh` says that they are no padding, and one comes out for each stream."""
        self._rows.of, self._rows.count = self._find_rows(batch.streams), len(batch.streams)
        batch.seen = torch.cat([batch.seen, fresh], 1)
        places: dict[str, Tensor] = {}
        if self._takes_positions:
            places["position_ids"] = (batch.seen.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        output = self._model(
            input_ids=tokens,
            attention_mask=batch.seen,
            past_key_values=batch.cache,
            use_cache=True,
            logits_to_keep=1,
            **places,
        )
        batch.cache = output.past_key_values
        return [stream.draw(logits) for stream, logits in zip(batch.streams, output.logits[:, -1], strict=True)]

    def _find_rows(self, streams: list[_Stream]) -> dict[str, Tensor]:
        found: dict[str, list[int]] = {}
        for row, stream in enumerate(streams):
            if stream.adapter is not None:
                found.setdefault(stream.adapter, []).append(row)
        return {name: torch.tensor(rows, device=self._model.device) for name, rows in found.items()}

    def _take_waiting(self) -> Iterator[list[_Stream]]:
        """New streams, in groups whose prompts go through the model together."""
        self._waiting.sort(key=lambda stream: -len(stream.prompt))
        while self._waiting:
            width = len(self._waiting[0].prompt)
            count = max(1, _PREFILL_TOKENS // width) if self._can_pad else 1
            group, self._waiting = self._waiting[:count], self._waiting[count:]
            yield group

    def _begin(self, group: list[_Stream]) -> tuple[_Batch, list[Drawn]]:
        from transformers import DynamicCache

        width = max(len(stream.prompt) for stream in group)
        rows = [[0] * (width - len(stream.prompt)) + stream.prompt for stream in group]
        real = [[0] * (width - len(stream.prompt)) + [1] * len(stream.prompt) for stream in group]
        device = self._model.device
        batch = _Batch(
            group, DynamicCache() if self._can_pad else None, torch.zeros(len(group), 0, device=device).long()
        )
        return batch, self._advance(batch, torch.tensor(rows, device=device), torch.tensor(real, device=device))

    def _add(self, batch: _Batch) -> None:
        """Lay a new batch beside the one that runs, where their states allow it."""
        other = next((each for each in self._batches if each.can_join), None) if batch.can_join else None
        if other is None:
            self._batches.append(batch)
            return
        width = max(other.seen.shape[1], batch.seen.shape[1])
        for ours, theirs in zip(other.cache.layers, batch.cache.layers, strict=True):
            ours.keys = torch.cat([_widen(ours.keys, width, -2), _widen(theirs.keys, width, -2)])
            ours.values = torch.cat([_widen(ours.values, width, -2), _widen(theirs.values, width, -2)])
        other.seen = torch.cat([_widen(other.seen, width, -1), _widen(batch.seen, width, -1)])
        other.streams += batch.streams

    def _shared_layer(self, name: str) -> SharedLinear:
        if name not in self._shared:
            try:
                base = self._model.get_submodule(name)
            except AttributeError:
                base = None
            if not isinstance(base, nn.Linear | FrozenLinear):
                raise ModelError(f"the adapter names `{name}`, which is no linear layer of the base model")
            self._shared[name] = SharedLinear(base, self._rows)
            replace_module(self._model, name, self._shared[name])
        return self._shared[name]

    def _placed(self, values: Any) -> Tensor:
        return torch.from_numpy(values).to(self._model.device, self._model.dtype)


def _widen(values: Tensor, width: int, axis: int) -> Tensor:
    """Padding on the left, up to a width."""
    missing = width - values.shape[axis]
    return F.pad(values, (missing, 0) if axis == -1 else (0, 0, missing, 0)) if missing else values


def _keep_rows(batch: _Batch, rows: list[int]) -> None:
    """The batch without the streams that left, and without the padding that only they needed."""
    batch.streams = [batch.streams[row] for row in rows]
    if not rows:
        return
    batch.seen = batch.seen[rows]
    padding = int((batch.seen.cumsum(1) == 0).sum(1).min())
    batch.seen = batch.seen[:, padding:]
    for layer in batch.cache.layers if batch.can_join else ():
        layer.keys = layer.keys[rows][..., padding:, :]
        layer.values = layer.values[rows][..., padding:, :]
