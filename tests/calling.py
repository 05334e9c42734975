"""Commands in this process, asked for JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from luthier.cli.main import main


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What a command says in JSON; it must succeed."""
    capsys.readouterr()
    code = main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0, found
    return found
