"""A process that certifies and ends: `python -m luthier.adapters.fresh FOLDER` reads its order there and answers there.

Nothing of the process that trained is in it: what it finds, it found on disk.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from luthier.adapters.certificate import Certificate, build_certificate
from luthier.adapters.claims import Order, gather_claims
from luthier.adapters.merge import Stopped
from luthier.errors import LuthierError, ProofError

_ORDER, _ANSWER, _LOG = "order.json", "answer.json", "log.txt"
_POLL_SECONDS = 0.02
_GRACE_SECONDS = 10.0
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LUTHIER_CRASH_AT")
_SIGNAL_OF_PARENTS_DEATH = 1


def certify_in_fresh_process(order: Order, should_stop: Callable[[], bool] | None = None) -> Certificate:
    """The claims as another process found them; raises Stopped when asked to stop on the way."""
    with tempfile.TemporaryDirectory(prefix="luthier-verify-") as place:
        folder = Path(place)
        (folder / _ORDER).write_bytes(orjson.dumps(asdict(order)))
        environment = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
        with (folder / _LOG).open("wb") as log:
            child = subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", "-m", "luthier.adapters.fresh", place],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
            )
            try:
                _wait(child, should_stop)
            finally:
                _end(child)
        return _read_answer(folder, child.returncode)


def _wait(child: subprocess.Popen[bytes], should_stop: Callable[[], bool] | None) -> None:
    while child.poll() is None:
        if should_stop and should_stop():
            raise Stopped
        time.sleep(_POLL_SECONDS)


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _read_answer(folder: Path, code: int) -> Certificate:
    found: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        found = orjson.loads((folder / _ANSWER).read_bytes())
    if "claims" in found:
        return build_certificate(found)
    if error := found.get("error"):
        raise ProofError(f"the certificate could not be made: {error['message']}", hint=error["hint"])
    lines = (folder / _LOG).read_text("utf-8", "replace").strip().splitlines()
    how = f"its process was ended by {signal.Signals(-code).name}" if code < 0 else f"its process ended with {code}"
    raise ProofError(
        f"the certificate could not be made: {how}" + (f": {lines[-1]}" if lines else ""),
        hint="`luthier verify RUN` makes it; free memory first if the process was killed",
    )


def main(place: str) -> int:
    """Do what the order in the folder says, and write the answer beside it."""
    _follow_parent()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    from luthier.engines.surroundings import prepare_process

    prepare_process()
    folder = Path(place)
    order = Order(**orjson.loads((folder / _ORDER).read_bytes()))
    try:
        answer: dict[str, Any] = gather_claims(order).as_dict()
    except LuthierError as error:
        answer = {"error": error.as_dict()}
    draft = folder / f"{_ANSWER}.draft"
    draft.write_bytes(orjson.dumps(answer))
    draft.replace(folder / _ANSWER)
    return 0


def _follow_parent() -> None:
    """End when the process that asked is gone, so that none works on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SIGNAL_OF_PARENTS_DEATH, signal.SIGTERM, 0, 0, 0)


if __name__ == "__main__":
    code = main(sys.argv[1])
    # Taking torch apart on the way out would cost most of a second.
    os._exit(code)
