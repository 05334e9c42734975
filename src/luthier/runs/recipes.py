"""The recipes shipped with the package: specs with a promise that is measured."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path

import luthier
from luthier.errors import MissingPathError
from luthier.spec.load import PATH_KEYS, load_spec_text
from luthier.spec.run import RunSpec


def _folder() -> Path:
    """Inside an installed package, or at the top of a checkout."""
    package = Path(luthier.__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parents[1] / "recipes"


def list_recipes() -> list[str]:
    """Names of all recipes."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def own_recipe(name: str) -> str:
    """A recipe as a file of one's own: paths beside the recipe become absolute, so that they still lead there."""
    _, text = load_recipe(name)
    tables = tomllib.loads(text)
    for key in PATH_KEYS:
        table, _, field = key.partition(".")
        value = tables.get(table, {}).get(field)
        if isinstance(value, str) and (found := (_folder() / value).resolve()).exists():
            text = text.replace(f'"{value}"', f'"{found.as_posix()}"')
    return text


def load_recipe(name: str) -> tuple[RunSpec, str]:
    """A recipe as a checked spec, and as the text that is copied."""
    names = list_recipes()
    if name not in names:
        close = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean `{close[0]}`?" if close else "`luthier recipes list` shows them"
        raise MissingPathError(f"no recipe `{name}`", hint=hint)
    path = _folder() / f"{name}.toml"
    text = path.read_text("utf-8")
    return load_spec_text(text, "toml", name=path.name, base_dir=path.parent).spec, text
