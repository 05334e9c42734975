"""TensorBoard as an event sink: scalars in event files under the run folder, without TensorFlow or torch."""

from __future__ import annotations

import time
from typing import Any

from luthier.extras import import_extra
from luthier.reports.sinks import list_scalars
from luthier.runs.events import Event
from luthier.runs.run import Run

FOLDER = "tensorboard"
_EXTRA = "tensorboard"


class TensorBoardSink:
    """Writes what `tensorboard --logdir` reads."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._events = import_extra("tensorboard.compat.proto.event_pb2", _EXTRA)
        self._summaries = import_extra("tensorboard.compat.proto.summary_pb2", _EXTRA)

    def log(self, event: Event) -> None:
        """Steps and evaluations become scalars."""
        step, scalars = list_scalars(event)
        if scalars:
            values = [self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
            summary = self._summaries.Summary(value=values)
            self._writer.add_event(self._events.Event(step=step, wall_time=time.time(), summary=summary))

    def close(self) -> None:
        """Write out what is still held."""
        self._writer.close()


def open_sink(run: Run) -> TensorBoardSink:
    """A sink that writes into `tensorboard/` of the run folder."""
    module = import_extra("tensorboard.summary.writer.event_file_writer", _EXTRA)
    return TensorBoardSink(module.EventFileWriter(str(run.folder / FOLDER)))
