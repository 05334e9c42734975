"""Write what would drift by hand: reference pages, the tree in README.md, and the outputs shown in the guides.

`--check` writes nothing and exits with 1 when a page or the tree is stale; with `--outputs` it also runs the commands
of the guides and compares. What a page says comes from the code: to change it, change the sentence there.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import click
from pydantic_core import PydanticUndefined

from luthier.cli.main import app
from luthier.data.notes import NOTES
from luthier.data.reasons import REASONS
from luthier.errors import LuthierError
from luthier.spec.describe import describe_field
from luthier.spec.part import Part
from luthier.spec.problems import list_kinds
from luthier.spec.run import RunSpec

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "luthier"
REFERENCE = ROOT / "docs" / "reference"
README = ROOT / "README.md"
GUIDES = ("README.md", "docs/tour.md", "docs/guides/*.md")
MADE = "<!-- Made by `make docs` from the code: change the sentence there. -->"

# Folders that hold no Python module to ask.
FOLDERS = {
    "src/luthier/testing/practice/": "The practice model that is shipped: a real one, small, made by a script.",
    "recipes/": "Run specs that are shipped, each with a promise.",
    "examples/": "Rows for the demo, the guides and first steps.",
    "tests/": "`unit/` mirrors the source; `contract/`, `runs/`, `service/`, `clients/`; `repo/` about the repository.",
    "benchmarks/": "Comparisons with other systems, one command each.",
    "docs/": "Tour, guides, decisions, glossary, and the generated reference.",
    "scripts/": "What makes the practice model, the demo data and these pages.",
}


def main() -> int:
    """Write every page, or name the stale ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when something is stale")
    parser.add_argument("--outputs", action="store_true", help="with --check: run the commands of the guides too")
    options = parser.parse_args()
    stale = []
    for path, text in build_pages(with_outputs=options.outputs or not options.check):
        if path.is_file() and path.read_text("utf-8") == text:
            continue
        stale.append(path.relative_to(ROOT).as_posix())
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
    if options.check and stale:
        print(f"stale: {', '.join(stale)}; run: make docs", file=sys.stderr)
        return 1
    if stale:
        print(f"written: {', '.join(stale)}")
    return 0


def build_pages(*, with_outputs: bool = False) -> Iterator[tuple[Path, str]]:
    """Every generated page with the text that it should have."""
    yield REFERENCE / "spec.md", render_spec()
    yield REFERENCE / "commands.md", render_commands()
    yield REFERENCE / "errors.md", render_errors()
    yield REFERENCE / "reasons.md", render_reasons()
    yield REFERENCE / "server.md", render_server()
    readme = replace_tree(README.read_text("utf-8"))
    if not with_outputs:
        yield README, readme
        return
    for pattern in GUIDES:
        for path in sorted(ROOT.glob(pattern)):
            yield path, replace_outputs(readme if path == README else path.read_text("utf-8"))


