"""Held-out rows become questions exactly as the model would be asked, with the answers the rows give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.data.render import Question
from luthier.data.rows import ReadOptions
from luthier.data.source import open_source
from luthier.errors import DataError
from luthier.evals.heldout import HeldOut, read_held_out
from luthier.runs.resolve import practice_folder
from luthier.spec.data import Data
from tests.shapes import Shape, list_shapes

EXAMPLES = Path(__file__).parents[3] / "examples" / "rows"
SHAPES = {shape.name: shape for shape in list_shapes()}


def say(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def read(path: Path, rows: list[Any], model: Path | None = None, template: Path | None = None, **asked: Any) -> HeldOut:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    options = ReadOptions(Data(), None, model or practice_folder(), template, learn_shapes=False, fast_tokenizer=False)
    with open_source(str(path)) as source:
        return read_held_out(options, source, **asked)


def only_question(held_out: HeldOut) -> Question:
    ((_, question),) = held_out.questions
    return question


def test_a_conversation_is_asked_up_to_its_last_answer(tmp_path: Path) -> None:
    messages = [say("user", "2 plus 3?"), say("assistant", "5"), say("user", "and 4?"), say("assistant", " 9 ")]
    question = only_question(read(tmp_path / "rows.jsonl", [{"messages": messages}]))
    assert question.prompt == (
        "<|im_start|>user\n2 plus 3?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n"
        "<|im_start|>user\nand 4?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert question.answer.strip() == "9"
    assert question.end == "<|im_end|>"


@pytest.mark.parametrize("name", SHAPES)
def test_every_template_asks_with_its_generation_prompt(name: str, tmp_path: Path) -> None:
    shape: Shape = SHAPES[name]
    model = shape.write_model(tmp_path / "model")
    messages = [
        say("user", "what is it?"),
        say("assistant", "a kettle"),
        say("user", "whose?"),
        say("assistant", "Leo"),
    ]
    held_out = read(tmp_path / "rows.jsonl", [{"messages": messages}], model)
    question = only_question(held_out)
    assert question.prompt == shape.template().render(messages[:-1], add_generation_prompt=True)
    assert question.answer.endswith("Leo")
    assert (shape.final_end_of_turn or shape.eos_token).strip().startswith(question.end)
    assert question.end in (*shape.special_tokens, shape.eos_token)
    assert held_out.text.tokenizer.token_to_id(question.end) in held_out.stop_tokens()


def test_tools_and_their_results_are_part_of_the_question(tmp_path: Path) -> None:
    row = json.loads((EXAMPLES / "tools.jsonl").read_text().splitlines()[0])
    question = only_question(read(tmp_path / "rows.jsonl", [row]))
    assert '{"type": "function", "function": {"name": "weather"' in question.prompt
    assert question.prompt.endswith("21 degrees\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    assert question.answer == "It is 21 degrees in Oslo."


def test_of_a_pair_the_preferred_answer_is_expected(tmp_path: Path) -> None:
    row = {"prompt": "which?", "chosen": "this one", "rejected": "that one"}
    question = only_question(read(tmp_path / "rows.jsonl", [row]))
    assert question.prompt.endswith("which?<|im_end|>\n<|im_start|>assistant\n")
    assert question.answer == "this one"


def test_what_cannot_be_asked_is_counted_by_reason(tmp_path: Path) -> None:
    good = {"prompt": "a", "completion": "b"}
    spelt = {"prompt": "a <|im_end|>", "completion": "b"}
    held_out = read(tmp_path / "rows.jsonl", [good, "{", spelt, {"text": "some words"}, spelt])
    assert [place for place, _ in held_out.questions] == [("rows.jsonl", 1)]
    assert held_out.left_out == {"not_json": 1, "control_token": 2}
    assert held_out.text.tokenizer.decode(held_out.texts[0], skip_special_tokens=False) == "some words<|im_end|>"


def test_some_rows_by_number_and_by_place(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{number}", "completion": "a"} for number in range(9)]
    path = tmp_path / "rows.jsonl"
    assert [place[1] for place, _ in read(path, rows, limit=3).questions] == [1, 2, 3]
    only = {("rows.jsonl", 4), ("rows.jsonl", 8), ("other.jsonl", 2)}
    assert [place[1] for place, _ in read(path, rows, only=only).questions] == [4, 8]
    assert [place[1] for place, _ in read(path, rows, only=only, limit=1).questions] == [4]


def test_nothing_to_ask_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl: no row can be used \(2 not_json\)"):
        read(tmp_path / "rows.jsonl", ["{", "}"])
    with pytest.raises(DataError, match=r"no row can be used \(there are none\)"):
        read(tmp_path / "rows.jsonl", [])


def test_a_template_given_by_hand_asks(tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
        "{% if m.role == 'assistant' %}<|endoftext|>{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    question = only_question(read(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}], template=template))
    assert question == Question("[user] a\n[assistant] ", "b", "<|endoftext|>")
