"""`luthier compare` on a small real run: its file, its words, and the report that shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.cli.main import main
from luthier.runs.run import Run
from tests.unit.training.works import NEEDS_TORCH, run_whole

pytestmark = NEEDS_TORCH
Captured = pytest.CaptureFixture[str]
QUICK = ["--max-tokens", "8", "-n", "2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two steps, and a home in which it is known."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(folder / "home"))
        return run_whole(folder, {"optim.steps": 2})[0]


@pytest.fixture
def run(made: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("LUTHIER_HOME", str(made.folder.parents[1] / "home"))
    return made


def test_a_pattern_of_adapters_into_one_file(run: Run, tmp_path: Path, capsys: Captured) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text('["say 3", "say 4"]')
    pattern, out = str(run.folder / "*_lora_weights"), tmp_path / "found.json"
    call = ["compare", pattern, "--prompts", str(prompts), "-o", str(out), *QUICK]
    before = sorted(run.folder.iterdir())
    assert main([*call, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())
    assert sorted(run.folder.iterdir()) == before
    assert main([*call, run.id, "--no-compare-base"]) == 0
    both = json.loads(out.read_text())["models"]
    assert len(both) == 2
    assert "base_response" not in both[0]["results"][0]
    assert main(["compare", run.id, "--no-compare-base", *QUICK]) == 0
    assert (run.folder / "answers.json").is_file()


def test_a_run_is_compared_with_its_base(run: Run, capsys: Captured) -> None:
    assert main(["compare", str(run.folder), *QUICK]) == 0
    out = capsys.readouterr().out
    path = run.folder / "comparison.json"
    found = json.loads(path.read_text())
    assert found["base_model"] == "practice"
    assert found["lora_weights"] == str(run.folder / "final_lora_weights")
    assert len(found["results"]) == 2
    assert {"exact match", "held-out loss", "general text perplexity"} <= found["metrics"].keys()
    assert out.splitlines()[0] == run.model_id
    assert f"written  {path}" in out
    assert found["verdict"] in out
    assert found["contamination"] == {"rows": 2, "training_rows": 12, "same_row": 0, "same_prompt": 0}
    assert "held-out loss" in (run.folder / "finetune_report.md").read_text()
    assert main(["report", str(run.folder)]) == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--judge", "http://localhost/v1"], "--judge and --judge-model belong together"),
        (["--regex", "("], "--regex: no regular expression"),
        (["--json-schema", "none.json"], "no JSON schema at none.json"),
        (["--temperature", "-1"], "is not in the range"),
    ],
)
def test_calls_that_do_not_hold(more: list[str], said: str, capsys: Captured) -> None:
    assert main(["compare", "practice", *more]) == 2
    assert said in capsys.readouterr().err
