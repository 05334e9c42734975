"""No key of the run spec is dead: each is read by some code, or stands in unread_keys.txt until it is.

A key counts as read where code outside `spec/` loads it as an attribute of its table: `spec.data.train`,
`self._data.unroll`, or `optim.batch` where a variable is named like the table. So give such variables the table's name.
`[about]` is left out: it is shown whole and decides nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from luthier.spec.problems import list_kinds
from luthier.spec.run import RunSpec

LIST = Path(__file__).parent / "unread_keys.txt"


def _spec_keys() -> set[str]:
    keys = set()
    for name, field in RunSpec.model_fields.items():
        parts = list_kinds(field.annotation)
        keys |= {f"{name}.{key}" for part in parts for key in part.model_fields} or {f"spec.{name}"}
    return {key for key in keys if not key.startswith("about.")}


def _loads(tree: ast.AST) -> Iterator[str]:
    """Each `owner.attribute` that is read, its owner by its last name without underscores in front."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
            yield f"{name.lstrip('_')}.{node.attr}"


def test_no_key_is_dead_unknowingly(root: Path, sources: list[Path]) -> None:
    outside = [path for path in sources if path.relative_to(root / "src" / "luthier").parts[0] != "spec"]
    read = {load for path in outside for load in _loads(ast.parse(path.read_text("utf-8")))}
    keys = _spec_keys()
    assert len(keys) > 50
    assert {"data.train", "data.max_length", "model.base", "spec.seed"} <= read & keys
    listed = [line for line in LIST.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    assert listed == sorted(set(listed)), "unread_keys.txt is sorted, each key once"
    unread = {key.removeprefix("spec.") for key in keys - read}
    assert set(listed) - unread == set(), "these are read now (or gone): take them off unread_keys.txt"
    assert unread - set(listed) == set(), "nothing reads these keys: read them, or take them out of the spec"
