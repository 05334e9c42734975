"""Asked to stop: SIGINT and SIGTERM set a flag that is looked at between micro-batches; a second Ctrl-C ends all."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143}


class StopFlag:
    """Whether, and by which signal, the run was asked to stop."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._before: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self.reason is not None

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.reason is not None and name == "SIGINT":
            raise KeyboardInterrupt
        self.reason = name
