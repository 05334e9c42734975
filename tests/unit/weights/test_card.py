"""The card says what the lineage says, loads what it says, and takes nobody's words for markup."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from luthier.weights.card import CARD, CardFacts, render_card, write_card

FACTS = CardFacts(
    name="qlora_Qwen_Qwen3-0.6B_x",
    base="Qwen/Qwen3-0.6B",
    method="qlora",
    objective="sft",
    revision="c1899de",
    settings={"rank": 16},
    metrics={"valid loss": 0.123456},
    data_hash="d" * 64,
    plan_hash="p" * 64,
    versions={"luthier": "0.1.0"},
)


def front_matter(card: str) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load(card.split("---\n")[1])
    return found


def code(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


def test_a_card_says_what_the_run_was(tmp_path: Path) -> None:
    write_card(tmp_path, FACTS)
    card = (tmp_path / CARD).read_text("utf-8")
    assert front_matter(card) == {
        "base_model": "Qwen/Qwen3-0.6B",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "luthier", "qlora", "sft"],
    }
    for words in ("| valid loss | 0.1235 |", "| rank | 16 |", "| data | dddd", "| plan | pppp", "| luthier | 0.1.0 |"):
        assert words in card
    assert 'from_pretrained("Qwen/Qwen3-0.6B", revision="c1899de", dtype="auto")' in code(card)


def test_a_base_in_a_folder_is_named_without_its_path() -> None:
    card = render_card(replace(FACTS, base="/somewhere/private/my model", revision=None))
    assert "private" not in card
    assert "base_model" not in front_matter(card)
    assert '"my model"' in code(card)


def test_parents_are_merged_in_order_before_the_adapter() -> None:
    lines = [
        line for line in code(render_card(replace(FACTS, parents=("run_a", "run_b")))).splitlines() if "Peft" in line
    ]
    assert [part for line in lines[1:] for part in ("run_a", "run_b", "this/folder") if part in line] == [
        "run_a",
        "run_b",
        "this/folder",
    ]


def test_a_whole_model_needs_no_peft() -> None:
    card = render_card(replace(FACTS, is_adapter=False, method="full"))
    assert front_matter(card)["library_name"] == "transformers"
    assert "peft" not in code(card)
    assert code(card).count("path/to/this/folder") == 2


@pytest.mark.parametrize(
    "hostile",
    ['x"); import os; ("', "a\n---\nevil: 1", "<img src=x onerror=y>", "a | b\n| c", "[x](http://a.example)", "```"],
)
def test_somebody_s_words_stay_words(hostile: str) -> None:
    card = render_card(
        replace(FACTS, name=hostile, base=hostile, revision=hostile, parents=(hostile,), metrics={hostile: 1.0})
    )
    assert "<img" not in card
    assert "](" not in card
    assert "evil" not in front_matter(card)
    calls = [node for node in ast.walk(ast.parse(code(card))) if isinstance(node, ast.Import)]
    assert calls == []
    assert all(line.count("|") == 3 for line in card.splitlines() if line.startswith("|"))
