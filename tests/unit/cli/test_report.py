"""`luthier report`: verdict, certificate and the page's path last, and one JSON object where asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.cli.main import main
from tests.unit.reports.made import certificate, write_hostile, write_run

Captured = pytest.CaptureFixture[str]


def test_one_run_is_told_in_a_few_lines(tmp_path: Path, capsys: Captured) -> None:
    folder = write_run(tmp_path / "run").folder
    assert main(["report", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["held-out", "loss", "0.5", "1.85", "at", "step", "10"]
    assert lines[-2].startswith("Trained to the end: held-out loss fell from 1.85")
    assert lines[-1] == f"report  {folder / 'finetune_report.html'}"
    assert (folder / "finetune_report.md").is_file()


@pytest.mark.parametrize("is_valid", [True, False])
def test_verdict_certificate_and_path_come_last(is_valid: bool, tmp_path: Path, capsys: Captured) -> None:
    folder = write_run(tmp_path / "run").folder
    claims = [{**each, "artefact": "final_lora_weights"} for each in certificate(is_valid=is_valid)["claims"]]
    told = {**certificate(is_valid=is_valid), "claims": claims, "artefact": "final_lora_weights", "files": {}}
    (folder / "certificate.json").write_text(json.dumps(told))
    assert main(["report", str(folder)]) == 0
    verdict, proof, page = capsys.readouterr().out.splitlines()[-3:]
    assert verdict.startswith("Trained to the end" if is_valid else "Do not use this model")
    assert proof.startswith(f"certificate {'valid: final_lora_weights is' if is_valid else 'NOT VALID: 1 of 2 claims'}")
    assert page == f"report  {folder / 'finetune_report.html'}"


def test_several_runs_go_into_a_folder_of_their_own(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_run(tmp_path / name)
    assert main(["report", "a", "b"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("All of these runs end at the same held-out loss, 0.5.")
    assert (tmp_path / "finetune_report" / "finetune_report.html").is_file()
    assert main(["report", "a", "b", "-o", "there", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["page"] == "there/finetune_report.html"
    assert [run["run"] for run in found["runs"]] == ["a", "b"]


def test_json_holds_what_a_program_needs(tmp_path: Path, capsys: Captured) -> None:
    folder = write_run(tmp_path / "run").folder
    assert main(["report", str(folder), "--json"]) == 0
    run = json.loads(capsys.readouterr().out)["runs"][0]
    assert run["verdict"]["mark"] == "open"
    assert run["artefact"]["command"] == f"luthier verify {folder}"
    assert run["rows"]["train"] == 300
    assert run["cost"]["tokens"] == 64_000
    assert run["valid"]["loss"] == 0.5


def test_hostile_text_does_not_reach_the_terminal_raw(tmp_path: Path, capsys: Captured) -> None:
    folder = write_hostile(tmp_path / "run").folder
    assert main(["report", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\u202e" not in out


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: Captured) -> None:
    assert main(["report", str(tmp_path)]) == 1
    assert "not a run folder" in capsys.readouterr().err
    assert main(["report"]) == 2
