"""What a process must know before torch is loaded: how many threads, and how memory is given back."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

_NO_MMAP, _NO_TRIM = (-4, 0), (-1, 2**31 - 1)


def prepare_process(processes: int = 1) -> None:
    """Set threads and memory for training on a CPU; what the person set in the environment wins."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    # Waiting threads sleep instead of spinning: on a shared machine spinning takes the core the work needs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("USE_HUB_KERNELS", "0")
    _keep_memory()


def _keep_memory() -> None:
    """Let glibc keep what is freed: a training step asks for the same large blocks again and again."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for option, value in (_NO_MMAP, _NO_TRIM):
        mallopt(option, value)


def release_memory() -> None:
    """Give back what training no longer needs, for a process that is going to load the model again."""
    gc.collect()
    if (torch := sys.modules.get("torch")) and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if mlx := sys.modules.get("mlx.core"):
        mlx.clear_cache()
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def peak_of_this_process() -> int:
    """The most memory this process has held; Linux keeps it for it alone, elsewhere what a parent held may count."""
    with suppress(OSError, StopIteration), Path("/proc/self/status").open() as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
