"""One name for a tensor on every engine: the paths of mlx_lm's modules, and the names in files and adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from luthier.weights.mlx import name_for_mlx, name_from_mlx
from luthier.weights.tensors import TensorInfo


def parameters_of(model: nn.Module) -> dict[str, Any]:
    """Every parameter by its path."""
    return dict(tree_flatten(model.parameters()))


def name_in_files(name: str, names: Iterable[str]) -> str | None:
    """The name that a tensor of ours has in the model's files, which may lack a prefix or order it otherwise."""
    known = names if isinstance(names, Mapping | set) else set(names)
    spellings = (name, f"model.{name}", name.partition(".")[2], name_for_mlx(name, nested=True), name_from_mlx(name))
    return next((each for each in spellings if each in known), None)


def path_of(name: str, paths: Mapping[str, Any]) -> str | None:
    """The path in mlx_lm's model of a tensor or module as files or adapters name it."""
    spellings = (name, name_for_mlx(name, nested=True), f"model.{name}", name.partition(".")[2], name_from_mlx(name))
    return next((each for each in spellings if each in paths), None)


def is_published(path: str, shape: tuple[int, ...], files: Mapping[str, TensorInfo]) -> bool:
    """Whether a weight of mlx_lm's model lies in the files as it stands, so that an update of it can be published."""
    found = name_in_files(name_from_mlx(path), files)
    return found is not None and files[found].shape == shape
