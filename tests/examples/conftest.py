"""The Crafter example is a folder of scripts, not a package: its modules are found as its scripts find them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("crafter", reason="the game is not installed: pip install crafter")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "crafter"))
