"""A decoder and all who listen to it: streams join between tokens, by turns of the projects that ask."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from luthier.engines.verbs import Decoder, Drawn, PromptAsk, SampleParams
from luthier.errors import LuthierError
from luthier.host.computing import Turns
from luthier.runs.manifest import MANIFEST, check_manifest

_MOST_STREAMS = 32
_MOST_ADAPTERS = 64


@dataclass(frozen=True)
class Opening:
    """What streams go on from: one prompt, an adapter's folder, and the draws of each stream."""

    prompt: Sequence[int]
    draws: Sequence[SampleParams]
    adapter: str | None = None
    likeliest: int = 0
    rated: PromptAsk | None = None
    project: str = ""


class Listener(Protocol):
    """Somebody who waits for streams; all of it is called by the thread that computes."""

    is_cancelled: bool
    """Set by anyone, when nobody listens any more."""

    @property
    def opening(self) -> Opening:
        """What is wanted."""
        ...

    def begin(self) -> None:
        """Its first streams joined."""
        ...

    def hear(self, place: int, drawn: Drawn) -> bool:
        """One more token of its stream of that place; true where it was the last that is wanted."""
        ...

    def fail(self, error: LuthierError) -> None:
        """There will be no more."""
        ...


@dataclass
class _Waiting:
    """A listener, and how many of its streams have joined."""

    listener: Listener
    joined: int = 0

    @property
    def left(self) -> int:
        return len(self.listener.opening.draws) - self.joined


class Streams:
    """The streams of one decoder; `add` may be called from any thread, the rest belongs to the one that computes."""

    def __init__(self, decoder: Decoder, wake: Callable[[], None]) -> None:
        self._decoder, self._wake = decoder, wake
        self._lock = threading.Lock()
        self._arrived: deque[Listener] = deque()
        self._waiting: dict[str, deque[_Waiting]] = {}
        self._running: dict[int, tuple[Listener, int]] = {}
        self._adapters: OrderedDict[str, None] = OrderedDict()
        self._turns = Turns()
        self._number = 0

    def add(self, listener: Listener) -> None:
        """Somebody waits from now on."""
        with self._lock:
            self._arrived.append(listener)
        self._wake()

    def has_work(self) -> bool:
        """Whether there is anything to do now."""
        return bool(self._arrived or self._waiting or self._running)

    def work(self) -> None:
        """One more token of every stream."""
        self._sort_arrived()
        self._let_go()
        self._let_join()
        if not self._running:
            return
        try:
            drawn = self._decoder.step()
        except Exception as error:  # the edge of the thread: whoever waits must hear of it
            self._fail_running(error)
            return
        for each in drawn:
            # One that failed with an earlier token of this step is gone.
            if each.stream in self._running:
                self._tell(each)

    def _sort_arrived(self) -> None:
        with self._lock:
            arrived, self._arrived = self._arrived, deque()
        for listener in arrived:
            self._waiting.setdefault(listener.opening.project, deque()).append(_Waiting(listener))

    def _let_go(self) -> None:
        """Of those who do not listen any more."""
        for number, (listener, _) in list(self._running.items()):
            if listener.is_cancelled:
                self._leave(number)
        for project, queue in list(self._waiting.items()):
            self._waiting[project] = deque(each for each in queue if not each.listener.is_cancelled)
            if not self._waiting[project]:
                del self._waiting[project]

    def _let_join(self) -> None:
        while self._waiting and (room := _MOST_STREAMS - len(self._running)) > 0:
            project = self._turns.choose(list(self._waiting))
            waiting = self._waiting[project][0]
            count = min(room, waiting.left)
            self._turns.charge(project, count)
            self._join(waiting, count)
            if not waiting.left:
                self._waiting[project].popleft()
                if not self._waiting[project]:
                    del self._waiting[project]

    def _join(self, waiting: _Waiting, count: int) -> None:
        """Some of a listener's streams, with one pass of the prompt for them."""
        opening, first = waiting.listener.opening, waiting.joined
        numbers = range(self._number + 1, self._number + 1 + count)
        streams = list(zip(numbers, opening.draws[first : first + count], strict=True))
        self._number += count
        waiting.joined += count
        try:
            if opening.adapter is not None:
                self._adopt(opening.adapter)
            (number, params), copies = streams[0], streams[1:]
            self._decoder.join(
                number,
                opening.prompt,
                params,
                adapter=opening.adapter,
                likeliest=opening.likeliest,
                rated=None if first else opening.rated,
                copies=copies,
            )
        except Exception as error:  # the edge of the thread: whoever waits must hear of it
            waiting.joined = len(opening.draws)
            self._fail(waiting.listener, error)
            return
        for place, (number, _) in enumerate(streams, first):
            self._running[number] = waiting.listener, place
        if not first:
            waiting.listener.begin()

    def _adopt(self, folder: str) -> None:
        """Have the adapter in memory, every byte checked; the one that was not asked for longest makes room."""
        if folder not in self._adapters:
            if (Path(folder) / MANIFEST).is_file():
                check_manifest(Path(folder))
            self._decoder.adopt(folder, Path(folder))
            self._adapters[folder] = None
        self._adapters.move_to_end(folder)
        in_use = {listener.opening.adapter for listener, _ in self._running.values()}
        for name in list(self._adapters)[: max(0, len(self._adapters) - _MOST_ADAPTERS)]:
            if name not in in_use:
                self._decoder.forget(name)
                del self._adapters[name]

    def _tell(self, drawn: Drawn) -> None:
        listener, place = self._running[drawn.stream]
        try:
            is_last = listener.hear(place, drawn)
        except Exception as error:  # the edge of the thread: whoever waits must hear of it
            self._fail(listener, error)
            return
        if is_last:
            self._leave(drawn.stream)

    def _leave(self, number: int) -> None:
        self._decoder.leave(number)
        self._running.pop(number, None)

    def _fail_running(self, error: Exception) -> None:
        for listener in {id(each): each for each, _ in self._running.values()}.values():
            self._fail(listener, error)

    def _fail(self, listener: Listener, error: Exception) -> None:
        for number, (each, _) in list(self._running.items()):
            if each is listener:
                self._leave(number)
        listener.is_cancelled = True
        is_told = isinstance(error, LuthierError)
        listener.fail(error if is_told else LuthierError(f"{type(error).__name__}: {error}"))  # type: ignore[arg-type]
