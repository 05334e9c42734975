"""Load a run spec: file, recipe, flags and `--set` in, a checked RunSpec with the origin of each value out."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel, ValidationError

from luthier.errors import CallError, MissingPathError, SpecError
from luthier.spec.dialects import synth
from luthier.spec.lines import find_toml_lines, find_yaml_lines
from luthier.spec.problems import Problem, list_problems, raise_problems
from luthier.spec.run import RunSpec, find_contradictions

PATH_KEYS = (
    "model.base",
    "model.chat_template",
    "data.train",
    "data.valid",
    "output.dir",
    "output.model_id_file",
)
_SUFFIXES = {".toml": "toml", ".yaml": "yaml", ".yml": "yaml", ".json": "json"}
MAX_SPEC_BYTES = 1 << 20


@dataclass(frozen=True)
class Override:
    """One value given outside the file, and the words that gave it (`flag --rank`, `--set method.rank`)."""

    path: str
    value: object
    origin: str


@dataclass(frozen=True)
class LoadedSpec:
    """A checked spec, where each value came from, and notes of a dialect's translation."""

    spec: RunSpec
    origins: Mapping[str, str]
    name: str
    notes: tuple[str, ...] = ()


@dataclass
class _Draft:
    """The tables as read, before they are checked."""

    tables: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    name: str = "the command line"
    base_dir: Path | None = None
    notes: list[str] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)

    def where(self, path: str) -> str:
        """`file:line` of a key, of the table around it, or the flag that set it."""
        for shorter in _and_parents(path):
            if shorter in self.origins:
                return self.origins[shorter]
        for shorter in _and_parents(path):
            if shorter in self.lines:
                return f"{self.name}:{self.lines[shorter]}"
        return self.name


def load_spec(path: Path | None, overrides: list[Override] | None = None) -> LoadedSpec:
    """Read the spec at `path` (none: from flags alone), apply the overrides and check it whole."""
    draft = _read_draft(path) if path else _Draft()
    return _checked(draft, overrides or [])


def load_spec_text(
    text: str, kind: str, *, name: str, base_dir: Path, overrides: list[Override] | None = None
) -> LoadedSpec:
    """The same for text that does not lie in a file of its own; `kind` is toml, yaml or json."""
    return _checked(_parse_draft(text, kind, name, base_dir), overrides or [])


def _checked(draft: _Draft, overrides: list[Override]) -> LoadedSpec:
    in_file = {path: draft.where(path) for path, _ in walk_values(draft.tables)}
    _resolve_paths(draft)
    for override in overrides:
        _place(draft.tables, override)
        draft.origins[override.path] = override.origin
    try:
        spec = RunSpec.model_validate(draft.tables)
    except ValidationError as error:
        raise_problems(list_problems(error, draft.tables, draft.where), draft.name)
        raise
    values = list(walk_values(dump_spec(spec)))
    huge = [path for path, value in values if isinstance(value, int) and abs(value) >= 2**63]
    contradictions = [(path, "is larger than 64 bits hold") for path in huge] + find_contradictions(spec)
    raise_problems([Problem(path, f"`{path}` {text}", draft.where(path)) for path, text in contradictions], draft.name)
    origins = {path: "default" for path, _ in values} | in_file | draft.origins
    return LoadedSpec(spec, origins, draft.name, tuple(draft.notes))


def _read_draft(path: Path) -> _Draft:
    kind = _SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise SpecError(
            f"{path}: not a run spec: found the ending `{path.suffix}`",
            hint="a spec is .toml, .yaml or .json",
        )
    if not path.is_file():
        raise MissingPathError(f"no spec at {path}", hint="`luthier recipes list` shows specs to copy", where=str(path))
    if path.stat().st_size > MAX_SPEC_BYTES:
        raise SpecError(f"{path}: a spec of {path.stat().st_size} bytes; the most is {MAX_SPEC_BYTES}")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}", where=str(path)) from None
    return _parse_draft(text, kind, path.name, path.parent)


def _parse_draft(text: str, kind: str, name: str, base_dir: Path) -> _Draft:
    tables = _parse(text, kind, name)
    lines = find_toml_lines(text) if kind == "toml" else find_yaml_lines(text)
    if synth.is_synth(tables):
        translated = synth.build_tables(tables, name)
        return _Draft(translated.tables, translated.place_lines(lines), name, None, translated.notes)
    return _Draft(tables, lines, name, base_dir)


