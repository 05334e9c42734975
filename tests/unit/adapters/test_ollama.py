"""The Ollama template puts the same texts around the same messages as the chat template; others are refused."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from luthier.adapters.gguf_vocabulary import read_vocabulary
from luthier.adapters.ollama import build_modelfile, render_template
from luthier.adapters.turns import find_end_of_turn, find_turns, list_differences
from luthier.data.template import ChatTemplate
from luthier.errors import UnsupportedError
from luthier.runs.resolve import practice_folder
from tests.unit.adapters.whole import save_tokenizer

TEMPLATES = Path(__file__).parents[2] / "templates"
SHAPES = tomllib.loads((TEMPLATES / "shapes.toml").read_text("utf-8"))
CONTENTS = ("one\nline", 'with "quotes" and {{ braces }}', "caf\u00e9", "four", "five")
Message = dict[str, str]


def template_of(name: str) -> ChatTemplate:
    tokens = {"bos_token": SHAPES[name]["bos_token"], "eos_token": SHAPES[name]["eos_token"]}
    return ChatTemplate((TEMPLATES / f"{name}.jinja").read_text("utf-8"), tokens=tokens, name=name)


class GoTemplate:
    """The few actions of Go's text/template that our templates are made of, by the rules of its documentation."""

    def __init__(self, source: str) -> None:
        self.parts = re.split(r"\{\{ (.*?) \}\}", source, flags=re.DOTALL)

    def render(self, messages: list[Message]) -> str:
        self.system = "\n\n".join(each["content"] for each in messages if each["role"] == "system")
        self.messages, self.variables = messages, {"$first": True, "$last": False}
        found: list[str] = []
        end = self._run(0, found, None)
        assert end == len(self.parts)
        return "".join(found)

    def _run(self, place: int, out: list[str] | None, message: Message | None) -> int:
        """Run from a place to the end, or to the `else` or `end` that closes it; without `out` only walk over it."""
        while place < len(self.parts):
            if place % 2 == 0:
                if out is not None:
                    out.append(self.parts[place])
                place += 1
                continue
            action = self.parts[place]
            if action.startswith(("else", "end")):
                return place
            place = self._act(action, place, out, message)
        return place

    def _act(self, action: str, place: int, out: list[str] | None, message: Message | None) -> int:
        if action.startswith("if "):
            return self._branch(action[3:], place + 1, out, message)
        if action.startswith("range "):
            for number, each in enumerate(self.messages if out is not None else []):
                self.number = number
                self._run(place + 1, out, each)
            return self._run(place + 1, None, None) + 1
        if " := " in action or " = " in action:
            name, _, value = action.partition(" := " if " := " in action else " = ")
            if out is not None:
                self.variables[name] = self._is_true(value, message)
            return place + 1
        if out is not None:
            out.append(self._text(action, message))
        return place + 1

    def _branch(self, condition: str, place: int, out: list[str] | None, message: Message | None) -> int:
        taken = out is not None and self._is_true(condition, message)
        place = self._run(place, out if taken else None, message)
        action = self.parts[place]
        if action.startswith("else if "):
            return self._branch(action[8:], place + 1, None if taken else out, message)
        if action == "else":
            place = self._run(place + 1, None if taken else out, message)
        assert self.parts[place] == "end"
        return place + 1

    def _is_true(self, condition: str, message: Message | None) -> bool:
        if condition in ("true", "false"):
            return condition == "true"
        if condition == "eq (len (slice $.Messages $i)) 1":
            return self.number == len(self.messages) - 1
        if match := re.fullmatch(r'eq \.Role "(\w+)"', condition):
            return message is not None and message["role"] == match[1]
        values = {**self.variables, "$.System": bool(self.system)}
        return all(values[name] for name in condition.removeprefix("and ").split(" "))

    def _text(self, action: str, message: Message | None) -> str:
        if action == "$.System":
            return self.system
        if action == ".Content":
            assert message is not None
            return message["content"]
        return str(json.loads(action))


