"""constraints.txt pins everything that pyproject.toml asks for, inside its bounds, and torch by its plain version."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PIN = re.compile(r"(?P<name>[\w.-]+)==(?P<version>[\w.]+)")


def _pins(root: Path) -> dict[str, str]:
    lines = [line for line in (root / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    matches = [PIN.fullmatch(line) for line in lines]
    assert all(matches), f"not an exact pin: {[line for line, m in zip(lines, matches, strict=True) if not m]}"
    found = {canonicalize_name(match["name"]): match["version"] for match in matches if match}
    assert len(found) == len(lines), "a package is pinned twice"
    return found


def test_pins_are_sorted_and_say_how_they_are_made(root: Path) -> None:
    first, *lines = (root / "constraints.txt").read_text("utf-8").splitlines()
    assert "make constraints" in first
    assert lines == sorted(lines, key=str.upper)


def test_each_pin_satisfies_its_bound(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [Requirement(text) for text in [*project["dependencies"], *(t for each in extras.values() for t in each)]]
    assert len(asked) >= 25
    pins = _pins(root)
    unpinned = [each.name for each in asked if canonicalize_name(each.name) not in pins]
    assert unpinned == []
    outside = [str(each) for each in asked if not each.specifier.contains(pins[canonicalize_name(each.name)])]
    assert outside == []


def test_torch_is_pinned_without_a_build(root: Path) -> None:
    # `2.13.0+cpu` would refuse every other build, and no pin at all lets another package choose one.
    assert _pins(root)["torch"] == "2.13.0"


def test_no_pin_belongs_to_luthier_or_to_cuda(root: Path) -> None:
    assert [name for name in _pins(root) if name == "luthier" or name.startswith(("nvidia-", "triton"))] == []