def _parse(text: str, kind: str, name: str) -> dict[str, Any]:
    try:
        if kind == "toml":
            return tomllib.loads(text)
        tables = _parse_json(text) if kind == "json" else _parse_yaml(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{name}: not valid TOML: {error}", hint=_toml_hint(str(error)), where=name) from None
    except ValueError as error:
        raise SpecError(f"{name}: not valid {kind.upper()}: {error}", where=name) from None
    except RecursionError:
        raise SpecError(f"{name}: nested too deeply", where=name) from None
    if not isinstance(tables, dict):
        raise SpecError(f"{name}: expected tables at the top, found {_plain_type(tables)}", where=name)
    return tables


def _plain_type(value: object) -> str:
    return {"NoneType": "nothing", "list": "a list", "str": "text"}.get(type(value).__name__, "a value")


def _toml_hint(message: str) -> str:
    if "Invalid value" in message:
        return 'text needs quotes (base = "org/name"), booleans are true and false'
    return ""


def _parse_json(text: str) -> object:
    orjson.loads(text)  # refuses what json.loads lets pass: NaN, half of a surrogate pair
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key `{key}` stands twice")
        found[key] = value
    return found


def _parse_yaml(text: str) -> object:
    import yaml

    class PlainLoader(yaml.SafeLoader):
        """YAML whose `2e-4` is a number, as everybody who writes it means; keys stand once, nothing is an alias.

        A few aliases of aliases can stand for more values than there is memory, and one of itself for ever more.
        """

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
                raise ValueError(f"line {line}: aliases are not taken; repeat the value")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            return _unique(
                [
                    (self.construct_object(key, deep=True), self.construct_object(value, deep=True))
                    for key, value in node.value
                ]
            )

    PlainLoader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    try:
        return yaml.load(text, PlainLoader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _and_parents(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def walk_values(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each (dotted path, value) that is not itself a table."""
    for key, value in tables.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            yield from walk_values(value, path)
        else:
            yield path, value


def _place(tables: dict[str, Any], override: Override) -> None:
    *parents, last = override.path.split(".")
    table = tables
    for name in parents:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise CallError(f"`{override.path}`: `{name}` is a value, not a table", where=override.origin)
    table[last] = override.value


def _resolve_paths(draft: _Draft) -> None:
    """Paths in a file are relative to the file; those of flags and of the Synth dialect to the working directory."""
    if draft.base_dir is None:
        return
    for dotted in PATH_KEYS:
        table_name, key = dotted.split(".")
        table = draft.tables.get(table_name)
        value = table.get(key) if isinstance(table, dict) else None
        if isinstance(value, str) and is_local_path(dotted, value, draft.base_dir):
            try:
                table[key] = absolute_path(value, draft.base_dir)  # type: ignore[index]
            except (RuntimeError, ValueError) as error:  # no such user's home; a NUL
                raise SpecError(f"`{dotted}`: {value!r} is no path: {error}", where=draft.where(dotted)) from None


def absolute_path(value: str, base_dir: Path) -> str:
    """The path from `base_dir`. An absolute one stays as given: a link may have a name that says more than its file."""
    path = Path(value).expanduser()
    resolved = (base_dir / path).resolve()
    return str(path if path.is_absolute() else resolved)


def is_local_path(dotted: str, value: str, base_dir: Path) -> bool:
    """Whether the value of a key in PATH_KEYS is a path on this machine, and not a hub id, `ft:` id or stdin."""
    if value in ("", "-") or value.startswith(("hf:", "ft:")):
        return False
    if dotted == "model.base":
        return value.startswith((".", "/", "~")) or (base_dir / value).is_dir()
    return True


def parse_setting(text: str) -> Override:
    """`section.key=value` as an override; the value is read as TOML, and as plain text where it is none."""
    path, equals, value = text.partition("=")
    path = path.strip()
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", path):
        raise CallError(
            f"--set {text!r}: expected section.key=value", hint="for instance --set optim.learning_rate=2e-4"
        )
    try:
        read = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        read = value.strip()
    return Override(path, read, f"--set {path}")


def dump_spec(spec: BaseModel) -> dict[str, Any]:
    """The spec as plain tables, with every key; what has no value is null."""
    return spec.model_dump(mode="json")


def render_toml(tables: Mapping[str, Any]) -> str:
    """Plain tables as TOML; keys without a value are left out, since TOML has no null."""
    head = [f"{key} = {_toml_value(value)}" for key, value in tables.items() if _is_plain(value)]
    body = [_toml_table(key, value) for key, value in tables.items() if isinstance(value, Mapping)]
    return "\n\n".join(part for part in ["\n".join(head), *body] if part) + "\n"


def _is_plain(value: object) -> bool:
    return value is not None and not isinstance(value, Mapping)


def _toml_table(name: str, table: Mapping[str, Any]) -> str:
    rows = [f"{key} = {_toml_value(value)}" for key, value in table.items() if _is_plain(value)]
    inner = [_toml_table(f"{name}.{key}", value) for key, value in table.items() if isinstance(value, Mapping)]
    return "\n\n".join(part for part in ["\n".join([f"[{name}]", *rows]) if rows else "", *inner] if part)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return orjson.dumps(value).decode().replace("\x7f", "\\u007F")
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)
