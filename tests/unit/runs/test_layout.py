"""Names of runs are safe, and say method, base and time."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from luthier.runs.layout import base_label, model_id, run_id

NOON = datetime(2026, 11, 20, 14, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("base", "middle"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen_Qwen3-0.6B"),
        ("practice", "luthier_practice"),
        ("ft:Qwen/Qwen3-0.6B:lora_Qwen_x", "Qwen_Qwen3-0.6B"),
        ("ft:practice:lora_x", "luthier_practice"),
        ("./models/my model", "local_my_model"),
        ("/data/tiny", "local_tiny"),
        ("../..//x/", "local_x"),
    ],
)
def test_the_name_says_method_base_and_time(base: str, middle: str) -> None:
    assert run_id("qlora", base, NOON, "k3f9") == f"qlora_{middle}_20261120_143000_k3f9"


def test_a_folder_is_known_by_being_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert base_label("models/tiny") == "models/tiny"
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert base_label("models/tiny") == "local/tiny"
    (tmp_path / "practice").mkdir()
    assert base_label("practice") == "practice"


@example(base="~nobody0")
@given(base=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=200))
def test_the_name_is_safe_whatever_the_base(base: str) -> None:
    name = run_id("lora", base, NOON)
    assert re.fullmatch(r"lora_[A-Za-z0-9_.-]{1,80}_20261120_143000_[a-z0-9]{4}", name)


def test_two_runs_of_one_second_differ() -> None:
    assert len({run_id("lora", "practice", NOON) for _ in range(20)}) > 15


def test_the_last_colon_part_is_the_run() -> None:
    assert model_id("ft:org/base:lora_a", "dpo_b") == "ft:org/base:dpo_b"
    assert model_id("practice", "x") == "ft:practice:x"
