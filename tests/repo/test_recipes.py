"""Every shipped recipe loads, makes its promise in full, and keeps the part of it that can be kept today."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from luthier.cli.main import main
from luthier.runs.recipes import list_recipes, load_recipe
from luthier.spec.load import load_spec
from luthier.workflow import prepare_data

NAMES = sorted(path.stem for path in (Path(__file__).parents[2] / "recipes").glob("*.toml"))
DEMOS = [name for name in NAMES if name.startswith("demo-")]


def test_all_recipes_are_found() -> None:
    assert len(NAMES) >= 8
    assert list_recipes() == NAMES
    assert len(DEMOS) >= 5


@pytest.mark.parametrize("name", NAMES)
def test_recipe_loads_and_promises(name: str, root: Path) -> None:
    spec, text = load_recipe(name)
    about = spec.about
    for part in (about.title, about.command, about.hardware, about.promise, about.evidence):
        assert part
        assert len(part) < 160
    assert about.command.endswith(f"{name}.toml")
    assert spec.method.kind in name or spec.objective.kind in name
    assert re.search(r'^train = ".*" +# (change it to your own rows|relative to this file: )', text, re.M), (
        "the owner of a copy must know what to edit"
    )
    if name in DEMOS:
        assert spec.data.train is not None
        assert Path(spec.data.train).is_relative_to(root)
        assert Path(spec.data.train).is_file()


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_belongs_to_its_owner(name: str, tmp_path: Path) -> None:
    assert main(["recipes", "copy", name, str(tmp_path)]) == 0
    assert main(["spec", "check", str(tmp_path / f"{name}.toml"), "--set", "seed=7"]) == 0


@pytest.mark.parametrize("name", DEMOS)
def test_a_demo_recipe_keeps_its_data_promise(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path))
    spec = load_spec(root / "recipes" / f"{name}.toml").spec
    found = re.match(r"at least (\d+) (?:rows|pairs|texts) trained", spec.about.promise)
    assert found, "a demo recipe promises how much of its data is trained"
    summary = prepare_data(spec).summary
    assert summary["train"] >= int(found[1])
    assert summary["dropped"] <= (0 if "none dropped" in spec.about.promise else summary["rows"] / 20)
    assert summary["train"] + summary["valid"] + summary["dropped"] == summary["rows"]
