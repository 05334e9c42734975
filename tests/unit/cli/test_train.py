"""`luthier train` and `luthier resume` in this process: what they print, return and refuse."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from luthier.adapters import merge
from luthier.cli.main import end, main
from luthier.errors import ProofError
from luthier.runs.run import Run
from tests.certifying import certify_here
from tests.unit.training.works import NEEDS_TORCH, Faulty, signal_at, tables_of, with_faults

pytestmark = NEEDS_TORCH
Captured = pytest.CaptureFixture[str]
SHORT = {"optim.steps": 2, "rows.train": 4, "rows.valid": 2, "output.save_every_steps": 1}


def write_spec(folder: Path, **changes: Any) -> Path:
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(tables_of(folder, {**SHORT, **changes})))
    return path


def run_of(folder: Path) -> Run:
    (found,) = (folder / "runs").iterdir()
    return Run(found)


@pytest.mark.slow
def test_a_run_from_start_to_end(tmp_path: Path, capsys: Captured) -> None:
    assert main(["train", str(write_spec(tmp_path))]) == 0
    out, err = capsys.readouterr()
    run = run_of(tmp_path)
    assert "best so far" in err
    lines = out.splitlines()
    assert f"run {run.folder}" in lines
    after = lines[lines.index(f"run {run.folder}") + 1 :]
    assert after[0] == "done after 2 steps"
    assert after[1] == f"  weights  {run.folder}/final_lora_weights"
    assert after[2] == f"  model    {run.model_id}"
    assert after[3].startswith("  cost     ")
    assert after[4] == "  proof    certificate valid: final_lora_weights is what was trained, all 10 claims hold"
    assert after[5] == f"  report   {run.folder}/finetune_report.html"
    assert after[6].startswith("Trained to the end: held-out loss ")
    assert after[7] == f"next:  luthier compare {run.folder}"
    assert (run.folder / "finetune_report.html").is_file()
    assert main(["resume", run.id]) == 1
    err = capsys.readouterr().err
    assert f"error: {run.id} is finished; there is nothing to resume" in err
    assert f'set model.base = "{run.model_id}"' in err


def test_one_json_object_and_nothing_beside_it(tmp_path: Path, capsys: Captured) -> None:
    assert main(["train", str(write_spec(tmp_path)), "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == ""
    run = run_of(tmp_path)
    assert (found["run"], found["state"], found["step"]) == (run.id, "finished", 2)
    assert found["final"] == str(run.folder / "final_lora_weights")
    assert found["valid"].keys() >= {"loss", "perplexity", "token_accuracy"}
    assert found["tokens"] > 0
    assert found["certificate"] == {"valid": True, "path": str(run.folder / "certificate.json")}
    assert found["report"] == str(run.folder / "finetune_report.html")
    assert found["verdict"]


def test_stopped_while_it_is_certified_and_certified_by_a_resume(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_there(order: Any, should_stop: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return certify_here(order, should_stop)

    spec = write_spec(tmp_path)
    with monkeypatch.context() as once:
        once.setattr("luthier.adapters.verify.certify_in_fresh_process", stop_there)
        assert main(["train", str(spec)]) == 143
    run = run_of(tmp_path)
    assert "  not certified yet; the weights themselves are final\n" in capsys.readouterr().out
    assert main(["resume", str(run.folder)]) == 0
    assert "certificate valid: final_lora_weights is what was trained" in capsys.readouterr().out
    assert main(["resume", str(run.folder)]) == 1


def test_a_result_that_is_not_what_was_trained_is_told_loudly(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(order: Any, should_stop: Any) -> Any:
        path = Path(order.run) / "final_lora_weights" / "README.md"
        path.write_text("changed on the disk")
        return certify_here(order, should_stop)

    monkeypatch.setattr("luthier.adapters.verify.certify_in_fresh_process", spoil)
    assert main(["train", str(write_spec(tmp_path))]) == 1
    out = capsys.readouterr().out
    assert "certificate NOT VALID: 1 of 10 claims do not hold: every byte is as it was sealed" in out
    assert "Do not use this model" in out


def test_what_cannot_be_certified_is_warned_of(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(order: Any, should_stop: Any) -> Any:
        raise ProofError("the certificate could not be made: its process was ended by SIGKILL")

    monkeypatch.setattr("luthier.adapters.verify.certify_in_fresh_process", fail)
    assert main(["train", str(write_spec(tmp_path))]) == 0
    out, err = capsys.readouterr()
    assert "warning: the certificate could not be made: its process was ended by SIGKILL" in err
    assert "  not certified yet; the weights themselves are final\n" in out


def test_stopped_while_merging_and_merged_by_a_resume(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = write_spec(tmp_path, **{"output.merge": True})
    ask, polled = merge._poll, []

    def poll(job: Any) -> None:
        polled.append(job)
        if len(polled) == 2:
            signal.raise_signal(signal.SIGTERM)
        ask(job)

    with monkeypatch.context() as once:
        once.setattr(merge, "_poll", poll)
        assert main(["train", str(spec)]) == 143
    run = run_of(tmp_path)
    out = capsys.readouterr().out
    assert f"  weights  {run.folder}/final_lora_weights" in out
    assert "  not merged yet; the weights themselves are final\n" in out
    assert out.endswith(f"go on:  luthier resume {run.folder}\n")
    assert main(["resume", str(run.folder)]) == 0
    out = capsys.readouterr().out
    assert f"  merged   {run.folder}/merged_model" in out
    assert "certificate valid: merged_model is what was trained" in out
    assert (run.folder / "merged_model" / "model.safetensors").is_file()
    assert main(["resume", str(run.folder)]) == 1


def test_stopped_before_the_first_step(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as once:
        with_faults(once, before_backward=signal_at([1], "SIGINT"))
        assert main(["train", str(write_spec(tmp_path))]) == 130
    assert "stopped by SIGINT after step 0; there is nothing to save yet" in capsys.readouterr().out
    assert main(["resume", str(run_of(tmp_path).folder)]) == 0
    assert "no checkpoint yet: from the first step on" in capsys.readouterr().err


def test_an_error_is_two_lines_or_one_object(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Faulty] = []
    with_faults(monkeypatch, into=made, poison=lambda number, _: number == 2)
    spec = write_spec(tmp_path)
    assert main(["train", str(spec), "--json"]) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)["error"]
    assert found["code"] == "non_finite_loss"
    assert found["details"]["step"] == 2
    assert len(found["details"]["rows"]) == 4
    assert err.startswith("warning: step 2 skipped: non-finite loss; rows train.jsonl:")


@pytest.mark.parametrize("code", [0, 3])
@pytest.mark.parametrize("is_loaded", [True, False])
def test_with_torch_in_it_a_process_ends_without_taking_it_apart(
    is_loaded: bool, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    modules = {"torch": object()} if is_loaded else {}
    seen = SimpleNamespace(modules=modules, stdout=sys.stdout, stderr=sys.stderr, exit=sys.exit)
    monkeypatch.setattr("luthier.cli.main.sys", seen)
    monkeypatch.setattr("luthier.cli.main.os._exit", ended.append)
    if is_loaded:
        end(code)
        assert ended == [code]
        return
    with pytest.raises(SystemExit) as caught:
        end(code)
    assert caught.value.code == code
    assert ended == []
