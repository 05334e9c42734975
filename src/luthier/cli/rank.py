"""One of several processes of a run: `python -m luthier.cli.rank RUN`; the command that started them watches."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_SIGNAL_OF_PARENTS_DEATH = 1


def main(arguments: list[str]) -> int:
    """Train this process's share of the run; only the leading process says anything."""
    _follow_parent()
    from luthier.cli.live import train_and_tell
    from luthier.cli.output import print_error, wants_json
    from luthier.engines.surroundings import prepare_process
    from luthier.errors import LuthierError, ProcessDiedError
    from luthier.runs.run import open_run
    from luthier.training.launch import PEER_DIED

    folder, flags = arguments[0], arguments[1:]
    try:
        run = open_run(folder)
        prepare_process(run.spec.compute.processes)
        return train_and_tell(
            run,
            resume="--resume" in flags,
            allow_changed="--allow-changed" in flags,
            as_json=wants_json(flags),
        )
    except ProcessDiedError:
        return PEER_DIED
    except LuthierError as error:
        print_error(error, as_json=wants_json(flags) and os.environ.get("RANK") == "0")
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _follow_parent() -> None:
    """Be asked to stop when the process that started this one is gone, so that none of them trains on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SIGNAL_OF_PARENTS_DEATH, signal.SIGTERM, 0, 0, 0)


if __name__ == "__main__":
    from luthier.cli.main import end

    end(main(sys.argv[1:]))
