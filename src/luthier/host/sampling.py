"""Samples of tokens behind a prompt of tokens, and how likely the prompt's own are: what a `sample` work asks for."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from luthier.data.hashes import mix
from luthier.data.tokens import ModelText
from luthier.engines.chat import Prompter
from luthier.engines.verbs import Drawn, Ints, Logits, PromptAsk, PromptRated, SampleParams
from luthier.errors import CallError, LuthierError
from luthier.host.datums import SampledSequence, SampleOutput, TopK, write_sample_output
from luthier.host.protobuf import Message
from luthier.host.streams import Opening, Streams
from luthier.host.tensors import MOST_CELLS, AnyTensor, SparseRows, read_tensor
from luthier.host.work import Done, Work

MOST_SAMPLES = 1024
MOST_LIKELIEST = 1024

Hear = Callable[[Done], None]


@dataclass
class _Sequence:
    """One sample as it comes."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    likeliest: list[tuple[Ints, Logits]] = field(default_factory=list)
    reason: str = ""


@dataclass(frozen=True)
class _Wanted:
    """The facts of a `sample` work, checked."""

    prompt: list[int]
    adapter: str | None
    samples: int
    params: SampleParams
    stop_texts: tuple[str, ...]
    likeliest: int
    likeliest_of_prompt: int
    rates_prompt: bool
    first: int
    """The place of the prompt from which its tokens are rated."""
    targets: AnyTensor | None
    drawn: int
    project: str

    @property
    def rated(self) -> PromptAsk | None:
        """What is asked of the prompt."""
        if not (self.rates_prompt or self.likeliest_of_prompt or self.targets is not None or self.drawn):
            return None
        whole = self.targets is not None or self.drawn
        targets = None if self.targets is None else np.maximum(_filled(self.targets), 0)
        first = 0 if whole else self.first - 1
        return PromptAsk(first, self.likeliest_of_prompt, targets, self.drawn, self.params.seed)


class Samples:
    """The samples of one work, heard until the last is whole."""

    def __init__(self, work: Work, wanted: _Wanted, told: Hear, text: ModelText) -> None:
        self.work, self._wanted, self._told, self._text = work, wanted, told, text
        self.is_cancelled = False
        self._sequences = [_Sequence() for _ in range(wanted.samples)]
        self._left = wanted.samples
        self._rated: PromptRated | None = None
        draws = [draw_of(wanted.params, number) for number in range(wanted.samples)]
        self.opening = Opening(
            wanted.prompt, draws, wanted.adapter, wanted.likeliest, wanted.rated, wanted.project or "samples"
        )

    def begin(self) -> None:
        """Its first streams joined."""

    def hear(self, place: int, drawn: Drawn) -> bool:
        """One more token of a sample; a stop stays part of it, as the protocol has it."""
        self._rated = drawn.prompt or self._rated
        sequence = self._sequences[place]
        sequence.tokens.append(drawn.token)
        sequence.logprobs.append(drawn.logprob)
        if drawn.likeliest is not None:
            sequence.likeliest.append(drawn.likeliest)
        if drawn.token in self._wanted.params.stop_tokens or self._ends_in_stop(sequence.tokens):
            sequence.reason = "stop"
        elif len(sequence.tokens) >= self._wanted.params.max_tokens:
            sequence.reason = "length"
        if sequence.reason:
            self._left -= 1
            if not self._left:
                self._told(Done(self.work.id, body=write_sample_output(self._output())))
        return bool(sequence.reason)

    def fail(self, error: LuthierError) -> None:
        """There will be no more."""
        self._told(Done(self.work.id, error=error.as_dict()))

    def _ends_in_stop(self, tokens: Sequence[int]) -> bool:
        """Whether the text has a stop by now; a letter has up to four tokens, so a stop lies within the last few."""
        if not self._wanted.stop_texts:
            return False
        last = tokens[-(4 * max(map(len, self._wanted.stop_texts)) + 8) :]
        text = str(self._text.tokenizer.decode(last, skip_special_tokens=False))
        return any(stop in text for stop in self._wanted.stop_texts)

    def _output(self) -> SampleOutput:
        wanted, rated = self._wanted, self._rated
        sequences = tuple(
            SampledSequence(
                np.array(each.tokens, np.int64),
                np.array(each.logprobs, np.float32),
                each.reason,
                _stacked(each.likeliest) if wanted.likeliest else None,
            )
            for each in self._sequences
        )
        if rated is None:
            return SampleOutput(sequences)
        return SampleOutput(
            sequences,
            self._prompt_logprobs(rated) if wanted.rates_prompt else None,
            self._prompt_likeliest(rated) if wanted.likeliest_of_prompt else None,
            None if wanted.targets is None else _answer_targets(wanted.targets, rated),
            rated.drawn if wanted.drawn else None,
        )

    def _prompt_logprobs(self, rated: PromptRated) -> np.ndarray[Any, np.dtype[np.float32]]:
        found = np.full(len(self._wanted.prompt), np.nan, np.float32)
        found[len(found) - len(rated.logprobs) :] = rated.logprobs
        found[: self._wanted.first] = np.nan
        return found

    def _prompt_likeliest(self, rated: PromptRated) -> TopK:
        assert rated.likeliest
        tokens, logprobs = rated.likeliest
        first, length = self._wanted.first, len(self._wanted.prompt)
        found = TopK.empty(length, self._wanted.likeliest_of_prompt)
        start = first - (length - len(tokens))
        found.tokens[first:], found.logprobs[first:] = tokens[start:], logprobs[start:]
        return found


