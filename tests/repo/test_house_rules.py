"""The rules of the house that no linter knows: sizes, names, forbidden calls, and nothing of one machine in a file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 100
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "handler"}
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__", "torch.load", "os.system", "os.popen"}
FORBIDDEN_ARGUMENTS = {"trust_remote_code", "allow_pickle"}

# Where a page or a licence has to name somebody else's address; example hosts are nobody's.
KNOWN_HOSTS = {"www.apache.org", "www.w3.org", "json-schema.org", "localhost", "127.0.0.1", "keepachangelog.com"}
EXAMPLE_HOST = re.compile(r"(?:^|\.)(?:example|invalid|test)(?:\.(?:com|org|net))?$")
MACHINE_PATH = re.compile(r"(?<![\w.~}-])/(?:work|root|home|Users|mnt|opt|srv)/\w|/tmp/[\w-]*session")
PRIVATE_HOST = re.compile(
    r"\b(?:10\.\d+|192\.168|172\.(?:1[6-9]|2\d|3[01]))\.\d+\.\d+\b|\b[\w-]+\.(?:internal|corp|lan)\b"
)
URL_HOST = re.compile(r"https?://([^\s/:\"'`<>)\]]+)")
TEXT_ENDINGS = {".py", ".md", ".toml", ".txt", ".sh", ".json", ".jsonl", ".jinja", ".yaml", ".yml", ".csv", ".html"}
SKIPPED_FOLDERS = {".git", ".venv", "build", "dist", "runs", "__pycache__"}


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_every_module_says_what_it_is_for(sources: list[Path]) -> None:
    silent = [path.name for path in sources if not ast.get_docstring(ast.parse(path.read_text("utf-8")))]
    assert silent == []


def test_files_and_functions_stay_small(root: Path, sources: list[Path]) -> None:
    scripts = [*(root / "scripts").glob("*.py"), *(root / "benchmarks").glob("*.py"), *(root / "tests").rglob("*.py")]
    large = []
    for path in [*sources, *scripts]:
        text = path.read_text("utf-8")
        if (count := text.count("\n")) > MAX_FILE_LINES:
            large.append(f"{path.name}: {count} lines")
        for function in _functions(ast.parse(text)):
            length = (function.end_lineno or 0) - function.lineno + 1
            if length > MAX_FUNCTION_LINES:
                large.append(f"{path.name}: {function.name} has {length} lines")
    assert large == []


def test_names_say_the_content(sources: list[Path]) -> None:
    assert [path.name for path in sources if path.stem in VAGUE_NAMES or path.parent.name in VAGUE_NAMES] == []


def _forbidden(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in FORBIDDEN_MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            if (name := _dotted(node.func)) in FORBIDDEN_CALLS:
                yield name
            for keyword in node.keywords:
                is_off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in {"shell", *FORBIDDEN_ARGUMENTS} and not is_off:
                    yield f"{keyword.arg}="
        elif isinstance(node, ast.Constant) and node.value in FORBIDDEN_ARGUMENTS:
            yield f'"{node.value}"'


def test_nothing_is_unpickled_evaluated_or_run_by_a_shell(sources: list[Path]) -> None:
    found = {path.name: list(_forbidden(ast.parse(path.read_text("utf-8")))) for path in sources}
    assert {name: uses for name, uses in found.items() if uses} == {}


@pytest.mark.parametrize(
    "code",
    [
        "f(trust_remote_code=on)",
        "import pickle",
        "from dill import loads",
        "eval(x)",
        "torch.load(p)",
        "run(c, shell=True)",
        "f(**{'shell': 1})",
    ],
)
def test_the_search_finds_what_is_forbidden(code: str) -> None:
    is_hidden = code.startswith("f(**")  # a known limit: a keyword inside a dict is not seen
    assert bool(list(_forbidden(ast.parse(code)))) is not is_hidden


def test_only_the_command_line_prints(root: Path, sources: list[Path]) -> None:
    printing = []
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if (isinstance(node, ast.Call) and _dotted(node.func) == "print") or (
                isinstance(node, ast.Attribute) and _dotted(node) in ("sys.stdout.write", "sys.stderr.write")
            ):
                printing.append(path.name)
    assert set(printing) <= {"output.py"}


def _text_files(root: Path) -> list[Path]:
    """Every text file of the project; a cache's folder says so with its own .gitignore."""
    found = []
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS & set(parts) or (parts[0].startswith(".") and parts[0] not in (".ci", ".gitignore")):
            continue
        if path.is_file() and (path.suffix in TEXT_ENDINGS or path.name in ("Makefile", "LICENSE", "run")):
            found.append(path)
    return found


def _private(text: str) -> list[str]:
    hosts = [host for host in URL_HOST.findall(text) if host not in KNOWN_HOSTS and not EXAMPLE_HOST.search(host)]
    paths = [match[0] for match in MACHINE_PATH.finditer(text)]
    return [*hosts, *paths, *(match[0] for match in PRIVATE_HOST.finditer(text))]


def test_no_file_names_a_private_host_or_a_path_of_one_machine(root: Path) -> None:
    files = [path for path in _text_files(root) if path != Path(__file__)]
    assert len(files) > 120
    found = {}
    for path in files:
        if path.name in ("tokenizer.json", "vocab.json"):
            continue  # words of a vocabulary, not addresses
        if hits := _private(path.read_text("utf-8", errors="replace")):
            found[path.relative_to(root).as_posix()] = hits[:5]
    assert found == {}


@pytest.mark.parametrize(
    "text",
    ["see https://git.somewhere.io/x", "in /root/x.py", "PATH=/home/anna/bin", "at 192.168.0.7", "host db.internal"],
)
def test_the_search_finds_what_is_private(text: str) -> None:
    assert _private(text)


def test_public_text_is_left_alone() -> None:
    text = "http://localhost:8000, https://api.example.com/v1, data/train.jsonl, ~/x, ${HOME}/root/x, 1.0.0"
    assert _private(text) == []
