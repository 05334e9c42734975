"""The sentence under each spec field, read from the source: for help, JSON schema and the reference.

pydantic can read them itself, at 40 ms for every start of the program; this costs nothing until asked, and works
without importing pydantic at all.
"""

from __future__ import annotations

import ast
import inspect
from functools import cache
from pathlib import Path
from typing import Any


@cache
def _classes() -> dict[str, tuple[str, list[str], dict[str, str]]]:
    """Class name to (table, bases, sentences) for every class of the spec."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef):
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                found[node.name] = (path.stem, bases, _sentences_of(node))
    return found


def _sentences_of(node: ast.ClassDef) -> dict[str, str]:
    pairs = zip(node.body, node.body[1:], strict=False)
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in pairs
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def describe_field(part: str, name: str) -> str:
    """The sentence under a class's field; a field without one is a programmer's mistake (KeyError)."""
    _, bases, sentences = _classes()[part]
    if name in sentences:
        return sentences[name]
    for base in bases:
        if base in _classes():
            return describe_field(base, name)
    raise KeyError(f"{part}.{name} has no sentence under it")


def describe_path(path: str) -> str:
    """The sentence of a dotted key, such as `optim.batch`; the `kind` of a tagged table has that of the table."""
    tables, _, key = path.rpartition(".")
    table = tables.rpartition(".")[2]
    modules = [sentences for module, _, sentences in _classes().values() if module == (table or "run")]
    if key == "kind" and len(modules) > 1:
        return describe_field("RunSpec", table)
    return next(sentences[key] for sentences in modules if key in sentences)


def build_schema() -> dict[str, Any]:
    """The JSON schema of a run spec, each field with its sentence."""
    from luthier.spec.run import RunSpec

    schema = RunSpec.model_json_schema()
    for name, definition in {**schema["$defs"], "RunSpec": schema}.items():
        for field, shown in definition.get("properties", {}).items():
            shown["description"] = describe_field(name, field)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
