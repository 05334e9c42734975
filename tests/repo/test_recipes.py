"""Every shipped recipe loads, trains, and makes a promise; those of the demo are trained in full and kept to it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from luthier.cli.main import main
from luthier.runs.recipes import list_recipes, load_recipe
from luthier.spec.load import load_spec
from luthier.workflow import prepare_data
from tests.calling import call

NAMES = sorted(path.stem for path in (Path(__file__).parents[2] / "recipes").glob("*.toml"))
DEMO_DATA = {"sft": "train.jsonl", "dpo": "preference.jsonl", "pretrain": "domain.jsonl"}
Captured = pytest.CaptureFixture[str]
DEMOS = [name for name in NAMES if name.startswith("demo-")]


def test_all_recipes_are_found() -> None:
    assert len(NAMES) >= 12
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
    assert spec.method.kind in name or spec.objective.kind in name or name.startswith("genrm-")
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


# -- training ------------------------------------------------------------------------------------------------------


def train(capsys: Captured, root: Path, out: Path, name: str, *arguments: str) -> Any:
    return call(capsys, "train", str(root / "recipes" / f"{name}.toml"), "--output-dir", str(out), *arguments)


def exact_match(capsys: Captured, root: Path, model: str) -> tuple[int, int]:
    """Right answers to the demo's held-out rows, and how many there are."""
    rows = str(root / "examples" / "demo" / "heldout.jsonl")
    found = call(capsys, "evaluate", model, "--data", rows, "--wrong", "0")["models"][0]["exact_match"]
    return found["right"], found["rows"]


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_on_the_practice_model(name: str, root: Path, tmp_path: Path, capsys: Captured) -> None:
    spec = load_recipe(name)[0]
    data = root / "examples" / "demo" / DEMO_DATA[spec.objective.kind]
    short = ["--model", "practice", "--data", str(data), "--valid", "0.05", "--examples", "60", "--steps", "2"]
    # Two steps move a model less than a merge may round; a recipe for another engine trains there by tests of its own.
    here = ["--engine", "torch", "--set", "output.merge=false"]
    done = train(capsys, root, tmp_path, name, *short, *here)
    assert (done["state"], done["step"]) == ("finished", 2)
    assert Path(done["final"]).is_dir()


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo-full", "demo-lora", "demo-qlora"])
def test_an_sft_recipe_keeps_its_promise(name: str, root: Path, tmp_path: Path, capsys: Captured) -> None:
    promised = re.search(r"exact match from (\d+) of 200 to at least (\d+) of 200", load_recipe(name)[0].about.promise)
    assert promised
    assert int(promised[1]) < 20
    assert int(promised[2]) > 180
    assert exact_match(capsys, root, "practice") == (int(promised[1]), 200)
    done = train(capsys, root, tmp_path, name)
    right, rows = exact_match(capsys, root, done["folder"])
    assert rows == 200
    assert right >= int(promised[2])


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.slow
def test_the_pretraining_recipe_keeps_its_promise(root: Path, tmp_path: Path, capsys: Captured) -> None:
    about = load_recipe("demo-pretrain")[0].about
    promised = re.search(r"perplexity of the (\d+) held-out texts from over ([\d,]+) to under (\d+)", about.promise)
    assert promised
    done = train(capsys, root, tmp_path, "demo-pretrain")
    tuned, base = (each["perplexity"] for each in call(capsys, "evaluate", done["folder"], "--base-too")["models"])
    assert tuned["texts"] == base["texts"] == int(promised[1])
    assert base["perplexity"] > int(promised[2].replace(",", ""))
    assert tuned["perplexity"] < int(promised[3])
    assert tuned["loss"] == pytest.approx(done["valid"]["loss"], rel=0.02)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.slow
def test_the_dpo_recipe_keeps_its_promise(root: Path, tmp_path: Path, capsys: Captured) -> None:
    about = load_recipe("demo-dpo")[0].about
    promised = re.search(r"wins in at least (\d+) of the (\d+) held-out pairs", about.promise)
    assert promised
    done = train(capsys, root, tmp_path, "demo-dpo")
    assert done["valid"]["metrics"]["reward_accuracy"] * int(promised[2]) >= int(promised[1]) - 1e-6
    assert done["valid"]["metrics"]["reward_margin"] > 1


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.slow
def test_dpo_after_sft_turns_a_chatty_model_into_a_strict_one(root: Path, tmp_path: Path, capsys: Captured) -> None:
    chatty = str(root / "examples" / "demo" / "chatty.jsonl")
    before = train(capsys, root, tmp_path / "sft", "demo-lora", "--data", chatty)
    right, rows = exact_match(capsys, root, before["folder"])
    assert right < 0.1 * rows
    after = train(capsys, root, tmp_path / "dpo", "demo-dpo", "--model", before["model"])
    right, rows = exact_match(capsys, root, after["folder"])
    assert right > 0.9 * rows
    assert after["valid"]["metrics"]["reward_accuracy"] > 0.8
