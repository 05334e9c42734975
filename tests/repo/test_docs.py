"""What is not documented fails here: every key, command, error code and reason, and every link and command shown."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from luthier.data.notes import NOTES
from luthier.data.reasons import REASONS
from luthier.errors import LuthierError
from luthier.spec.problems import list_kinds
from luthier.spec.run import RunSpec

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def _first_cells(root: Path, name: str) -> list[str]:
    """The names in the first column of the tables of a reference page."""
    text = (root / "docs" / "reference" / name).read_text("utf-8")
    return re.findall(r"^\| `([^`]+)` \|", text, re.M)


def _pages(root: Path) -> list[Path]:
    found = [root / "README.md", root / "CONTRIBUTING.md", root / "CHANGELOG.md", *sorted(root.glob("docs/**/*.md"))]
    assert len(found) >= 15
    return found


def test_generated_pages_are_fresh(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, root / "scripts" / "make_docs.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_stale_pages_are_found(make_docs: ModuleType) -> None:
    readme = make_docs.README.read_text("utf-8")
    stale = readme.replace("errors.py ", "erors.py ", 1)
    assert stale != readme
    assert make_docs.replace_tree(stale) == make_docs.replace_tree(readme)


def test_every_spec_field_is_in_the_reference(root: Path) -> None:
    fields = [path for name, field in RunSpec.model_fields.items() for path in _keys(name, field.annotation)]
    assert len(fields) > 70
    assert sorted(_first_cells(root, "spec.md")) == sorted(fields)


def _keys(name: str, annotation: Any) -> list[str]:
    """The keys of a table and of those inside it."""
    parts = list_kinds(annotation)
    inner = [_keys(f"{name}.{key}", field.annotation) for part in parts for key, field in part.model_fields.items()]
    return [path for paths in inner for path in paths] or [name]


def test_every_command_and_option_is_in_the_reference(root: Path, make_docs: ModuleType) -> None:
    text = (root / "docs" / "reference" / "commands.md").read_text("utf-8")
    sections = {section.splitlines()[0].split("`")[1]: section for section in text.split("\n## ")[1:]}
    commands = dict(make_docs.walk_commands())
    assert len(commands) >= 16
    assert len(sections) == len(commands)
    for name, command in commands.items():
        section = next(body for head, body in sections.items() if re.fullmatch(rf"{name}(?: [A-Z\[\]]+)*", head))
        for option in command.params:
            if option.param_type_name == "option":
                assert option.opts[0] in section, f"{name} {option.opts[0]}"
        assert command.help


def test_every_error_code_is_in_the_reference(root: Path, make_docs: ModuleType) -> None:
    classes = list(make_docs.walk_errors())
    assert len(classes) >= 12
    codes = [each.code for each in classes]
    assert len(set(codes)) == len(codes), "two errors share a code"
    assert _first_cells(root, "errors.md") == codes
    assert {each.__module__ for each in classes} == {LuthierError.__module__}


def test_every_error_is_in_the_tree_that_its_module_draws(make_docs: ModuleType) -> None:
    drawn = sys.modules["luthier.errors"].__doc__ or ""
    assert [each.__name__ for each in make_docs.walk_errors() if each.__name__ not in drawn] == []


def test_every_reason_and_note_is_in_the_reference(root: Path) -> None:
    assert len(REASONS) >= 25
    assert _first_cells(root, "reasons.md") == [*REASONS, *NOTES]


def test_every_route_of_the_server_is_in_the_reference(root: Path, make_docs: ModuleType) -> None:
    text = (root / "docs" / "reference" / "server.md").read_text("utf-8")
    document = make_docs.read_document()
    shown = set(re.findall(r"`([A-Z]+ /[^`]*)`", text))
    routes = [f"{verb.upper()} {path}" for path, item in document["paths"].items() for verb in item if verb != "head"]
    assert len(routes) > 100
    # What the sentence about aliases covers is left out of the tables.
    twice = {route for route in routes if route.replace("/api/v1/", "/api/") in shown}
    assert [route for route in routes if route not in shown | twice] == []
    bodies = re.findall(r"^\| .* \| `(\w+)` \|$", text, re.M)
    assert len(bodies) >= 6
    assert [body for body in bodies if f"## `{body}`" not in text] == []


def test_every_link_leads_somewhere(root: Path) -> None:
    links = [(page, target) for page in _pages(root) for target in LINK.findall(page.read_text("utf-8"))]
    inside = [(page, target.partition("#")[0]) for page, target in links if "://" not in target]
    assert len(inside) >= 15
    dead = [f"{page.name}: {target}" for page, target in inside if target and not (page.parent / target).exists()]
    assert dead == []


def test_no_page_is_without_a_way_to_it(root: Path) -> None:
    reached = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in _pages(root)
        for target in LINK.findall(page.read_text("utf-8"))
        if "://" not in target
    }
    assert [page.name for page in _pages(root) if page.resolve() not in reached and page.name != "README.md"] == []


@pytest.mark.slow
def test_commands_shown_with_their_output_still_work(root: Path, make_docs: ModuleType) -> None:
    # Counts may differ until the pages are made again; the command and the shape of its answer may not.
    shown = [page for pattern in make_docs.GUIDES for page in sorted(root.glob(pattern))]
    assert len(shown) >= 4
    commands = 0
    for page in shown:
        text = page.read_text("utf-8")
        commands += len(make_docs.list_console_commands(text))
        assert _shape(make_docs.replace_outputs(text)) == _shape(text), page.name
    assert commands >= 10


def _shape(text: str) -> str:
    """A page without its numbers, bars and column widths."""
    return re.sub(r"[\d,.]+|#{2,}|\s+", " ", text)
