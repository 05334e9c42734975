"""Files of strangers in the limited process: good ones, bad ones, and those that want to take the server with them."""

from __future__ import annotations

import gzip
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from luthier.jobs.checking import Check, FileReport, Limits, check_file, link_rows, safe_name
from luthier.jobs.launchers.local import trainer_environment
from luthier.runs.resolve import practice_folder
from tests.unit.training.works import chat_rows

pytestmark = pytest.mark.slow


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_a_good_file_and_its_count(tmp_path: Path) -> None:
    report = check_file(write(tmp_path / "0123abcd", *chat_rows(5)), filename="my rows.jsonl")
    assert (report.ok, report.rows, report.malformed, report.formats) == (True, 5, 0, {"chat": 5})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0123abcd", "home"]


def test_hostile_lines_are_named_by_number_and_reason(tmp_path: Path) -> None:
    hostile = [
        b'{"messages": [{"role": "user", "content": "a", "role": "assistant"}]}',
        b'{"text": "\\ud800"}',
        b'{"text": "a\\u0000b"}',
        b'{"text": NaN}',
        b"[" * 5000 + b"]" * 5000,
        b"\xff\xfe",
        b'{"messages": "no list"}',
        b'{"__class__": "os.system"}',
    ]
    report = check_file(write(tmp_path / "rows", *chat_rows(1), *hostile))
    assert not report.ok
    assert report.code == "invalid_training_file"
    assert report.malformed == len(hostile)
    assert [each["line"] for each in report.problems] == list(range(2, len(hostile) + 2))
    assert all(
        each["reason"] and each["message"] and set(each) <= {"file", "line", "reason", "message"}
        for each in report.problems
    )
    assert "the first is line 2" in report.message


@pytest.mark.parametrize("content", [b"\n\n", bytes(range(256)) * 40])
def test_what_is_no_data_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows"
    path.write_bytes(content)
    report = check_file(path)
    assert (report.ok, report.code, report.is_final) == (False, "invalid_training_file", True)


def test_a_small_file_that_becomes_a_large_one_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    with gzip.open(path, "wb", 6) as file:
        for _ in range(120):
            file.write(b" " * (1 << 20))
    started = time.monotonic()
    report = check_file(path, filename="rows.jsonl.gz")
    assert not report.ok
    assert "become more than" in report.message
    assert time.monotonic() - started < 10


def test_a_check_that_takes_too_much_is_ended(tmp_path: Path) -> None:
    path = write(tmp_path / "rows", *chat_rows(3))
    report = check_file(path, Limits(wall_seconds=0.05))
    assert (report.ok, report.code) == (False, "check_out_of_bounds")
    assert "took more than" in report.message
    large = write(tmp_path / "large", *({"text": f"{number} " * 500_000} for number in range(12)))
    report = check_file(large, Limits(memory_bytes=6 << 20))
    assert (report.ok, report.code) == (False, "check_out_of_bounds"), report


CheckJob = Callable[..., FileReport]


@pytest.fixture
def check_job(tmp_path: Path) -> CheckJob:
    """Check a job over a copy of the practice model with another template."""

    def check(
        template: str | None = None, rows: list[Any] | None = None, limits: Limits | None = None, **data: Any
    ) -> FileReport:
        model = tmp_path / "models" / "maker" / "model"
        shutil.copytree(practice_folder(), model)
        if template is not None:
            (model / "chat_template.jinja").write_text(template)
        train = write(tmp_path / "train.jsonl", *(rows or chat_rows(4)))
        spec = {"model": {"base": "maker/model"}, "data": {"train": str(train), "valid": 0, **data}}
        spec["method"] = {"kind": "lora", "rank": 2}
        environment = trainer_environment(tmp_path / "home", tmp_path / "models", tokens=tmp_path / "own")
        run = Check(tmp_path / "check", {"kind": "job", "spec": spec, "memory_bytes": 8 << 30}, environment, limits)
        try:
            return run.wait()
        finally:
            run.stop()

    return check


def test_a_job_is_planned_and_its_tokens_are_its_own(check_job: CheckJob, tmp_path: Path) -> None:
    report = check_job()
    assert report.ok, report
    assert report.needs["memory_bytes"] > 10**8
    assert report.needs["device"] == "cpu"
    assert report.plan["steps"] == 1
    assert len(list((tmp_path / "own" / "tokens").glob("*/summary.json"))) == 1
    assert not (tmp_path / "home" / "tokens").exists()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'a' * (10 ** 10) }}", "ran away"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "ran away"),
        ("{% if %}", "not a valid template"),
    ],
)
def test_a_template_that_runs_away_is_stopped(check_job: CheckJob, template: str, message: str) -> None:
    report = check_job(template, limits=replace(Limits(), template_cpu_seconds=1.0))
    assert (report.ok, report.code) == (False, "template_invalid"), report
    assert message in report.message


def test_a_template_gets_out_of_no_sandbox(check_job: CheckJob) -> None:
    report = check_job("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    assert not report.ok
    assert "template_refused" in report.reasons


def test_rows_that_do_not_fit_the_template_are_named(check_job: CheckJob) -> None:
    report = check_job(rows=[*chat_rows(2), {"messages": [{"role": "user", "content": "no answer"}]}])
    assert (report.ok, report.code) == (False, "invalid_training_file")
    assert [each["line"] for each in report.problems] == [3]


def test_names_of_strangers_become_names_of_ours(tmp_path: Path) -> None:
    assert safe_name("../../etc/passwd", "train") == "train.jsonl"
    assert safe_name("a.JSON.gz", "train") == "train.json.gz"
    assert safe_name("x.exe.zst", "valid") == "valid.jsonl.zst"
    assert safe_name("rows.parquet", "train") == "train.parquet"
    path = write(tmp_path / "ab12", *chat_rows(1))
    link = link_rows(path, tmp_path / "job", "train.jsonl")
    assert link_rows(path, tmp_path / "job", "train.jsonl") == link
    assert link.read_bytes() == path.read_bytes()