def chats(*, system: bool) -> Iterator[list[Message]]:
    for length in (1, 3, 5):
        turns = [{"role": ("user", "assistant")[place % 2], "content": CONTENTS[place]} for place in range(length)]
        yield turns
        if system:
            yield [{"role": "system", "content": "be brief\nand {{ kind }}"}, *turns]


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_the_derived_template_writes_what_the_chat_template_writes(name: str) -> None:
    template = template_of(name)
    turns = find_turns(template)
    bos = SHAPES[name]["bos_token"]
    for left_out in ("", bos):
        derived = GoTemplate(render_template(turns, left_out=left_out))
        for messages in chats(system=turns.system is not None):
            expected = template.render(list(messages), add_generation_prompt=True)  # type: ignore[arg-type]
            assert derived.render(messages) == expected.removeprefix(left_out)


def test_every_template_of_the_folder_is_among_them() -> None:
    assert len(SHAPES) == len(list(TEMPLATES.glob("*.jinja"))) >= 18


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma2", "gemma3", "mistral_inst", "phi3", "qwen3", "zephyr"])
def test_the_end_of_a_turn_is_found(name: str) -> None:
    found = find_end_of_turn(template_of(name), SHAPES[name]["special_tokens"])
    assert found == SHAPES[name]["end_of_turn"].strip()


def test_what_a_template_does_to_contents_is_said() -> None:
    gemma, thinking, plain = template_of("gemma3"), template_of("qwen3"), template_of("chatml")
    assert "edges" in list_differences(gemma, find_turns(gemma))[0]
    assert "thinking" in list_differences(thinking, find_turns(thinking))[0]
    assert list_differences(plain, find_turns(plain)) == []
    assert find_turns(template_of("gemma2")).notes == ("the template takes no system message",)
    assert find_turns(template_of("mistral_tools")).late_system is not None


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}",
        "{{ messages[-1].content }}",
        "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}",
        "{% for m in messages | reverse %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{% if 'two' in m.content %}!{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    ],
    ids=["numbers", "only the last", "upper case", "backwards", "looks at contents"],
)
def test_a_template_that_does_more_is_refused_with_a_way_on(source: str) -> None:
    with pytest.raises(UnsupportedError, match="more than put turns one after the other") as caught:
        find_turns(ChatTemplate(source, tokens={}, name="odd"))
    assert "llama-server --jinja" in caught.value.hint
    assert "Modelfile" in caught.value.hint


def test_the_practice_model_s_modelfile() -> None:
    found = build_modelfile(read_vocabulary(practice_folder(), 2048), "model.gguf")
    assert found.text.startswith('FROM ./model.gguf\nTEMPLATE """{{ $first := true }}')
    assert found.stops == ("<|im_end|>", "<|endoftext|>")
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n' in found.text
    assert any("no tools" in note for note in found.notes)


def test_a_model_without_a_template_passes_prompts_on_and_sampling_comes_along(tmp_path: Path) -> None:
    size = save_tokenizer(tmp_path, "pieces")
    generation: dict[str, Any] = {"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    found = build_modelfile(read_vocabulary(tmp_path, size), "w.gguf")
    assert 'TEMPLATE """{{ .Prompt }}"""' in found.text
    assert found.stops == ("</s>",)
    assert found.text.endswith("PARAMETER temperature 0.6\nPARAMETER top_k 20\nPARAMETER repeat_penalty 1.1\n")


def test_quotes_and_braces_of_a_template_stay_inside_the_modelfile(tmp_path: Path) -> None:
    size = save_tokenizer(tmp_path, "pieces")
    source = "{% for m in messages %}{{ '\"\"\"{{x}}' + m.role + ': ' + m.content + ' \u0007\n' }}{% endfor %}a:"
    (tmp_path / "chat_template.jinja").write_text(source)
    found = build_modelfile(read_vocabulary(tmp_path, size), "w.gguf")
    assert found.text.count('"""') == 2
    inside = found.text.split('"""')[1]
    expected = '"""{{x}}user: hi \u0007\na:'
    assert GoTemplate(inside).render([{"role": "user", "content": "hi"}]) == expected