def page(title: str, *paragraphs: str) -> str:
    """A generated page."""
    return "\n\n".join([f"# {title}", MADE, *paragraphs]) + "\n"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown; a bar inside a cell is escaped."""
    lines = [head, tuple("---" for _ in head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# -- the run spec --------------------------------------------------------------------------------------------------


def render_spec() -> str:
    """Every table and field of the run spec."""
    top = [name for name, field in RunSpec.model_fields.items() if not list_kinds(field.annotation)]
    parts = [
        "A run spec is a TOML, YAML or JSON file. Every key is listed here, and any other is an error. Paths in a spec "
        "are relative to the spec. Each key can also be set on the command line: `--set optim.batch=32`.",
        "## At the top",
        _fields(RunSpec, "", top),
    ]
    for name, field in RunSpec.model_fields.items():
        kinds = list_kinds(field.annotation)
        if not kinds:
            continue
        if len(kinds) == 1:
            parts += [f"## `[{name}]`", _first_line(kinds[0]), *_tables(kinds[0], name)]
            continue
        parts += [f"## `[{name}]`", describe_field("RunSpec", name)]
        for kind in kinds:
            chosen = get_args(kind.model_fields["kind"].annotation)[0]
            parts += [
                f'### `{name}.kind = "{chosen}"`',
                _first_line(kind),
                _fields(kind, name, list(kind.model_fields)),
            ]
    return page("The run spec", *parts)


def _tables(part: type[Part], name: str) -> list[str]:
    """The keys of a table, and below them the tables inside it."""
    inner = {key: list_kinds(field.annotation) for key, field in part.model_fields.items()}
    parts = [_fields(part, name, [key for key, kinds in inner.items() if not kinds])]
    for key, kinds in inner.items():
        if kinds:
            parts += [f"### `[{name}.{key}]`", _first_line(kinds[0]), *_tables(kinds[0], f"{name}.{key}")]
    return parts


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0]


def _fields(part: type[Part], prefix: str, names: list[str]) -> str:
    rows = []
    for name in sorted(names, key=lambda name: name != "kind"):
        field = part.model_fields[name]
        dotted = f"{prefix}.{name}" if prefix else name
        sentence = describe_field(part.__name__, name)
        rows.append((f"`{dotted}`", _type(field.annotation, field.metadata), _default(field.default), sentence))
    return table(("key", "type", "default", "what it does"), rows)


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "needed"
    if value is None:
        return ""
    return f'`"{value}"`' if isinstance(value, str) else f"`{str(value).lower()}`"


_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false"}


def _type(annotation: Any, metadata: list[Any]) -> str:
    """A type in words: values of a choice, bounds of a number."""
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(f'`"{value}"`' for value in get_args(annotation))
    if origin is list:
        return f"list of {_type(get_args(annotation)[0], [])}"
    if hasattr(annotation, "__metadata__"):
        return _type(annotation.__origin__, _flat(annotation.__metadata__))
    if origin is not None:
        return " or ".join(_type(inner, metadata) for inner in get_args(annotation) if inner is not NoneType)
    bounds = [f"{sign} {value:g}" for key, sign in _BOUNDS.items() if (value := _bound(metadata, key)) is not None]
    return _NAMES[annotation] + (f", {' and '.join(bounds)}" if bounds and annotation is not str else "")


def _flat(metadata: tuple[Any, ...]) -> list[Any]:
    return [inner for each in metadata for inner in getattr(each, "metadata", [each])]


def _bound(metadata: list[Any], key: str) -> float | None:
    return next((getattr(each, key) for each in metadata if getattr(each, key, None) is not None), None)


# -- commands ------------------------------------------------------------------------------------------------------


def walk_commands() -> Iterator[tuple[str, click.Command]]:
    """Every command that can be called, by its whole name."""
    yield from _walk(app, "luthier", click.Context(app, info_name="luthier"))


def _walk(command: click.Command, name: str, context: click.Context) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            found = command.get_command(context, inner)
            assert found is not None
            yield from _walk(found, f"{name} {inner}", click.Context(found, info_name=inner, parent=context))


def render_commands() -> str:
    """Every command with its arguments and options."""
    parts = [
        "Every command takes `--help`, and every command that does something takes `--json`: one JSON object on "
        "standard output, everything else on standard error. Exit code 0 is success, 1 a failure (the data does not "
        "hold), 2 a wrong call or spec."
    ]
    for name, command in walk_commands():
        arguments = [p for p in command.params if isinstance(p, click.Argument)]
        options = [p for p in command.params if isinstance(p, click.Option)]
        shown = " ".join(_argument(argument) for argument in arguments)
        parts += [f"## `{name}{' ' + shown if shown else ''}`", _help(command)]
        if isinstance(command, click.Group):
            inner = command.list_commands(click.Context(command))
            parts.append("Commands: " + ", ".join(f"`{name} {each}`" for each in inner) + ".")
        if options:
            parts.append(table(("option", "what it does"), [_option(option) for option in options]))
    return page("Commands", *parts)


def _argument(argument: click.Argument) -> str:
    name = (argument.name or "").upper()
    return name if argument.required else f"[{name}]"


def _help(command: click.Command) -> str:
    return "\n\n".join(" ".join(block.split()) for block in (command.help or "").split("\n\n"))


def _option(option: click.Option) -> tuple[str, str]:
    flags = ", ".join(option.opts)
    value = "" if option.is_flag else f" {option.metavar or option.type.name.upper()}"
    default = f" Default: `{option.default}`." if option.show_default and option.default is not None else ""
    needed = " Needed." if option.required else ""
    return f"`{flags}{value}`", f"{option.help or ''}{default}{needed}"


# -- errors and reasons --------------------------------------------------------------------------------------------


def walk_errors(base: type[LuthierError] = LuthierError) -> Iterator[type[LuthierError]]:
    """The tree of errors, parents first."""
    yield base
    for each in base.__subclasses__():
        yield from walk_errors(each)


def render_errors() -> str:
    """Every error code."""
    rows = [
        (f"`{error.code}`", f"`{error.__name__}`", _parents(error), str(error.exit_code), _first_line(error))
        for error in walk_errors()
    ]
    return page(
        "Errors",
        "The command line prints `error:` and `hint:`; with `--json` an error is the one object "
        '`{"error": {"code", "message", "hint", "where"}}`, with `details` where there is more to say. Each error is '
        "also a standard one, so `except ValueError` works as expected.",
        table(("code", "class", "is also", "exit code", "when"), rows),
        "A command that was stopped with Ctrl-C exits with 130.",
    )


def _parents(error: type[LuthierError]) -> str:
    return ", ".join(f"`{each.__name__}`" for each in error.__bases__ if each is not Exception)


def render_reasons() -> str:
    """Why a row is not trained, and what is noted of one that is."""
    reasons = [(f"`{r.name}`", r.sentence, "yes" if r.is_malformed else "no") for r in REASONS.values()]
    notes = [(f"`{name}`", sentence) for name, sentence in NOTES.items()]
    return page(
        "Reasons and notes of the ledger",
        "Every input row is in exactly one place: `train`, `valid` or `dropped`. A dropped row has one of these "
        "reasons. A malformed row counts against `data.max_rejected_share` and is kept in `rejected.jsonl`.",
        table(("reason", "the row", "malformed"), reasons),
        "## Notes",
        "A row that is trained or held out may carry notes. They stop nothing, and each is counted in the report.",
        table(("note", "what happened"), notes),
        "A held-out row whose prompt is trained too carries `prompt_in_train`.",
    )


# -- the routes of the server --------------------------------------------------------------------------------------

_VERBS = ("get", "post", "put", "patch", "delete")
_TWICE = "/api/v1/"
"""The Synth routes lie below /api and again below here, where those of Tinker are."""


@dataclass(frozen=True)
class Route:
    """What one function of the server answers, under all its paths."""

    verb: str
    tag: str
    sentence: str
    scope: str
    body: str
    paths: tuple[str, ...]


def read_document() -> dict[str, Any]:
    """The OpenAPI document of a server; no database is opened for it."""
    from luthier.server.app import create_routes

    found: dict[str, Any] = create_routes(None).openapi()  # type: ignore[arg-type]
    return found


def list_routes(document: dict[str, Any]) -> list[Route]:
    """Every route, those that answer the same under several paths as one."""
    routes: dict[tuple[str, ...], list[str]] = {}
    for path, item in document["paths"].items():
        for verb in _VERBS:
            if verb not in item or (path.startswith(_TWICE) and path.replace(_TWICE, "/api/") in document["paths"]):
                continue
            operation = item[verb]
            sentence = (operation.get("description") or operation["summary"]).split("\n\n")[0].replace("\n", " ")
            named = (verb.upper(), operation.get("tags", ["server"])[0], sentence, _scope(operation), _body(operation))
            routes.setdefault(named, []).append(path)
    return [Route(*named, tuple(paths)) for named, paths in routes.items()]


def _scope(operation: dict[str, Any]) -> str:
    scopes = {scope for each in operation.get("security", []) for found in each.values() for scope in found}
    return next(iter(scopes), "none")


def _body(operation: dict[str, Any]) -> str:
    content = operation.get("requestBody", {}).get("content", {})
    if "application/json" in content:
        return str(content["application/json"]["schema"].get("$ref", "")).rpartition("/")[2]
    return next(iter(content), "")


def render_server() -> str:
    """Every route by dialect, and the bodies that they take."""
    document = read_document()
    routes = list_routes(document)
    parts = [
        "What `luthier serve` answers. The same as a machine reads it: `GET /luthier/v1/openapi.json`. A key goes into "
        "`Authorization: Bearer KEY` or `X-API-Key: KEY`; one of scope `submit` may also `read`, and `admin` may all. "
        'Failures have the shape of the dialect: `{"error": {"message", "type", "param", "code"}}` under `/v1`, '
        'the same with `detail`, `code` and `message` beside it under `/api`, and `{"error": {"code", "message", '
        '"hint", "where"}}` under `/luthier/v1`. The codes are those of [the errors](errors.md).',
        "The routes under `/api` answer under `/api/v1` as well, beside those of Tinker.",
    ]
    for tag in dict.fromkeys(route.tag for route in routes):
        rows = [
            (
                "<br>".join(f"`{route.verb} {path}`" for path in route.paths),
                route.sentence,
                route.scope,
                _of(route.body),
            )
            for route in routes
            if route.tag == tag
        ]
        parts += [f"## {tag[0].upper()}{tag[1:]}", table(("route", "what it does", "scope", "body"), rows)]
    for name, schema in _list_bodies(document, routes):
        parts += [f"## `{name}`", _schema_sentence(schema), _properties(schema)]
    return page("The server", *parts)


def _list_bodies(document: dict[str, Any], routes: list[Route]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The bodies that routes take, and what stands inside them; the run spec has a page of its own."""
    schemas = document["components"]["schemas"]
    left = [route.body for route in routes if route.body in schemas]
    seen = {RunSpec.__name__}
    while left:
        name = left.pop(0)
        if name in seen:
            continue
        seen.add(name)
        yield name, schemas[name]
        inside = re.findall(r'"#/components/schemas/(\w+)"', json.dumps(schemas[name]))
        left = [*inside, *left]


