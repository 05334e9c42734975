"""The report in its folder: files that are whole, and replaced by the next one."""

from __future__ import annotations

from pathlib import Path

from luthier.reports.model import read_report
from luthier.reports.write import write_report, write_reports
from tests.unit.reports.made import write_run


def test_a_report_lies_in_the_folder_of_its_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    paths = write_report(run)
    assert paths.markdown == run.folder / "finetune_report.md"
    assert paths.page == run.folder / "finetune_report.html"
    text = paths.markdown.read_text()
    assert len(paths.figures) == 5
    for path in paths.figures:
        assert path.is_file()
        assert f"(figures/{path.name})" in text
    assert list(run.folder.glob("**/*.tmp-*")) == []


def test_a_report_is_the_same_each_time(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    before = {path: path.read_bytes() for path in [*write_report(run).figures, run.folder / "finetune_report.html"]}
    write_report(run)
    assert {path: path.read_bytes() for path in before} == before


def test_several_runs_are_written_elsewhere(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    paths = write_reports([read_report(run) for run in runs], tmp_path / "side" / "by side")
    assert paths.page.parent == tmp_path / "side" / "by side"
    assert not (runs[0].folder / "finetune_report.md").exists()
