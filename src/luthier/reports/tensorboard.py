"""TensorBoard as an event sink: scalars in event files under the run folder, without TensorFlow or torch."""

from __future__ import annotations

import time
from typing import Any

from luthier.extras import import_extra
from luthier.reports.sinks import list_scalars
from luthier.runs.events import Event, Resumed
from luthier.runs.run import Run

FOLDER = "tensorboard"
_EXTRA = "tensorboard"
_FLUSH_SECONDS = 10


class TensorBoardSink:
    """Writes what `tensorboard --logdir` reads."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._events = import_extra("tensorboard.compat.proto.event_pb2", _EXTRA)
        self._summaries = import_extra("tensorboard.compat.proto.summary_pb2", _EXTRA)

    def log(self, event: Event) -> None:
        """Steps and evaluations become scalars; those that a resume takes back are taken off the curves."""
        if isinstance(event, Resumed):
            start = self._events.SessionLog(status=self._events.SessionLog.START)
            self._write(event.step + 1, session_log=start)
        step, scalars = list_scalars(event)
        if scalars:
            values = [self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
            self._write(step, summary=self._summaries.Summary(value=values))

    def close(self) -> None:
        """Write out what is still held."""
        self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._events.Event(step=step, wall_time=time.time(), **content))


def open_sink(run: Run) -> TensorBoardSink:
    """A sink that writes into `tensorboard/` of the run folder."""
    module = import_extra("tensorboard.summary.writer.event_file_writer", _EXTRA)
    return TensorBoardSink(module.EventFileWriter(str(run.folder / FOLDER), flush_secs=_FLUSH_SECONDS))


def find_command(run: Run) -> str:
    """What shows the curves."""
    return f"tensorboard --logdir {run.folder / FOLDER}"
