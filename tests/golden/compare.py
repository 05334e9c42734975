"""Compare text with a golden file, or record it again where RECORD_GOLDEN is set."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parent


def check_golden(name: str, text: str) -> None:
    """Fail where the text is not that of the file; `RECORD_GOLDEN=1` writes the file instead."""
    path = FOLDER / name
    if os.environ.get("RECORD_GOLDEN"):
        path.write_text(text, "utf-8")
    assert path.read_text("utf-8") == text, (
        f"{name} differs; RECORD_GOLDEN=1 records it again, and the diff is reviewed"
    )
