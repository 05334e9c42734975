"""Engines by name, as strings, so that nothing here reaches a heavy package before one is asked for."""

from __future__ import annotations

import importlib
from typing import Any

from luthier.errors import UnsupportedError

ENGINES = {"torch": "luthier.engines.torch.engine"}


def find_engine(kind: str) -> Any:
    """The `build` function of an engine; UnsupportedError for one that this version does not have."""
    if kind not in ENGINES:
        raise UnsupportedError(
            f"engine `{kind}` is not in this version; there is: {', '.join(ENGINES)}",
            hint='leave engine.kind out, or set it to "torch"',
        )
    return importlib.import_module(ENGINES[kind]).build
