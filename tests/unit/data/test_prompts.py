"""Prompts of a person's own file, in each of the shapes that people write them in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.data.prompts import Prompt, read_prompts
from luthier.errors import CallError, LuthierError, MissingPathError
from luthier.evals.prompts import list_default_prompts

HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.json", '["hi"]', [Prompt(HI)]),
        ("p.json", json.dumps([HI]), [Prompt(HI)]),
        ("p.json", '{"prompts": ["hi"]}', [Prompt(HI)]),
        ("p.json", '[{"prompt": "hi", "reference": "ho"}]', [Prompt(HI, "ho")]),
        ("p.jsonl", '"hi"\n\n' + json.dumps({"messages": HI}) + "\n", [Prompt(HI), Prompt(HI)]),
        ("p.txt", "hi\n\nhi\n", [Prompt(HI), Prompt(HI)]),
        ("p.json", '\ufeff["hi"]', [Prompt(HI)]),
    ],
)
def test_the_shapes_of_prompts(name: str, text: str, expected: list[Prompt], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text, "utf-8")
    assert read_prompts(path) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "not JSON"),
        ("{}", "expected a list of prompts"),
        ("[]", "holds no prompt"),
        ("[3]", "p.json:1: expected a text"),
        ('["  "]', "p.json:1: expected a text"),
        ('["hi", [{"role": "person", "content": "hi"}]]', "p.json:2: message 1 needs a `role`"),
        ('[{"prompt": "hi", "reference": 3}]', "`reference` must be text"),
    ],
)
def test_what_is_no_prompt_is_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(LuthierError, match=said):
        read_prompts(path)


def test_an_answered_prompt_belongs_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    answered: list[Any] = [[*HI, {"role": "assistant", "content": "ho"}]]
    path.write_text(json.dumps(answered))
    with pytest.raises(CallError, match="answered already") as caught:
        read_prompts(path)
    assert "--data" in caught.value.hint
    assert read_prompts(path, drop_answers=True) == [Prompt(HI)]
    path.write_text(json.dumps([answered[0][1:]]))
    with pytest.raises(CallError, match="answered already"):
        read_prompts(path, drop_answers=True)
    with pytest.raises(MissingPathError):
        read_prompts(tmp_path / "none.json")


def test_the_shipped_prompts_are_many_and_different() -> None:
    texts = {prompt.messages[0]["content"] for prompt in list_default_prompts()}
    assert len(texts) == len(list_default_prompts()) >= 15
