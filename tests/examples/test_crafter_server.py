"""The Crafter example in short through a real server: a job, its `ft:` id as a player, and a next run from it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import agents
import make_dataset
import play
import pytest
from make_dataset import Options
from prompts import Form

from luthier.cli.main import main
from luthier.runs.resolve import find_resolved
from tests.serving import Serving, serve

pytestmark = [pytest.mark.slow, pytest.mark.torch]

EXAMPLE = Path(__file__).parents[2] / "examples" / "crafter"
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server that trains and answers."""
    with serve(tmp_path_factory.mktemp("serving")) as running:
        yield running


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A few rows of two games."""
    form = Form()
    traces = make_dataset.play_games(range(2), 40, 0.1, processes=1)
    sides, _ = make_dataset.make_rows(traces, Options(2, 40, 0, 40, 0.5, form))
    for side, steps in sides.items():
        make_dataset.write_rows(tmp_path / f"{side}.jsonl", steps, form)
    return tmp_path


def _train(capsys: Captured, spec: Path, rows: Path, server: Serving, *more: str) -> Any:
    data = ["--data", str(rows / "train.jsonl"), "--set", f'data.valid="{rows / "valid.jsonl"}"']
    short = ["--steps", "1", "--set", "optim.batch=4", "--output-dir", str(rows / "runs"), "--poll-seconds", "0.2"]
    capsys.readouterr()
    code = main(["train", str(spec), *data, *short, "--server", server.url, *more, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0, found
    return found


def test_from_a_job_to_a_player_and_on_from_there(
    serving: Serving, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv(agents.KEY, serving.key)
    named = rows / "ft_model_id.txt"
    recipe = EXAMPLE / "crafter_qlora.toml"
    _train(capsys, recipe, rows, serving, "--set", f'output.model_id_file="{named}"')
    model = named.read_text("utf-8").strip()
    assert model.startswith("ft:practice:ftjob-")

    # The evaluation that is shipped, with the id put in as its first line says, where the server answers.
    shipped = (EXAMPLE / "evaluation.toml").read_text("utf-8")
    for key, value in (("model", f'"{model}"'), ("games", "2"), ("length", "3")):
        shipped, count = re.subn(rf"(?m)^{key} = \S+", f"{key} = {value}", shipped)
        assert count == 1
    evaluation = rows / "evaluation.toml"
    evaluation.write_text(f'endpoint = "{serving.url}/v1"\n{shipped}', "utf-8")
    assert play.run(["--config", str(evaluation), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in told["agents"]] == ["random", model]
    assert [each["games"] for each in told["agents"]] == [2, 2]
    # The result was brought here, so the same id leads to a player without the server too.
    assert find_resolved(model).adapters

    # A Synth job whose `[model].source` is the id, trained where the id lies.
    text = (EXAMPLE / "crafter_qlora_synth.toml").read_text("utf-8")
    follow = rows / "follow.toml"
    follow.write_text(text.replace('[job]\nmodel = "Qwen/Qwen3-4B"', f'[model]\nsource = "{model}"\n\n[job]'), "utf-8")
    after = _train(capsys, follow, rows, serving)
    assert after["job"]["state"] == "succeeded"
    assert after["job"]["spec"]["model"]["base"] == model
    assert model.endswith(json.loads((Path(after["folder"]) / "lineage.json").read_text("utf-8"))["parent"])
