"""What this machine is and has: cores, memory and the accelerator, told without loading torch."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_QUERY = ["--query-gpu=index,uuid,name,memory.total,memory.free,compute_cap", "--format=csv,noheader,nounits"]
MEMORY_VARIABLE = "LUTHIER_MEMORY_BYTES"
"""What a run may take of the machine's memory; a server leaves each job its part."""
_NO_LIMIT = 1 << 60  # version 1 of control groups says "no limit" by a number near 2**63


@dataclass(frozen=True)
class Machine:
    """The machine as a run may use it: limits of a container count, not what lies outside it."""

    cores: int
    memory_bytes: int
    available_bytes: int
    device: Literal["cpu", "cuda", "metal"]
    device_name: str
    device_memory_bytes: int
    device_free_bytes: int
    has_bf16: bool
    key: str
    """Names this kind of machine, so that what was measured on one is not believed on another."""
    device_count: int = 1

    @property
    def precision(self) -> str:
        """The number format this device computes fastest in without losing its way."""
        if self.has_bf16:
            return "bf16"
        return "fp32" if self.device == "cpu" else "fp16"


@dataclass(frozen=True)
class _Gpu:
    name: str
    memory_bytes: int
    free_bytes: int
    capability: float


def find_machine(root: Path = Path("/"), *, engine: str = "torch") -> Machine:
    """This machine as an engine uses it; `root` holds `proc` and `sys`."""
    cores, (total, available) = _cores(root), _memory(root)
    if engine == "mlx" and is_apple_silicon():
        return _find_metal(cores, total)
    gpus = [] if engine == "mlx" else _find_gpus(total, available)
    if gpus and not _has_cpu_torch():
        least = min(gpus, key=lambda each: each.free_bytes)
        return Machine(
            cores=cores,
            memory_bytes=total,
            available_bytes=available,
            device="cuda",
            device_name=least.name,
            device_memory_bytes=least.memory_bytes,
            device_free_bytes=least.free_bytes,
            has_bf16=all(each.capability >= 8.0 for each in gpus),
            key=_plain(f"cuda-{least.name}"),
            device_count=len(gpus),
        )
    name, flags = _processor(root)
    return Machine(
        cores=cores,
        memory_bytes=total,
        available_bytes=available,
        device="cpu",
        device_name=name,
        device_memory_bytes=total,
        device_free_bytes=available,
        has_bf16=bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}),
        key=_plain(f"cpu-{name}-{cores}"),
    )


def is_apple_silicon() -> bool:
    """Whether this is a Mac whose processor and accelerator share their memory."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


def _find_metal(cores: int, total: int) -> Machine:
    """An Apple machine: one memory for both, of which Metal takes two thirds, or three quarters of 36 GiB and more."""
    name = _ask_kernel("machdep.cpu.brand_string") or "Apple silicon"
    room = total * 3 // 4 if total >= 36 << 30 else total * 2 // 3
    return Machine(
        cores=cores,
        memory_bytes=total,
        available_bytes=room,
        device="metal",
        device_name=name,
        device_memory_bytes=total,
        device_free_bytes=room,
        has_bf16=True,
        key=_plain(f"metal-{name}-{total >> 30}"),
    )


def _ask_kernel(key: str) -> str:
    command = shutil.which("sysctl")
    if command is None:
        return ""
    try:
        done = subprocess.run([command, "-n", key], capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


def _read(path: Path) -> str:
    """A file of the kernel's, or nothing where it has none."""
    try:
        return path.read_text("ascii", errors="replace")
    except OSError:
        return ""


def _processor(root: Path) -> tuple[str, set[str]]:
    """Name and abilities of the first core; the others are alike."""
    first = _read(root / "proc" / "cpuinfo").partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.split("\n"))
    facts = {key.strip().lower(): value.strip() for key, _, value in pairs}
    name = facts.get("model name") or platform.processor() or platform.machine()
    return name, set((facts.get("flags") or facts.get("features") or "").split())


def _cores(root: Path) -> int:
    """Cores this process may use: those it is bound to, and no more than its container's share of time."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = [bound]
    for folder in _groups(root, "cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        quota = quota or _read(folder / "cpu.cfs_quota_us")
        period = period or _read(folder / "cpu.cfs_period_us")
        if quota.strip().isdigit() and period.strip().isdigit() and int(period):
            shares.append(max(1, math.ceil(int(quota) / int(period))))
    return min(shares)


def _memory(root: Path) -> tuple[int, int]:
    """Memory in all and what is free of it, both within the limits of a container."""
    facts = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read(root / "proc" / "meminfo"), re.MULTILINE))
    if "MemTotal" in facts and "MemAvailable" in facts:
        total, available = int(facts["MemTotal"]) * 1024, int(facts["MemAvailable"]) * 1024
    else:
        total = _physical_bytes()
        available = total // 2  # a system that does not say: half of it is a guess that seldom swaps
    for folder in _groups(root, "memory"):
        limit = _number(folder, "memory.max", "memory.limit_in_bytes")
        used = _number(folder, "memory.current", "memory.usage_in_bytes") or 0
        if limit is None or limit >= _NO_LIMIT:
            continue
        # Pages of files that were read count as used, and are given back when asked for.
        idle = re.search(r"^(?:total_)?inactive_file (\d+)", _read(folder / "memory.stat"), re.MULTILINE)
        free = limit - max(0, used - int(idle[1] if idle else 0))
        total, available = min(total, limit), min(available, max(0, free))
    given = os.environ.get(MEMORY_VARIABLE, "")
    if given.isdigit():
        total, available = min(total, int(given)), min(available, int(given))
    return total, available


def _physical_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def _number(folder: Path, *names: str) -> int | None:
    texts = (_read(folder / name).strip() for name in names)
    return next((int(text) for text in texts if text.isdigit()), None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups this process is in, innermost first, in both versions of them."""
    base = root / "sys" / "fs" / "cgroup"
    for line in _read(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        top = base / controller if controllers else base
        inner = top / path.strip("/")
        # Inside a container the path is often the host's, and only the top is to be seen.
        while inner != top:
            yield inner
            inner = inner.parent
        yield top


def _has_cpu_torch() -> bool:
    """Whether the installed torch can use the processor only."""
    try:
        return importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def _find_gpus(memory_bytes: int, available_bytes: int) -> list[_Gpu]:
    """The NVIDIA accelerators this process may see."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    try:
        done = subprocess.run([command, *_QUERY], capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return []  # the tool without a driver
    return list(_visible(done.stdout, memory_bytes, available_bytes))


def _visible(listed: str, memory_bytes: int, available_bytes: int) -> Iterator[_Gpu]:
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    wanted = None if seen is None else [each.strip() for each in seen.split(",")]
    for line in listed.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 6:
            continue
        index, uuid, name, total, free, capability = cells
        if wanted is not None and index not in wanted and not any(each and uuid.startswith(each) for each in wanted):
            continue
        # Where the accelerator shares the machine's memory, the tool says `[N/A]`.
        yield _Gpu(
            name=name,
            memory_bytes=int(total) << 20 if total.isdigit() else memory_bytes,
            free_bytes=int(free) << 20 if free.isdigit() else available_bytes,
            capability=float(capability) if re.fullmatch(r"\d+\.\d+", capability) else 0.0,
        )


def expand(name: str | Path) -> Path:
    """The path, with `~` written out; where it names an account that is not here, as it stands, which no file has."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)
