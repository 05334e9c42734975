"""What docs/decisions claim of the code still holds, where one check can say so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from luthier.data.prepare import prepare
from luthier.data.rows import ReadOptions
from luthier.data.template import ChatTemplate
from luthier.runs.resolve import practice_folder
from luthier.spec.data import Data


def test_0003_a_template_is_told_the_fixed_day() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", tokens={})
    assert template.render([]) == "26 Jul 2024"


@pytest.mark.parametrize("name", ["", "chatml", "qwen25", "qwen3"])
def test_0004_joined_rows_are_the_rendered_rows(name: str, root: Path, tmp_path: Path) -> None:
    data = Data(train=str(root / "examples" / "demo" / "train.jsonl"))
    template = root / "tests" / "templates" / f"{name}.jinja" if name else None
    joined = ReadOptions(data, "sft", practice_folder(), template)
    whole = replace(joined, learn_shapes=False)
    found = [prepare(options, seed=0, home=tmp_path / str(options.learn_shapes)).summary for options in (joined, whole)]
    assert [each["learnt_shapes"] for each in found] == [True, False]
    assert found[0]["hashes"] == found[1]["hashes"]


def test_0005_one_fixed_prompt_does_not_empty_the_held_out_side(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "Next move?", "completion": "move {i}"}}\n' for i in range(40)))
    summary = prepare(ReadOptions(Data(train=str(rows), valid=0.25)), seed=0, home=tmp_path).summary
    assert (summary["train"], summary["valid"], summary["leakage"]) == (30, 10, 10)


def test_0006_a_file_written_twice_is_half_duplicates_and_not_malformed(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    once = "".join(f'{{"prompt": "What is {i} plus 1?", "completion": "{i + 1}"}}\n' for i in range(20))
    rows.write_text(once + once)
    summary = prepare(ReadOptions(Data(train=str(rows))), seed=0, home=tmp_path).summary
    assert summary["reasons"] == {"duplicate": 20}
    assert summary["malformed"] == 0
