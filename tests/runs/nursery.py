"""A process that has imported everything once and forks a child for each command; run as a script by `children.py`.

A fork takes milliseconds where a start takes seconds, and the child is a process like any other: with its own pid, its
own exit code, and killed by the same signals.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import threading
from typing import Any

from tests.certifying import never_start_a_process

PRELOADED = (
    "torch",
    "transformers.models.qwen3.modeling_qwen3",
    "luthier.engines.torch.engine",
    "luthier.cli.commands.train",
    "luthier.cli.commands.resume",
    "luthier.cli.live",
    "luthier.workflow",
    "luthier.training.session",
    "luthier.training.planner",
    "luthier.adapters.verify",
)


def end_with_parent() -> None:
    """No process is left behind when the tests are killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


def bear(order: dict[str, Any], inherited: list[int]) -> int:
    """Fork a child that runs one command of ours; its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        end_with_parent()
        for number in inherited:
            os.close(number)
        for number, path in ((1, order["out"]), (2, order["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.environ.clear()
        os.environ.update(order["env"])
        os.chdir(order["cwd"])
        if order["hook"]:
            module, _, name = order["hook"].partition(":")
            getattr(importlib.import_module(module), name)()
        from luthier.cli.main import main

        code = main(order["argv"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Read orders and answer them, one JSON line each."""
    end_with_parent()
    orders, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for name in (*PRELOADED, *sys.argv[1:]):
        importlib.import_module(name)
    never_start_a_process()
    assert threading.active_count() == 1
    gc.collect()
    gc.freeze()
    answers.write('{"ready": true}\n')
    answers.flush()
    for line in orders:
        order = json.loads(line)
        if "wait" in order:
            code = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
            answers.write(json.dumps({"code": code}) + "\n")
        else:
            answers.write(json.dumps({"pid": bear(order, [orders.fileno(), answers.fileno()])}) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
