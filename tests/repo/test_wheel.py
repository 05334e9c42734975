"""What is installed from a wheel has everything that the checkout has: data, templates, the practice model, recipes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CALL = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from luthier.cli.main import main; sys.exit(main(sys.argv[1:]))"
)


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=root, check=True, capture_output=True)
    (found,) = folder.glob("luthier-*.whl")
    return found


def test_the_wheel_holds_every_file_of_the_package(wheel: Path, root: Path) -> None:
    places = {root / "src" / "luthier": "", root / "recipes": "recipes/", root / "examples" / "demo": "examples/demo/"}
    wanted = {
        f"luthier/{prefix}{path.relative_to(folder).as_posix()}": path
        for folder, prefix in places.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    named = {"evals/general.txt", "reports/page.css", "reports/run.html.jinja", "testing/practice/model.safetensors"}
    assert {f"luthier/{name}" for name in (*named, "recipes/demo-qlora.toml", "py.typed")} <= wanted.keys()
    with zipfile.ZipFile(wheel) as content:
        held = {name for name in content.namelist() if ".dist-info/" not in name}
        assert held == wanted.keys()
        assert [name for name, path in wanted.items() if content.read(name) != path.read_bytes()] == []


def test_what_is_installed_from_it_finds_its_files(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        content.extractall(tmp_path / "installed")

    def call(*arguments: str) -> str:
        code = [sys.executable, "-c", CALL, str(tmp_path / "installed"), *arguments]
        return subprocess.run(code, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    call("recipes", "copy", "demo-qlora", ".")
    plan = json.loads(call("plan", "demo-qlora.toml", "--json"))
    assert plan["total_parameters"] > 1_000_000
    assert plan["train_examples"] > 400
