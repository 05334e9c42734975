"""Import an optional package, or say which command installs it."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from luthier.errors import MissingExtraError

# Package by extra, as in pyproject.toml; `luthier doctor` lists them.
EXTRAS = {
    "fast": ("gigatoken",),
    "parquet": ("pyarrow",),
    "zstd": ("zstandard",),
    "hf": ("datasets",),
    "gguf": ("gguf",),
    "torch": ("torch", "transformers", "bitsandbytes"),
}


def import_extra(module: str, extra: str) -> ModuleType:
    """The module of an optional package; MissingExtraError with the install command when it is not there."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(
            f"this needs the package `{package}`, which is not installed",
            hint=f"run: pip install 'luthier[{extra}]'",
        )
    return importlib.import_module(module)
