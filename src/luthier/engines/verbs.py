"""The five verbs of an engine over micro-batches of packed tokens, and what they take and return.

A verb returns a handle; `.result()` waits. Everything that crosses this border is numpy, so that losses, loop and
proofs are written once for engines on this machine and on others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Logits = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Result = TypeVar("Result", covariant=True)
Tick = Callable[[int, int], None]
"""Called with how many of how many are done."""


@dataclass(frozen=True)
class LossResult:
    """The summed value, its slope by each log-probability, and what else is worth reporting (sums too)."""

    value: float
    slope: Floats
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """A loss of the log-probabilities of one micro-batch, and the factor that makes it a share of the step.

    `weights` are given where the slope is known before the log-probabilities are (it is -weights), so that an engine
    can do all in one pass.
    """

    compute: Callable[[Floats], LossResult]
    scale: float = 1.0
    weights: Floats | None = None


@dataclass(frozen=True)
class Batch:
    """A micro-batch: segments of tokens, one after another without padding.

    A segment with a prefix goes on from an earlier stretch of the batch: it sees those tokens and its own, and its
    positions count on from there, so that two answers share one prompt. `sources` are the places whose hidden state
    predicts, `targets` what they should predict (two-dimensional for K targets a place), `offsets` where each
    sequence begins among them. `keys` tell the rows apart for dropout.
    """

    tokens: Ints
    segments: Ints
    prefixes: Ints
    sources: Ints
    targets: Ints
    offsets: Ints
    keys: Ints
    step: int = 0

    @cached_property
    def positions(self) -> Ints:
        """The position of each token within its own sequence."""
        found = np.arange(len(self.tokens), dtype=np.int64)
        for (start, stop), (first, last) in zip(self.segments.tolist(), self.prefixes.tolist(), strict=True):
            found[start:stop] += (last - first) - start
        return found

    def rounded(self, multiple: int) -> Batch:
        """The same work with a last segment of nothing, so that lengths come in few sizes and kernels are reused."""
        more = -len(self.tokens) % multiple
        if not more:
            return self
        end = len(self.tokens)
        return replace(
            self,
            tokens=np.concatenate([self.tokens, np.zeros(more, np.int64)]),
            segments=np.concatenate([self.segments, [[end, end + more]]]),
            prefixes=np.concatenate([self.prefixes, [[0, 0]]]),
            keys=np.concatenate([self.keys, [0]]),
        )

    def alone(self) -> list[Batch]:
        """The same work with one segment in each batch, for models in which packed segments would leak."""
        return [self._only(number) for number in range(len(self.offsets) - 1)]

    def _only(self, sequence: int) -> Batch:
        (start, stop), (first, last) = self.segments[sequence].tolist(), self.prefixes[sequence].tolist()
        chosen = slice(int(self.offsets[sequence]), int(self.offsets[sequence + 1]))
        tokens = np.concatenate([self.tokens[first:last], self.tokens[start:stop]])
        sources = self.sources[chosen]
        is_own = sources >= start
        moved = np.where(is_own, sources - start + (last - first), sources - first)
        whole = np.array([[0, len(tokens)]])
        count = np.array([0, chosen.stop - chosen.start])
        keys = self.keys[sequence : sequence + 1]
        return Batch(tokens, whole, np.zeros((1, 2), np.int64), moved, self.targets[chosen], count, keys, self.step)


def batch_of(sequences: Sequence[Sequence[int]], counted: Sequence[Bools] | None) -> Batch:
    """Sequences in which every token but the first is asked for, or those of them that are counted."""
    ends = np.cumsum([0, *(len(sequence) for sequence in sequences)])
    tokens = np.concatenate([np.asarray(sequence, np.int64) for sequence in sequences])
    segments = np.stack([ends[:-1], ends[1:]], 1)
    is_first = np.isin(np.arange(len(tokens)), ends[:-1])
    is_asked = ~is_first if counted is None else ~is_first & np.concatenate(counted)
    places = np.flatnonzero(is_asked)
    offsets = np.concatenate([[0], np.cumsum(is_asked)])[ends]
    return Batch(
        tokens,
        segments,
        np.zeros_like(segments),
        places - 1,
        tokens[places],
        offsets,
        np.zeros(len(sequences), np.int64),
    )


@dataclass(frozen=True)
class Computed:
    """What a pass over a batch gives back; `hits` tells which targets were the likeliest token, where known."""

    logprobs: Floats
    value: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    hits: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class StepParams:
    """How one optimizer step is taken."""

    learning_rate: float
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(frozen=True)
class StepTaken:
    """Whether the step was taken. It is refused for gradients that are not finite; `replay` says to try it again."""

    taken: bool
    grad_norm: float
    replay: bool = False


@dataclass(frozen=True)
class SampleParams:
    """How tokens are drawn; temperature 0 takes the likeliest."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class EngineFacts:
    """What an engine says of itself once the model is loaded."""

    engine: str
    device: str
    precision: str
    trainable_parameters: int
    total_parameters: int
    is_packed: bool
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()
    packs: bool = True
    """Whether it packs at all; one that pads has nothing that could leak."""


