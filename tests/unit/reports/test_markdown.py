"""The Markdown of a run, held against a recorded one; and foreign text stays text in it."""

from __future__ import annotations

import json
from pathlib import Path

from markdown_it import MarkdownIt

import luthier
from luthier.reports.markdown import plain, render_markdown
from luthier.reports.model import read_report
from tests.golden.compare import check_golden
from tests.unit.reports.made import (
    HOSTILE,
    Course,
    certificate,
    comparison,
    ledger,
    looked_for,
    make_report,
    paired,
    write_hostile,
    write_lines,
    write_run,
)


def settled(text: str, folder: Path) -> str:
    """The text without what another folder or version would change."""
    return text.replace(str(folder), "runs").replace(luthier.__version__, "VERSION")


def test_the_report_of_a_small_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "lora_small_run", rows=ledger(dropped=["not_json", "duplicate", "duplicate"]))
    rejected = {"file": "rows.jsonl", "line": 361, "reason": "not_json", "message": "not JSON", "row": '{"text": '}
    write_lines(run.folder / "rejected.jsonl", [rejected])
    compared = comparison(exact_match="better", length="no detectable difference")
    found = looked_for(contamination={"same_row": 1, "same_prompt": 3}, parroting={"tuned": 2})
    (run.folder / "comparison.json").write_text(json.dumps({**compared, **found, "notes": ["a note"]}))
    (run.folder / "certificate.json").write_text(json.dumps(certificate()))
    check_golden("report.md", settled(render_markdown([read_report(run)]), tmp_path))


def test_the_report_of_two_runs(tmp_path: Path) -> None:
    first = make_report(tmp_path / "lora_first")
    slower = Course(held_out={step: 2.0 - 0.01 * step for step in range(10, 101, 10)})
    second = make_report(tmp_path / "lora_second", slower, method={"rank": 4, "alpha": 8})
    check_golden("report_of_two.md", settled(render_markdown([first, second]), tmp_path))


def test_the_report_of_a_run_on_pairs(tmp_path: Path) -> None:
    report = make_report(tmp_path / "dpo_run", paired(), objective={"kind": "dpo"})
    check_golden("report_of_pairs.md", settled(render_markdown([report]), tmp_path))


def test_foreign_text_stays_text(tmp_path: Path) -> None:
    text = render_markdown([read_report(write_hostile(tmp_path / "run"))])
    tokens = [
        token
        for each in MarkdownIt("gfm-like", {"linkify": False}).parse(text)
        for token in [each, *(each.children or [])]
    ]
    assert {token.type for token in tokens} & {"html_block", "html_inline"} == set()
    heads = [tokens[n + 1].content for n, token in enumerate(tokens) if token.type == "heading_open"]
    assert "head" not in heads
    assert sum(HOSTILE.partition("\u202e")[0] in token.content for token in tokens if token.type == "fence") >= 6
    assert "\u202e" not in text
    assert "\x1b" not in text


def test_names_of_settings_stay_readable() -> None:
    assert (
        plain("optim.learning_rate and _this_ *that*\n# <b>") == r"optim.learning_rate and \_this\_ \*that\* \# \<b\>"
    )
