"""What a model folder may hold before anything is loaded from it, and the folder of models that a server offers.

Choosing a base model must never run code: what asks for code of its own, or could only be unpickled, is refused here,
by reading names and small JSON files and nothing else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from luthier.errors import ModelError
from luthier.runs.layout import PRACTICE

MODELS_VARIABLE = "LUTHIER_MODELS"
OFFERED = "offered.json"
"""In a models folder: names of models that lie elsewhere, and where. Whoever runs the server wrote it."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FT_ID = re.compile(r"ft:[\w./-]{1,200}(?::[\w.-]{1,64}){1,3}")
_MODEL_TYPE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json", "adapter_config.json")
_MOST_CONFIG_BYTES = 16 << 20
_CODE = (".py", ".pyc", ".so", ".dll", ".dylib", ".sh")
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack", ".npy", ".npz", ".joblib")
_OTHER_MODEL = "use a model whose architecture transformers knows"


def models_folder() -> Path | None:
    """The folder laid out `org/name` in which model names resolve first: LUTHIER_MODELS."""
    named = os.environ.get(MODELS_VARIABLE)
    return Path(named).expanduser() if named else None


def find_in_models(name: str, models: Path | None) -> Path | None:
    """The folder of `org/name` in it, or that it says lies elsewhere; one that is a link out of it is refused."""
    if models is None or not _is_hub_id(name):
        return None
    if isinstance(offered := read_object(models / OFFERED).get(name), str):
        return Path(offered)
    folder = models / name
    if not folder.is_dir():
        return None
    if not folder.resolve().is_relative_to(models.resolve()):
        raise ModelError(f"{name}: leads out of the models folder by a link", hint="put the model itself there")
    return folder


def check_name(base: str) -> None:
    """Refuse what a request must not name as its base: a path of the server's disk above all."""
    if base != PRACTICE and not _is_hub_id(base) and not _FT_ID.fullmatch(base):
        raise ModelError(
            f"{base!r} is not the name of a model",
            hint="a name is `org/name` such as Qwen/Qwen3-0.6B, an `ft:` id of this server, or `practice`",
        )


def _is_hub_id(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and all(part.strip(".") for part in name.split("/"))


def list_in_models(models: Path | None) -> list[str]:
    """The `org/name` of each model in it."""
    if models is None or not models.is_dir():
        return []
    found = (path.parent.relative_to(models).as_posix() for path in models.glob("*/*/config.json"))
    return sorted({*filter(_is_hub_id, found), *read_object(models / OFFERED)})


def check_model_folder(folder: Path, within: Path | None = None) -> None:
    """Refuse a folder that a server must not train from: code in it, pickled weights, links that lead out, no weights.

    Cheap: it lists names and reads the small JSON files. A folder that was offered from elsewhere may hold links as
    far as its own `org/name` lies, as those of a hub's cache do.
    """
    root = (within or folder).resolve()
    if not folder.resolve().is_relative_to(root):
        root = folder.resolve().parent.parent
    names = sorted(folder.iterdir())
    for path in names:
        suffix = path.suffix.lower()
        if suffix in _CODE:
            raise _refused(folder, f"holds code (`{path.name}`), which Luthier never runs")
        if suffix in _PICKLED:
            raise _refused(folder, f"holds `{path.name}`; only safetensors are ever loaded", "remove that file")
        if not path.resolve().is_relative_to(root):
            raise _refused(folder, f"`{path.name}` is a link that leads out of it", "put the file itself there")
    if not any(path.suffix == ".safetensors" for path in names):
        raise _refused(folder, "holds no .safetensors file", "other formats of weights are never loaded")
    check_configs(folder)


def check_configs(folder: Path) -> Path:
    """Refuse configurations that ask to run code, or whose `model_type` is no name of an architecture."""
    for name in _CONFIGS:
        for facts in _tables(read_object(folder / name)):
            if facts.get("auto_map"):
                raise ModelError(
                    f"{folder.name}: {name} asks to run code of its own (`auto_map`), which Luthier never does",
                    hint=_OTHER_MODEL,
                )
            kind = facts.get("model_type", "none")
            if not isinstance(kind, str) or not (kind == "" or _MODEL_TYPE.fullmatch(kind)):
                raise ModelError(
                    f"{folder.name}: {name} has the `model_type` {kind!r}, which is no name of an architecture",
                    hint=_OTHER_MODEL,
                )
    return folder


def read_object(path: Path) -> dict[str, Any]:
    """A configuration; empty where there is none, or where it is not an object."""
    if not path.is_file():
        return {}
    if path.stat().st_size > _MOST_CONFIG_BYTES:
        raise ModelError(f"{path}: {path.stat().st_size:,} bytes; the most is {_MOST_CONFIG_BYTES:,}")
    try:
        facts = orjson.loads(path.read_bytes())
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from None
    return facts if isinstance(facts, dict) else {}


def _refused(folder: Path, what: str, hint: str = _OTHER_MODEL) -> ModelError:
    return ModelError(f"{folder.name}: {what}", hint=hint)


def _tables(facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration and those inside it; not by recursion, which a hostile file could exhaust."""
    left: list[Any] = [facts]
    while left:
        table = left.pop()
        if isinstance(table, dict):
            yield table
            left += table.values()
        elif isinstance(table, list):
            left += table
