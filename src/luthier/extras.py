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
    "mlx": ("mlx", "mlx_lm"),
    "tensorboard": ("tensorboard",),
    "server": ("fastapi", "uvicorn", "sqlalchemy", "alembic", "prometheus_client", "python_multipart", "psycopg"),
    "tinker": ("tinker",),
    "torch": ("torch", "transformers", "bitsandbytes"),
    "trl": ("torch", "transformers", "bitsandbytes", "accelerate", "datasets", "peft", "trl"),
    "wandb": ("wandb",),
}


def import_extra(module: str, extra: str) -> ModuleType:
    """The module of an optional package; MissingExtraError with the install command when it is not there."""
    check_extra(module.partition(".")[0], extra)
    return importlib.import_module(module)


def check_extra(package: str, extra: str) -> None:
    """The same without importing anything."""
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(
            f"this needs the package `{package}`, which is not installed",
            hint=f"run: pip install 'luthier[{extra}]'",
        )


def list_missing(extra: str) -> list[str]:
    """The packages of an extra that are not installed; nothing is imported."""
    return [package for package in EXTRAS.get(extra, ()) if importlib.util.find_spec(package) is None]
