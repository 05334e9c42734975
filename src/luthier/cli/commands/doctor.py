"""`luthier doctor`: what is installed here, what does not fit, and what to do next."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import click

import luthier
from luthier.cli.output import Command, print_json, print_table, say
from luthier.extras import EXTRAS
from luthier.machine import Machine, find_machine

_KEYS = ("HF_TOKEN", "OPENAI_API_KEY", "TINKER_API_KEY", "SYNTH_API_KEY", "WANDB_API_KEY")
_SHOWN = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "bitsandbytes",
    "peft",
    "trl",
    "mlx",
    "mlx-lm",
    "tinker",
    "ray",
)


@click.command("doctor", cls=Command)
def command(as_json: bool) -> int:
    """Print versions, devices, extras, keys (never their values), disk, and the next command."""
    from luthier.runs.home import luthier_home

    home, machine = luthier_home(), find_machine()
    found = Diagnosis(
        luthier=luthier.__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        cores=machine.cores,
        memory_bytes=machine.memory_bytes,
        available_bytes=machine.available_bytes,
        devices=_devices(machine),
        has_bf16=machine.has_bf16,
        packages={name: _version(name) for name in _SHOWN},
        extras={extra: all(_version(package) for package in packages) for extra, packages in EXTRAS.items()},
        keys_present=[name for name in _KEYS if os.environ.get(name)],
        home=str(home),
        disk_free_bytes=shutil.disk_usage(_existing(home)).free,
        conflicts=_conflicts(),
    )
    if as_json:
        print_json({**asdict(found), "next": _next_command(found)})
    else:
        _print(found)
    return 1 if found.conflicts else 0


@dataclass(frozen=True)
class Diagnosis:
    """What was found on this machine."""

    luthier: str
    python: str
    platform: str
    cores: int
    memory_bytes: int
    available_bytes: int
    devices: list[str]
    has_bf16: bool
    packages: dict[str, str]
    extras: dict[str, bool]
    keys_present: list[str]
    home: str
    disk_free_bytes: int
    conflicts: list[str]


def _print(found: Diagnosis) -> None:
    gib = 1 << 30
    say(f"luthier {found.luthier}, Python {found.python}, {found.platform}")
    rows = [
        ("cores", str(found.cores)),
        ("memory", f"{found.memory_bytes / gib:.1f} GiB ({found.available_bytes / gib:.1f} GiB free)"),
        ("devices", ", ".join(found.devices) + ("" if found.has_bf16 else " (no bf16)")),
        ("home", f"{found.home} ({found.disk_free_bytes / gib:.1f} GiB free)"),
        ("keys", ", ".join(found.keys_present) or "none"),
    ]
    print_table(rows)
    say("packages")
    print_table([(name, version or "not installed") for name, version in found.packages.items()])
    say("extras")
    print_table(
        [(name, "installed" if there else f"pip install 'luthier[{name}]'") for name, there in found.extras.items()]
    )
    for conflict in found.conflicts:
        say(f"conflict: {conflict}")
    say(f"next: {_next_command(found)}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _conflicts() -> list[str]:
    """Installed packages outside the bounds that Luthier was tested with."""
    try:
        from packaging.requirements import Requirement

        needed = [Requirement(line) for line in importlib.metadata.requires("luthier") or []]
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return []
    found = []
    for requirement in needed:
        version = _version(requirement.name)
        if version and not requirement.specifier.contains(re.sub(r"\+.*", "", version), prereleases=True):
            fix = f"pip install '{requirement.name}{requirement.specifier}'"
            found.append(f"{requirement.name} {version} is not {requirement.specifier}; run: {fix}")
    return found


def _devices(machine: Machine) -> list[str]:
    """Accelerators, told without importing torch."""
    found = ["cpu"]
    if machine.device == "cuda":
        gib = machine.device_memory_bytes / (1 << 30)
        found += [f"cuda:{index} ({machine.device_name}, {gib:.0f} GiB)" for index in range(machine.device_count)]
    if sys.platform == "darwin" and platform.machine() == "arm64":
        found.append("mps")
    return found


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _next_command(found: Diagnosis) -> str:
    if found.conflicts:
        return found.conflicts[0].rpartition("run: ")[2]
    if not found.extras["fast"]:
        return "pip install 'luthier[fast]' (reads data several times faster)"
    return "luthier data check FILE --model practice"
