"""Files that were sent are checked at once, one after the other, each in a process with limits."""

from __future__ import annotations

import logging
import queue
import threading
from typing import TYPE_CHECKING

from luthier.errors import LuthierError
from luthier.jobs.checking import check_file

if TYPE_CHECKING:
    from luthier.jobs.files import FileStore, StoredFile

log = logging.getLogger("luthier.server")

_DATA_PURPOSES = ("fine-tune", "user_data", "evals")
_PATIENCE_SECONDS = 5.0
_TRIES = 3


class FileChecks:
    """One thread that waits for files; it starts with the first."""

    def __init__(self, files: FileStore) -> None:
        self._files = files
        self._waiting: queue.SimpleQueue[StoredFile | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._is_closed = False

    def schedule(self, file: StoredFile) -> None:
        """Have a file checked; one that is no training data, or was checked before, is left alone."""
        if file.status != "uploaded" or file.purpose not in _DATA_PURPOSES:
            return
        with self._lock:
            if self._is_closed:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="file checks", daemon=True)
                self._thread.start()
        self._waiting.put(file)

    def schedule_left(self) -> None:
        """At start: what an earlier server did not come to."""
        for file in self._files.unchecked():
            self.schedule(file)

    def close(self) -> None:
        """Finish the file at hand; the others are found again at the next start."""
        with self._lock:
            self._is_closed = True
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join(_PATIENCE_SECONDS)

    def _run(self) -> None:
        while (file := self._waiting.get()) is not None and not self._is_closed:
            try:
                self._check(file)
            except LuthierError as error:
                log.warning("checking %s failed: %s", file.id, error.message)
            except Exception:  # the edge of this thread: the next file must be checked all the same
                log.exception("checking %s failed", file.id)

    def _check(self, file: StoredFile) -> None:
        for _ in range(_TRIES):
            report = check_file(self._files.path(file), filename=file.filename)
            if report.is_final:
                break
            log.warning("checking %s: %s", file.id, report.message)
        status = "ready" if report.ok else "error"
        self._files.set_report(file.project, file.id, status, rows=report.rows, report=report.as_dict())