def _of(body: str) -> str:
    return body if "/" in body or not body else f"`{body}`"


def _schema_sentence(schema: dict[str, Any]) -> str:
    return str(schema.get("description", "")).split("\n\n")[0].replace("\n", " ")


def _properties(schema: dict[str, Any]) -> str:
    needed = schema.get("required", [])
    rows = [
        (f"`{key}`", _schema_type(value), "yes" if key in needed else "", str(value.get("description", "")))
        for key, value in schema.get("properties", {}).items()
    ]
    return table(("key", "type", "needed", "what it says"), rows)


def _schema_type(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return "[a run spec](spec.md)" if name == RunSpec.__name__ else f"`{name}`"
    if "const" in schema:
        return f'`"{schema["const"]}"`'
    if "enum" in schema:
        return ", ".join(f'`"{value}"`' for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(_schema_type(each) for each in schema["anyOf"] if each.get("type") != "null")
    names = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
    kind = str(schema.get("type", "anything"))
    if kind == "array":
        return f"list of {_schema_type(schema.get('items', {}))}"
    return names.get(kind, kind)


# -- the tree in the README ----------------------------------------------------------------------------------------

_TREE = re.compile(r"(<!-- tree: made by `make docs` -->\n).*?(<!-- end of tree -->)", re.S)


def replace_tree(readme: str) -> str:
    """The README with the tree as it is now."""
    if not _TREE.search(readme):
        raise SystemExit("README.md has lost the marks around its tree")
    return _TREE.sub(lambda match: f"{match[1]}```text\n{render_tree()}\n```\n{match[2]}", readme)


def render_tree() -> str:
    """One line for each module: its path and the first sentence of its docstring."""
    entries = [("src/luthier/", _sentence(PACKAGE / "__init__.py"), 0), *_tree_of(PACKAGE, 1)]
    entries += [(name, text, 0) for name, text in FOLDERS.items() if name.count("/") == 1]
    width = max(len(name) + 2 * depth for name, _, depth in entries) + 2
    return "\n".join(f"{'  ' * depth + name:<{width}}{text}".rstrip() for name, text, depth in entries)


def _tree_of(folder: Path, depth: int) -> Iterator[tuple[str, str, int]]:
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.suffix == ".py" and path.name != "__init__.py":
            yield path.name, _sentence(path), depth
        elif (path / "__init__.py").is_file():
            yield f"{path.name}/", _sentence(path / "__init__.py"), depth
            yield from _tree_of(path, depth + 1)
        elif text := FOLDERS.get(path.relative_to(ROOT).as_posix() + "/"):
            yield f"{path.name}/", text, depth


def _sentence(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    if not docstring:
        raise SystemExit(f"{path.relative_to(ROOT)} has no docstring, which the tree is made from")
    return docstring.splitlines()[0]


# -- outputs in the guides -----------------------------------------------------------------------------------------

_PROGRESS = re.compile(r"[a-z ]+: +\d+%  [\d,]+ rows  ")
_CONSOLE = re.compile(r"(?<=^```console\n).*?(?=^```$)", re.S | re.M)


def list_console_commands(text: str) -> list[str]:
    """The commands that a page shows with their outputs."""
    return [command for block in _CONSOLE.findall(text) for command in _commands_of(block)]


def replace_outputs(text: str) -> str:
    """The page with each command of its console blocks run again."""
    return _CONSOLE.sub(lambda match: "\n".join(_run(command) for command in _commands_of(match[0])), text)


def _commands_of(block: str) -> list[str]:
    return [line[2:] for line in block.splitlines() if line.startswith("$ ")]


def _run(command: str) -> str:
    with tempfile.TemporaryDirectory() as home:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "LUTHIER_HOME": home, "NO_COLOR": "1"}
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    if done.returncode not in (0, 1, 2):
        raise SystemExit(f"{command}: exit code {done.returncode}\n{done.stdout}")
    # On a slow machine a command tells how far it is, which is no part of what it says.
    said = [line for line in done.stdout.rstrip().split("\n") if not _PROGRESS.match(line)]
    return "\n".join([f"$ {command}", *said, ""])


if __name__ == "__main__":
    sys.exit(main())
