"""Asked to stop: SIGINT and SIGTERM set a flag that is looked at between micro-batches; a second Ctrl-C ends it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143}


class AskedToStop(BaseException):
    """Raised where work that leaves nothing behind is stopped in the middle."""


class StopFlag:
    """Whether, and by which signal, the run was asked to stop.

    As a context it listens to the signals; one context inside another changes nothing. `tell` is called with the
    signal's name inside the signal's handler, so it must not wait for anything.
    """

    def __init__(self, tell: Callable[[str], None] | None = None) -> None:
        self.reason: str | None = None
        self._tell = tell
        self._depth = 0
        self._is_raising = False
        self._before: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self.reason is not None

    def __enter__(self) -> StopFlag:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        while not self._depth and self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, being asked to stop raises AskedToStop: there is nothing to save, and no micro-batch to wait for."""
        self._is_raising = True
        try:
            if self:
                raise AskedToStop
            yield
        finally:
            self._is_raising = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.reason is not None and name == "SIGINT":
            raise KeyboardInterrupt
        self.reason = name
        if self._tell:
            self._tell(name)
        if self._is_raising:
            raise AskedToStop
