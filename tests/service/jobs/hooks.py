"""What a test changes in a worker before it begins."""

from __future__ import annotations

import itertools
import time

from tests.runs.hooks import Forked


def jumping_clock() -> None:
    """The wall clock is an hour ahead at every other look, as if somebody set it to and fro."""
    honest, looks = time.time, itertools.count()
    time.time = lambda: honest() + 3600.0 * (next(looks) % 2)


def believe_in_room() -> None:
    """Nobody looks whether the disk has room, so that the disk itself has to say no."""
    from luthier.runs import checkpoints

    checkpoints.reserve_check = lambda *_: None


def fork_shares() -> None:
    """The processes of a run are forks of the trainer."""
    import subprocess
    from types import SimpleNamespace

    from luthier.training import launch

    launch.subprocess = SimpleNamespace(Popen=ForkedShare, TimeoutExpired=subprocess.TimeoutExpired)


class ForkedShare(Forked):
    """What the launcher of processes needs of subprocess.Popen, by a fork."""

    module = "luthier.jobs.child"

    @staticmethod
    def work(arguments: list[str]) -> int:
        from luthier.jobs.child import share_run

        assert arguments[0] == "--share"
        return share_run(arguments[1], resume="--resume" in arguments)
