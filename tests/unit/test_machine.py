"""The machine is told from the kernel's files and nvidia-smi; a container's limits count, not what lies outside it."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from luthier import machine
from luthier.machine import Machine, find_machine

GIB = 1 << 30
SMI = """#!/bin/sh
echo '0, GPU-aaaa, NVIDIA H200, 143771, 140000, 9.0'
echo '1, GPU-bbbb, NVIDIA H200, 143771, 1000, 9.0'
"""


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 8 GiB without accelerator, on which nothing is limited."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    write(tmp_path, "proc/meminfo", f"MemTotal: {8 << 20} kB\nMemFree: 1 kB\nMemAvailable: {6 << 20} kB\n")
    write(tmp_path, "proc/cpuinfo", "processor : 0\nmodel name : Quick (R) 9000\nflags : sse avx512_bf16\n\nother\n")
    return tmp_path


def add_gpus(root: Path, monkeypatch: pytest.MonkeyPatch, script: str = SMI, torch: str = "2.13.0") -> None:
    write(root, "bin/nvidia-smi", script)
    (root / "bin" / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{root / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(importlib.metadata, "version", lambda _: torch)


def test_a_plain_machine(root: Path) -> None:
    assert find_machine(root) == Machine(
        cores=8,
        memory_bytes=8 * GIB,
        available_bytes=6 * GIB,
        device="cpu",
        device_name="Quick (R) 9000",
        device_memory_bytes=8 * GIB,
        device_free_bytes=6 * GIB,
        has_bf16=True,
        key="cpu-Quick-R-9000-8",
    )


def test_this_machine() -> None:
    machine = find_machine()
    assert machine.cores >= 1
    assert 0 < machine.available_bytes <= machine.memory_bytes


def test_a_processor_without_bf16(root: Path) -> None:
    write(root, "proc/cpuinfo", "model name: Old\nflags: sse avx2\n")
    assert not find_machine(root).has_bf16


def test_an_arm_processor_lists_features(root: Path) -> None:
    write(root, "proc/cpuinfo", "processor: 0\nFeatures: fp asimd bf16\n")
    assert find_machine(root).has_bf16


def test_a_container_limits_memory_and_gives_cached_files_back(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/box/inner\n")
    group = "sys/fs/cgroup/box"
    write(root, f"{group}/inner/memory.max", "max\n")
    write(root, f"{group}/memory.max", f"{4 * GIB}\n")
    write(root, f"{group}/memory.current", f"{3 * GIB}\n")
    write(root, f"{group}/memory.stat", f"anon 1\ninactive_file {GIB}\n")
    write(root, f"{group}/cpu.max", "150000 100000\n")
    machine = find_machine(root)
    assert (machine.memory_bytes, machine.available_bytes, machine.cores) == (4 * GIB, 2 * GIB, 2)


def test_the_older_kind_of_container(root: Path) -> None:
    write(root, "proc/self/cgroup", "4:memory:/somewhere/of/the/host\n2:cpu,cpuacct:/\n1:name=systemd:/\n")
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{2 * GIB}\n")
    write(root, "sys/fs/cgroup/memory/memory.usage_in_bytes", f"{GIB}\n")
    write(root, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    machine = find_machine(root)
    assert (machine.available_bytes, machine.cores) == (GIB, 8)


def test_no_limit_is_no_limit(root: Path) -> None:
    write(root, "proc/self/cgroup", "4:memory:/\n0::/\n")
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(root, "sys/fs/cgroup/cpu.max", "max 100000\n")
    machine = find_machine(root)
    assert (machine.available_bytes, machine.cores) == (6 * GIB, 8)


def test_accelerators_count_by_the_one_with_least_room(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_gpus(root, monkeypatch)
    machine = find_machine(root)
    assert (machine.device, machine.device_name, machine.device_count) == ("cuda", "NVIDIA H200", 2)
    assert machine.device_free_bytes == 1000 << 20
    assert machine.has_bf16
    assert machine.key == "cuda-NVIDIA-H200"


@pytest.mark.parametrize(("visible", "count", "free"), [("0", 1, 140000), ("GPU-bbbb", 1, 1000), ("1,0", 2, 1000)])
def test_only_visible_accelerators_count(
    visible: str, count: int, free: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_gpus(root, monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machine = find_machine(root)
    assert (machine.device_count, machine.device_free_bytes) == (count, free << 20)


@pytest.mark.parametrize("visible", ["", "-1"])
def test_hidden_accelerators_are_not_there(visible: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_gpus(root, monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_machine(root).device == "cpu"


def test_a_torch_for_processors_only_cannot_use_them(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_gpus(root, monkeypatch, torch="2.13.0+cpu")
    assert find_machine(root).device == "cpu"


def test_the_tool_without_a_driver_means_no_accelerator(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_gpus(root, monkeypatch, script="#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert find_machine(root).device == "cpu"


def test_an_accelerator_that_shares_the_machines_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_gpus(root, monkeypatch, script="#!/bin/sh\necho '0, GPU-c, NVIDIA GB10, [N/A], [N/A], 12.1'\n")
    machine = find_machine(root)
    assert (machine.device, machine.device_free_bytes, machine.has_bf16) == ("cuda", 6 * GIB, True)


def test_an_old_accelerator_has_no_bf16(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_gpus(root, monkeypatch, script="#!/bin/sh\necho '0, GPU-d, Tesla T4, 15360, 15000, 7.5'\n")
    assert not find_machine(root).has_bf16


def test_a_mac_has_one_memory_of_which_metal_takes_a_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As far as it can be told without one: its processor, its memory and no NVIDIA tools."""
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    monkeypatch.setattr(machine.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(machine, "_ask_kernel", lambda key: "Apple M4 Max")
    for gib, room in ((16, 16 * 2 / 3), (24, 16), (36, 27), (128, 96)):
        monkeypatch.setattr(machine, "_physical_bytes", lambda gib=gib: gib << 30)
        found = find_machine(tmp_path, engine="mlx")
        assert (found.device, found.device_name, found.precision) == ("metal", "Apple M4 Max", "bf16")
        assert found.device_free_bytes >> 20 == int(room * 1024)
        assert found.key == f"metal-Apple-M4-Max-{gib}"
    assert find_machine(tmp_path).device == "cpu"


def test_mlx_on_another_machine_takes_its_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine, "_find_gpus", lambda *_: pytest.fail("asked for accelerators that mlx does not use"))
    assert find_machine(engine="mlx").device == "cpu"
