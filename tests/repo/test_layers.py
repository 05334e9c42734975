"""The layers drawn in DESIGN.md hold: the contracts of pyproject.toml, checked by import-linter."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path


def test_layers_hold(root: Path) -> None:
    script = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kept, 0 broken" in done.stdout


def test_every_layer_of_the_package_is_in_the_contract(root: Path) -> None:
    contracts = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = {name.strip() for line in contracts[0]["layers"] for name in line.split("|")}
    found = set()
    for path in (root / "src" / "luthier").iterdir():
        if path.suffix == ".py" and path.stem != "__init__":
            found.add(f"luthier.{path.stem}")
        elif (path / "__init__.py").is_file():
            found.add(f"luthier.{path.name}")
    # What ships for practice and tests is imported by nobody and imports nothing.
    assert found - layers <= {"luthier.testing"}
