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


def join_batches(batches: Sequence[Batch]) -> Batch:
    """The sequences of several batches one after another; of their targets, which may differ in width, nothing."""
    tokens = np.cumsum([0, *(len(batch.tokens) for batch in batches)])
    places = np.cumsum([0, *(len(batch.sources) for batch in batches)])

    def laid(parts: Sequence[Ints], starts: Ints) -> Ints:
        return np.concatenate([part + start for part, start in zip(parts, starts, strict=False)])

    return Batch(
        np.concatenate([batch.tokens for batch in batches]),
        laid([batch.segments for batch in batches], tokens),
        laid([batch.prefixes for batch in batches], tokens),
        laid([batch.sources for batch in batches], tokens),
        np.zeros(places[-1], np.int64),
        np.concatenate([[0], laid([batch.offsets[1:] for batch in batches], places)]),
        np.concatenate([batch.keys for batch in batches]),
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
    runs_ahead: bool = False
    """Whether it is far away, so that a step is sent before the results of the one before it are read."""


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
        """`weights` as they are published, `final` the same at the end, or the `state` that resuming needs besides."""
        ...

    def load(self, weights: Path, state: Path | None = None) -> None:
        """Go on from what was saved."""
        ...

    def sum_over_processes(self, values: Floats) -> Floats:
        """The sum of the values over all processes of the run."""
        ...

    def peak_memory_bytes(self) -> int:
        """The most memory the device has held for this run so far; 0 where nobody tells."""
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
class PromptAsk:
    """What is asked of a prompt's own tokens besides how likely they are; place i is that of its token i + 1."""

    first: int = 0
    """Places before this one are not rated."""
    likeliest: int = 0
    targets: Ints | None = None
    """Tokens to rate at each place, [places, K]."""
    drawn: int = 0
    """How many tokens to draw at each place, with the stream's temperature and a seed of their own."""
    seed: int = 0


@dataclass(frozen=True)
class PromptRated:
    """How likely each token of a prompt is, from the first place asked for, and what else was asked of the places."""

    logprobs: Logits
    likeliest: tuple[Ints, Logits] | None = None
    targets: Logits | None = None
    drawn: tuple[Ints, Logits] | None = None


@dataclass(frozen=True)
class Drawn:
    """One more token of a stream, how likely the model held it, and the likeliest tokens where they were asked for."""

    stream: int
    token: int
    logprob: float
    likeliest: tuple[Ints, Logits] | None = None
    prompt: PromptRated | None = None
    """With the first token, where it was asked for."""


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
        rated: PromptAsk | None = None,
        copies: Sequence[tuple[int, SampleParams]] = (),
    ) -> None:
        """A new stream, and others that go on from the same prompt; their first tokens come with the next steps."""
        ...

    def step(self) -> list[Drawn]:
        """One more token of every stream."""
        ...

    def leave(self, stream: int) -> None:
        """No more tokens of a stream."""
        ...

    def tenants(self) -> Tenants:
        """Adapters in training over the same base; one pass at a time, theirs or that of the streams."""
        ...


@dataclass(frozen=True)
class AdapterLayout:
    """An adapter that is trained beside others: its rank, where its first values come from, and what it adapts."""

    rank: int
    seed: int = 0
    alpha: float = 32.0
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = True

    @property
    def scale(self) -> float:
        """What B @ A is multiplied by."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Share:
    """One adapter's part of a joined batch; without a loss, log-probabilities are all that is wanted."""

    tenant: str
    batch: Batch
    loss: Loss | None = None


class Tenants(Protocol):
    """Many adapters in training over one frozen base; none of them sees that there are others."""

    @property
    def vocabulary(self) -> int:
        """How many tokens the base knows."""
        ...

    @property
    def budget(self) -> int:
        """How many tokens are well computed at once on this device."""
        ...

    def open(self, tenant: str, layout: AdapterLayout) -> None:
        """A new adapter, as training begins."""
        ...

    def drop(self, tenant: str) -> None:
        """Forget an adapter."""
        ...

    def compute(self, shares: Sequence[Share]) -> list[Computed]:
        """One pass for all of them; gradients add up beside those that are kept, until `keep` or `discard`."""
        ...

    def keep(self, tenant: str) -> None:
        """Add the fresh gradients to those that the next step takes."""
        ...

    def discard(self, tenant: str) -> None:
        """Forget the fresh gradients."""
        ...

    def optim_step(self, tenant: str, params: StepParams) -> StepTaken:
        """Step by the gradients that were kept, or refuse; forgets them."""
        ...

    def save(self, tenant: str, what: str) -> Saved:
        """The adapter as it is published (`adapter`), or all that training needs to go on (`state`)."""
        ...

    def load(self, tenant: str, folder: Path, *, optimizer: bool) -> None:
        """Go on from what was saved; without the optimizer its state begins anew."""
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
