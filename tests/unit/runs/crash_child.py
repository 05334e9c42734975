"""Save checkpoints in one child for each given crash point, which dies there; run as a script by the test beside it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from luthier.runs.checkpoints import CheckpointStore
from luthier.runs.manifest import CRASH_VARIABLE
from tests.unit.runs.folders import save


def run(folder: Path, crash_at: str, steps: list[int]) -> int:
    """The exit code of a child that saves these steps and notes each one that is done."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.environ[CRASH_VARIABLE] = crash_at
    os.fsync = lambda _: None  # the process dies and not the machine; what is synced has a test of its own
    folder.mkdir()
    store = CheckpointStore(folder, keep_weights=2)
    for step in steps:
        save(store, step)
        (folder / "done").write_text(str(step))
    os._exit(0)


if __name__ == "__main__":
    parent, steps, cases = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    codes = {case: run(parent / case.replace(":", "-"), case, steps) for case in cases}
    sys.stdout.write(json.dumps(codes))