class Sampling:
    """Works of the kind `sample`; called from any thread."""

    def __init__(self, streams: Streams, prompter: Prompter, *, vocabulary: int) -> None:
        self._streams, self._prompter, self._vocabulary = streams, prompter, vocabulary
        self._lock = threading.Lock()
        self._known: dict[tuple[Hear, int], Samples] = {}

    def submit(self, work: Work, hear: Hear) -> None:
        """Begin to sample; what is wrong with the facts is told at once."""
        key = hear, work.id

        def told(done: Done) -> None:
            with self._lock:
                self._known.pop(key, None)
            hear(done)

        try:
            samples = Samples(work, self._read(work.facts, work.body), told, self._prompter.text)
        except LuthierError as error:
            hear(Done(work.id, error=error.as_dict()))
            return
        with self._lock:
            self._known[key] = samples
        self._streams.add(samples)

    def cancel(self, work: int, hear: Hear) -> None:
        """Give up the samples of a work of the same connection."""
        with self._lock:
            samples = self._known.pop((hear, work), None)
        if samples:
            samples.is_cancelled = True

    def leave(self, hear: Hear) -> None:
        """A connection ended, and nobody hears of its works any more."""
        with self._lock:
            gone = [key for key in self._known if key[0] == hear]
            for key in gone:
                self._known.pop(key).is_cancelled = True

    def _read(self, facts: Mapping[str, Any], body: bytes) -> _Wanted:
        prompt = [int(token) for token in facts.get("prompt") or ()]
        if not prompt or min(prompt) < 0 or max(prompt) >= self._vocabulary:
            raise CallError(f"prompt: takes one or more tokens below {self._vocabulary:,}", where="prompt")
        most = int(facts.get("max_tokens") or 1)
        room = self._prompter.room
        if most < 1 or (room and len(prompt) + most > room):
            raise CallError(
                f"max_tokens: is {most:,} behind a prompt of {len(prompt):,} tokens; the model holds {room:,}",
                where="sampling_params.max_tokens",
            )
        stops = tuple(int(token) for token in facts.get("stop_tokens") or ())
        if facts.get("with_stops", True):
            stops += self._prompter.stops
        params = SampleParams(
            most,
            _at_least(facts, "temperature", 1.0),
            min(1.0, _at_least(facts, "top_p", 1.0)),
            _count(facts, "top_k", 2**31),
            int(facts.get("seed") or 0),
            stops,
        )
        samples = max(1, _count(facts, "num_samples", MOST_SAMPLES, 1))
        last = facts.get("prompt_logprobs_last_n")
        return _Wanted(
            prompt,
            facts.get("adapter"),
            samples,
            params,
            tuple(str(stop) for stop in facts.get("stop_texts") or ()),
            self._count_likeliest(facts, "topk_sample_logprobs", samples * most),
            self._count_likeliest(facts, "topk_prompt_logprobs", len(prompt)),
            bool(facts.get("prompt_logprobs")),
            1 if last is None else max(1, len(prompt) - int(last)),
            self._read_targets(body, len(prompt) - 1),
            self._count_likeliest(facts, "prompt_alt_tokens_k", len(prompt)),
            str(facts.get("project") or ""),
        )

    def _count_likeliest(self, facts: Mapping[str, Any], name: str, places: int) -> int:
        """How many tokens are told of each place; all of them are held until the last is there."""
        found = min(_count(facts, name, MOST_LIKELIEST), self._vocabulary)
        if found * places > MOST_CELLS:
            raise CallError(
                f"{name}: {found:,} tokens at each of {places:,} places are more than {MOST_CELLS:,}",
                hint="ask for fewer of them, or for fewer or shorter samples at once",
                where=name,
            )
        return found

    def _read_targets(self, body: bytes, places: int) -> AnyTensor | None:
        if not body:
            return None
        where = "target_prompt_logprobs"
        targets = read_tensor(Message(body, where))
        cells = targets.values if isinstance(targets, SparseRows) else targets
        if len(targets.shape) != 2 or targets.shape[0] != places or cells.dtype.kind != "i":
            raise CallError(
                f"{where}: is {cells.dtype} of the shape {list(targets.shape)}; expected int64 of [{places}, K]",
                where=where,
            )
        if targets.shape[1] > self._vocabulary or targets.shape[0] * targets.shape[1] > MOST_CELLS:
            most = min(self._vocabulary, MOST_CELLS // max(1, places))
            raise CallError(
                f"{where}: names {targets.shape[1]:,} tokens at each of {places:,} places; {most:,} are taken",
                where=where,
            )
        if cells.size and (cells.min() < -1 or cells.max() >= self._vocabulary):
            raise CallError(f"{where}: takes -1 or tokens below {self._vocabulary:,}", where=where)
        return targets


def draw_of(params: SampleParams, number: int) -> SampleParams:
    """The draws of one sample: its own, and the same whichever samples are beside it."""
    seed = int(mix(np.array([params.seed % 2**64], np.uint64), number)[0])
    return SampleParams(
        params.max_tokens, params.temperature, params.top_p, params.top_k, seed % 2**63, params.stop_tokens
    )


def _stacked(rows: Sequence[tuple[Ints, Logits]]) -> TopK:
    return TopK(np.stack([tokens for tokens, _ in rows]), np.stack([logprobs for _, logprobs in rows]))


def _filled(targets: AnyTensor) -> Ints:
    """Every cell; those of a sparse tensor that are not listed are token 0, and not told."""
    found: Ints = targets.dense() if isinstance(targets, SparseRows) else targets
    return found


def _answer_targets(targets: AnyTensor, rated: PromptRated) -> AnyTensor:
    """In the layout in which it was asked; a cell of -1 asked for nothing and gets 0."""
    assert rated.targets is not None
    found = np.where(_filled(targets) < 0, np.float32(0), rated.targets)
    return targets.filled(targets.cells(found)) if isinstance(targets, SparseRows) else found


def _count(facts: Mapping[str, Any], name: str, most: int, default: int = 0) -> int:
    found = facts.get(name)
    if found is None:
        return default
    if not isinstance(found, int) or not 0 <= found <= most:
        raise CallError(f"{name}: is {found!r}; expected a whole number up to {most:,}", where=name)
    return found


def _at_least(facts: Mapping[str, Any], name: str, default: float) -> float:
    found = facts.get(name)
    if found is None:
        return default
    if not isinstance(found, int | float) or not math.isfinite(found) or found < 0:
        raise CallError(f"{name}: is {found!r}; expected a number of 0 or more", where=f"sampling_params.{name}")
    return float(found)