class OutOfMemory(Exception):
    """The device had no room for a micro-batch; gradients are as they were before it or cleared by the caller."""


class Handle(Protocol[Result]):
    """A result that may still be on its way."""

    def result(self) -> Result:
        """Wait for it."""
        ...


@dataclass(frozen=True)
class Ready(Generic[Result]):
    """A handle whose result is there, or is made when asked for."""

    make: Callable[[], Result]

    def result(self) -> Result:
        return self.make()


class Saved(Protocol):
    """Weights or state, taken at one moment; written later, perhaps by another thread.

    A live one was not copied: it must be written before training goes on.
    """

    @property
    def is_live(self) -> bool:
        """Whether training on would change it."""
        ...

    def write(self, folder: Path) -> None:
        """Write its files into the folder."""
        ...


class Trainee(Protocol):
    """A model in training, as evaluation, references, checkpoints and the probe see it, whatever takes its steps."""

    @property
    def facts(self) -> EngineFacts:
        """What was loaded."""
        ...

    def forward(self, batch: Batch) -> Handle[Computed]:
        """Log-probabilities alone."""
        ...

    def save(self, what: str) -> Saved:
        """`weights` as they are published, or the `state` that resuming needs besides."""
        ...

    def load(self, weights: Path, state: Path | None = None) -> None:
        """Go on from what was saved."""
        ...

    def sum_over_processes(self, values: Floats) -> Floats:
        """The sum of the values over all processes of the run."""
        ...

    def peak_memory_bytes(self) -> int:
        """The most memory the device has held for this run so far."""
        ...

    def close(self) -> None:
        """Let go of the device and of the other processes."""
        ...


class Engine(Trainee, Protocol):
    """The thing that trains, verb by verb."""

    def forward_backward(self, batch: Batch, loss: Loss) -> Handle[Computed]:
        """Log-probabilities, the loss, and gradients added to what is there."""
        ...

    def optim_step(self, params: StepParams) -> Handle[StepTaken]:
        """Reduce over processes, check that gradients are finite, step or refuse; clears the gradients."""
        ...

    def discard_gradients(self) -> None:
        """Forget the gradients gathered so far."""
        ...

    def sample(self, prompts: Sequence[Sequence[int]], params: SampleParams) -> Handle[list[list[int]]]:
        """Tokens that follow each prompt, with the weights as they stand."""
        ...


class Sampler(Protocol):
    """A model loaded to be measured: it answers, and says how likely texts are."""

    def sample(
        self, prompts: Sequence[Sequence[int]], params: SampleParams, tick: Tick | None = None
    ) -> list[list[int]]:
        """Tokens that follow each prompt; `tick` hears how many of how many are answered."""
        ...

    def stream(self, prompt: Sequence[int], params: SampleParams, hear: Callable[[int], None]) -> list[int]:
        """Tokens that follow one prompt; `hear` is told each as soon as it is there."""
        ...

    def score(self, sequences: Sequence[Sequence[int]], counted: Sequence[Bools] | None = None) -> list[float]:
        """The log-probability of each sequence behind its first token, or of those of its tokens that are counted."""
        ...


@dataclass(frozen=True)
class Drawn:
    """One more token of a stream, how likely the model held it, and the likeliest tokens where they were asked for."""

    stream: int
    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...] = ()


class Decoder(Protocol):
    """A base model in memory that answers many streams at once, each through an adapter of its own."""

    def adopt(self, adapter: str, folder: Path) -> None:
        """Read an adapter, to be named so from here on."""
        ...

    def forget(self, adapter: str) -> None:
        """Let go of an adapter that no stream uses."""
        ...

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
        ...

    def step(self) -> list[Drawn]:
        """One more token of every stream."""
        ...

    def leave(self, stream: int) -> None:
        """No more tokens of a stream."""
        ...


class Prober(Protocol):
    """A model read from disk again, to be held against what a run said of it."""

    def adapt(self, folder: Path) -> list[str]:
        """Put an adapter over the weights, unmerged; returns its tensors that have no place in the model."""
        ...

    def logits(self, sequences: Sequence[Ints], places: int) -> list[Logits]:
        """Logits of every token behind the last `places` tokens of each sequence."""
        ...

    def answer(self, prompts: Sequence[Ints], tokens: int) -> list[list[int]]:
        """The likeliest tokens behind each prompt."""
        ...
