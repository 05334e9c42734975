"""What comes of every public method of the Tinker SDK is what docs/reference/tinker-matrix.md says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.service.tinker.sdk import run_client, serve_practice
from tests.serving import ROOT

pytest.importorskip("tinker")
pytestmark = pytest.mark.slow

PAGE = ROOT / "docs" / "reference" / "tinker-matrix.md"
HEAD = """# Methods of the Tinker SDK

<!-- Made by tests/service/tinker/test_matrix.py, which calls each: RECORD_GOLDEN=1 writes it again. -->

What `luthier serve` answers to each public method of `tinker` {version}. "refused" and "not offered" are errors that
the caller sees at once, with the sentence shown; "the SDK answers" means that no request is sent. Where a method has a
deprecated `_async` twin, it was called too and did the same. Older versions have fewer methods and use the same routes.
"""


def test_the_page_says_what_comes_of_each_method(tmp_path: Path) -> None:
    with serve_practice(tmp_path) as served:
        found = run_client("sdk_methods.py", served, tmp_path)
    parts = [HEAD.format(version=found["version"])]
    for client, methods in found["methods"].items():
        rows = [f"| `{name}` | {_cell(said)} | {_cell(sent)} |" for name, (said, sent) in methods.items()]
        parts.append(
            "\n".join([f"## {client}\n", "| method | what comes | requests |", "| --- | --- | --- |", *rows, ""])
        )
    rows = [f"| `{name}` | {_cell(said)} |" for name, said in found["losses"].items()]
    parts.append("\n".join(["## Losses of `forward_backward`\n", "| loss | what comes |", "| --- | --- |", *rows, ""]))
    text = "\n".join(parts)
    if os.environ.get("RECORD_GOLDEN"):
        PAGE.write_text(text, "utf-8")
    assert PAGE.read_text("utf-8") == text, "run this test with RECORD_GOLDEN=1, and review the difference"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
