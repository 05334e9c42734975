"""Streams packed without padding: each has a lane for its keys and values, and joins and leaves as it likes.

What a stream says does not depend on the others, bit for bit on a CPU: rows do not see each other, each attends to its
own lane alone, and long prompts are fed in parts that they alone decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.engines.torch.attention import Lane, Lanes
from luthier.engines.torch.ends import put_low
from luthier.engines.torch.head import ROUNDED, Head
from luthier.engines.torch.loading import Loaded, find_rope_limit, run_lanes
from luthier.engines.torch.shared import Pass, SharedLayers, Stretch, lacking_rows, padded
from luthier.engines.torch.stream import Group, Stream
from luthier.engines.verbs import Drawn

_FEW_ROWS = 64
_FED_TOKENS = 1024
"""The most of one prompt, and of all prompts together, that goes through the model between two tokens of the others."""


def can_pack_streams(loaded: Loaded) -> bool:
    """Whether a model's tokens see each other through our attention alone."""
    config = loaded.model.config.get_text_config()
    stretches = any(find_rope_limit(config, kind) is not None for kind in ("dynamic", "longrope"))
    return loaded.is_packed and loaded.device.type == "cpu" and not stretches


@dataclass
class _Segment:
    """Tokens of one stream or prompt in a pass."""

    tokens: list[int]
    lane: Lane
    adapter: str | None
    stream: Stream | None = None
    group: Group | None = None


class PackedStreams:
    """All streams of a model, one more token of each in a step."""

    def __init__(self, loaded: Loaded, shared: SharedLayers) -> None:
        self._loaded, self._shared = loaded, shared
        self._waiting: list[tuple[Group, Lane]] = []
        self._running: list[_Segment] = []

    def add(self, group: Group) -> None:
        """A prompt and its streams."""
        self._waiting.append((group, Lane()))

    def leave(self, stream: int) -> None:
        """No more tokens of a stream."""
        self._running = [each for each in self._running if each.stream and each.stream.id != stream]
        for group, _ in self._waiting:
            group.streams = [each for each in group.streams if each.id != stream]
        self._waiting = [each for each in self._waiting if each[0].streams]

    def step(self) -> list[Drawn]:
        """One more token of every stream whose prompt went through the model."""
        for each in self._running:
            assert each.stream
            each.tokens = [each.stream.last]
        segments = sorted([*self._running, *self._feed()], key=lambda segment: segment.adapter or "")
        if not segments:
            return []
        try:
            hidden = self._run(segments)
            ends = torch.tensor([len(segment.tokens) for segment in segments]).cumsum(0)
            logits = self._rate(segments, hidden[ends - 1])
            for segment, end in zip(segments, ends.tolist(), strict=True):
                if segment.group:
                    self._rate_prompt(segment, hidden[end - len(segment.tokens) : end])
        finally:
            self._shared.now = Pass()
        drawn: list[Drawn] = []
        for segment, own in zip(segments, logits, strict=False):
            drawn += self._draw(segment, own)
        return drawn

    def _feed(self) -> list[_Segment]:
        """The next parts of prompts that wait."""
        fed: list[_Segment] = []
        room = _FED_TOKENS
        for group, lane in self._waiting:
            tokens = group.prompt[group.fed : group.fed + _FED_TOKENS]
            if fed and len(tokens) > room:
                break
            fed.append(_Segment(tokens, lane, group.adapter, group=group))
            room -= len(tokens)
        return fed

    def _run(self, segments: list[_Segment]) -> Tensor:
        lengths = [len(segment.tokens) for segment in segments]
        count = sum(lengths)
        more = lacking_rows(count) if count <= _FEW_ROWS else -count % ROUNDED
        tokens = [token for segment in segments for token in segment.tokens] + [0] * more
        places = [
            place
            for segment in segments
            for place in range(segment.lane.length, segment.lane.length + len(segment.tokens))
        ]
        filling = ((more,), (None,)) if more else ((), ())
        lanes = Lanes((*lengths, *filling[0]), (*(segment.lane for segment in segments), *filling[1]))
        self._shared.now = Pass(_stretches(segments, lengths), count + more)
        hidden = run_lanes(self._loaded, torch.tensor(tokens), torch.tensor(places + [0] * more), lanes)
        for segment, length in zip(segments, lengths, strict=True):
            segment.lane.length += length
        return hidden

    def _rate(self, segments: list[_Segment], rows: Tensor) -> Tensor:
        """Logits behind the last token of each segment."""
        enough = padded(rows)
        self._shared.now = Pass(_stretches(segments, [1] * len(segments)), len(enough))
        logits: Tensor = self._loaded.head.shape(self._loaded.model.get_output_embeddings()(enough))
        return logits

    def _rate_prompt(self, segment: _Segment, hidden: Tensor) -> None:
        group = segment.group
        assert group
        group.rate(find_own_head(self._loaded.head, self._shared, group.adapter), hidden, group.fed)
        group.fed += len(segment.tokens)

    def _draw(self, segment: _Segment, logits: Tensor) -> list[Drawn]:
        """The next token of a stream; the first ones of all that go on from a prompt, once it is through."""
        if segment.stream:
            return [segment.stream.draw(logits)]
        group = segment.group
        assert group
        if group.fed < len(group.prompt):
            return []
        self._waiting = [each for each in self._waiting if each[0] is not group]
        rated, drawn = group.rating(logits.shape[-1]), []
        for number, stream in enumerate(group.streams):
            lane = segment.lane.copy() if number + 1 < len(group.streams) else segment.lane
            self._running.append(_Segment([], lane, group.adapter, stream))
            drawn.append(stream.draw(logits, rated))
        return drawn


def find_own_head(head: Head, shared: SharedLayers, adapter: str | None) -> Head:
    """The head as an adapter sees it."""
    low = shared.find(shared.head).updates.get(adapter) if adapter and shared.head else None
    return put_low(head, low) if low else head


def _stretches(segments: Sequence[_Segment], lengths: Sequence[int]) -> list[Stretch]:
    """Neighbours of one adapter as one stretch."""
    found: list[Stretch] = []
    start = 0
    for segment, length in zip(segments, lengths, strict=True):
        stop = start + length
        if segment.adapter is not None:
            if found and found[-1].adapter == segment.adapter and found[-1].stop == start:
                found[-1] = Stretch(segment.adapter, found[-1].start, stop)
            else:
                found.append(Stretch(segment.adapter, start, stop))
        start = stop
    return found
