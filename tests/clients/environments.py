"""Clean environments for clients, made once and kept outside the repository: `make test-clients` names the folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.serving import ROOT

FOLDER_VARIABLE = "LUTHIER_CLIENTS"
_STAMP = "made-of.txt"
# What synth-ai needs for training, its Python classes and the shipped scripts; its full set takes 1.2 GB.
_SYNTH_NEEDS = (
    "aiohttp==3.14.5",
    "click==8.1.8",
    "fastapi==0.165.0",
    "httpx==0.28.1",
    "opentelemetry-api==1.45.2",
    "pydantic==2.14.3",
    "pynacl==1.6.2",
    "python-dotenv==1.2.4",
    "requests==2.34.2",
    "rich==15.0.0",
    "toml==0.10.2",
)
# What the cookbook's recipes `chat_sl` and `math_rl` need. torch is named with its version, so that no other package
# decides which build of it is installed; the cookbook takes transformers up to 5.5.4.
_COOKBOOK_NEEDS = (
    "tinker==0.38.0",
    "torch==2.13.0",
    "transformers==5.5.4",
    "math-verify==0.9.0",
    "pylatexenc==2.11",
    "sympy==1.14.0",
)
TINKER_VERSIONS = ("0.38.0", "0.36.0", "0.28.1", "0.25.0", "0.24.1", "0.18.2", "0.16.1", "0.13.1", "0.11.0")
COOKBOOK = "cookbook"


@dataclass(frozen=True)
class Pins:
    """What is installed: packages with all that they need, and packages alone."""

    whole: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    as_tested: bool = False
    """What they need comes in the versions of constraints.txt."""
    lent_by: str = ""
    """An environment whose packages are found after its own: one PyTorch is enough for all."""


ENVIRONMENTS = {
    "openai-1": Pins(("openai==1.109.1",)),
    "openai-2": Pins(("openai==2.54.0",)),
    "openai-3": Pins(("openai==3.52.0",)),
    "synth-0.2.10": Pins(_SYNTH_NEEDS, ("synth-ai==0.2.10",)),
    "synth-0.2.9.dev7": Pins(_SYNTH_NEEDS, ("synth-ai==0.2.9.dev7",)),
    COOKBOOK: Pins((*_COOKBOOK_NEEDS, "tinker-cookbook==0.5.3")),
    **{f"tinker-{each}": Pins((f"tinker=={each}",), as_tested=True, lent_by=COOKBOOK) for each in TINKER_VERSIONS},
}


def make_environment(name: str) -> Path:
    """The folder of an environment's commands; made where it is not there yet, or is of other pins."""
    pins = ENVIRONMENTS[name]
    folder = Path(os.environ[FOLDER_VARIABLE]).expanduser() / name
    wanted = "\n".join([*pins.whole, *(f"{each} alone" for each in pins.alone)])
    stamp = folder / _STAMP
    if not stamp.is_file() or stamp.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip: list[str | Path] = [
            folder / "bin" / "python",
            "-m",
            "pip",
            "--disable-pip-version-check",
            "install",
            "--quiet",
        ]
        pip += ["-c", _write_constraints(folder)] if pins.as_tested else []
        if pins.alone:
            subprocess.run([*pip, "--no-deps", *pins.alone], check=True)
        # With all of them on one line pip would ask for what those that stand alone say they need.
        subprocess.run([*pip, *pins.whole], check=True)
        if pins.lent_by:
            lender = find_packages(make_environment(pins.lent_by))
            (find_packages(folder / "bin") / "lent.pth").write_text(f"{lender}\n")
        stamp.write_text(wanted)
    return folder / "bin"


def _write_constraints(folder: Path) -> Path:
    """Our versions of what a client needs, but not of the client itself."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines(keepends=True)
    written = folder / "constraints.txt"
    written.write_text("".join(line for line in lines if not line.startswith("tinker==")), "utf-8")
    return written


def find_packages(commands: Path) -> Path:
    """The folder of an environment's packages."""
    return next((commands.parent / "lib").glob("python*/site-packages"))
