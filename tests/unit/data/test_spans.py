"""Trained spans are exactly the assistant turns as rendered plus their end-of-turn token, in every template."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.reasons import RowError
from luthier.data.shapes import ShapeLearner
from luthier.data.spans import SpanFinder
from luthier.data.template import MARK_CLOSE, MARK_OPEN, ChatTemplate
from luthier.errors import MaskError
from tests.shapes import Shape, list_shapes

SHAPES = list_shapes()
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
_WEATHER = {"name": "weather", "description": "Says it.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": _WEATHER}]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def turns(finder: SpanFinder, messages: list[dict[str, Any]], tools: Any = None) -> list[str]:
    done = finder.find(messages, tools)
    return [done.text[start:end] for start, end in done.turns.values()]


def test_no_family_got_lost() -> None:
    assert len(SHAPES) == 19


@every_shape
def test_a_turn_starts_behind_the_header_and_ends_with_its_token(shape: Shape) -> None:
    done = shape.finder().find([user("One"), assistant("Aone"), user("Two"), assistant("Atwo")])
    (first, first_end), (second, second_end) = done.turns.values()
    assert done.text[:first].endswith(shape.header)
    assert done.text[first:first_end].endswith("Aone" + done.text[first:first_end].rpartition("Aone")[2])
    assert done.text[first:first_end].endswith(shape.end_of_turn)
    assert done.text[second:second_end].endswith(shape.final_end_of_turn or shape.eos_token)
    assert "One" not in done.text[first:first_end]
    assert "Two" not in done.text[second:second_end]
    assert done.text[second_end:].strip() in ("", "<|endoftext|>")


# Words and a few signs: what any template renders as it is. Hostile contents have their own tests.
_WORDS = st.text("abcXYZ ,.!?09\n\u00e9\u6f22\U0001f600", min_size=1, max_size=24).filter(
    lambda t: t.strip() == t and t
)


@st.composite
def plain_conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    count = draw(st.integers(1, 3))
    return [make(draw(_WORDS)) for _ in range(count) for make in (user, assistant)]


@every_shape
@given(messages=plain_conversations())
def test_a_turn_is_the_same_frame_around_any_content(shape: Shape, messages: list[dict[str, Any]]) -> None:
    """The frame is learnt from one conversation; contents never move it."""
    finder = shape.finder()
    probe = turns(finder, [user("q"), assistant("Zz9")] * (len(messages) // 2))
    expected = [frame.replace("Zz9", message["content"]) for frame, message in zip(probe, messages[1::2], strict=True)]
    assert turns(finder, messages) == expected


@pytest.mark.slow
@every_shape
@given(messages=plain_conversations(), edge=st.sampled_from(["", " ", "\n", "  \n"]))
def test_joining_a_learnt_shape_equals_rendering(shape: Shape, messages: list[dict[str, Any]], edge: str) -> None:
    messages[-1]["content"] += edge
    finder = shape.finder()
    learner = ShapeLearner(shape.finder(), shape.template())
    for _ in range(7):  # past the rows that are always compared
        joined = learner.find(messages)
    whole = finder.find(messages)
    assert (joined.text, joined.turns, joined.notes) == (whole.text, whole.turns, whole.notes)


@every_shape
def test_edge_whitespace_is_trained_as_the_template_renders_it(shape: Shape) -> None:
    done = turns(shape.finder(), [user("One"), assistant(" A one \n"), user("Two"), assistant("Atwo")])
    assert ("A one \n" not in done[0]) if shape.trims else ("A one \n" in done[0])


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.rewrites_history], ids=lambda s: s.name)
def test_rewritten_history_still_has_its_turns(shape: Shape) -> None:
    thought = "<think>\nhm\n</think>\n\n"
    messages = [user("One"), assistant(thought + "Aone"), user("Two"), assistant(thought + "Atwo")]
    if shape.name == "gpt_oss":
        messages = [user("One"), assistant("Aone", reasoning_content="hm"), user("Two"), assistant("Atwo")]
    done = shape.finder().find(messages)
    found = [done.text[start:end] for start, end in done.turns.values()]
    assert "hm" not in found[0]
    assert found[0].endswith("Aone" + shape.end_of_turn)
    assert "Atwo" in found[1]
    assert "thinking_dropped" in done.notes or "hm" in found[1]


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.tools], ids=lambda s: s.name)
def test_tool_calls_are_trained_and_their_results_are_not(shape: Shape) -> None:
    result = {"role": "tool", "content": "sunny", "tool_call_id": "call00001", "name": "weather"}
    messages = [
        user("One"),
        assistant("", tool_calls=[CALL]),
        result,
        assistant("Aone"),
        user("Two"),
        assistant("Atwo"),
    ]
    call, answer, last = turns(shape.finder(), messages, TOOLS)
    assert "weather" in call
    assert "Oslo" in call
    assert "sunny" not in call + answer + last
    assert "Aone" in answer
    assert "Atwo" in last


def test_a_call_that_the_template_leaves_out_is_refused() -> None:
    shape = next(s for s in SHAPES if s.name == "chatml")
    with pytest.raises(RowError, match="leaves out the call of `weather`"):
        shape.finder().find([user("One"), assistant("", tool_calls=[CALL])])


def finder_of(source: str, control: list[str], eos: str, *, use_marks: bool = False) -> SpanFinder:
    template = ChatTemplate(source, tokens={"bos_token": "", "eos_token": eos})
    return SpanFinder(template, control, [], eos, use_marks=use_marks)


def test_a_template_without_an_end_of_turn_stops() -> None:
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(MaskError, match="never learn to stop"):
        finder_of(source, ["</s>"], "</s>").find([user("One"), assistant("Aone")])


def test_a_template_whose_turns_end_with_the_next_header_gets_the_end_of_sequence_token() -> None:
    shape = next(s for s in SHAPES if s.name == "glm4")
    done = shape.finder().find([user("One"), assistant("Aone")])
    assert done.text.endswith("Aone<|endoftext|>")
    assert done.notes == {"eos_added"}


def test_a_template_whose_turns_cannot_be_told_stops_with_the_message() -> None:
    """It counts the messages first and says everything twice: neither sentinels nor prefixes hold."""
    source = (
        "[{{ messages | length }}]{% for m in messages %}{{ m.role }} {{ m.content }}{{ m.content }}</s>{% endfor %}"
    )
    with pytest.raises(MaskError, match="message 2"):
        finder_of(source, ["</s>"], "</s>").find([user("One"), assistant("Aone"), user("Two"), assistant("Atwo")])


def test_markers_that_agree_change_nothing_and_others_are_noted() -> None:
    agree, narrow = (
        next(s for s in SHAPES if s.name == name) for name in ("chatml_generation", "chatml_generation_narrow")
    )
    messages = [user("One"), assistant("Aone")]
    assert agree.finder().find(messages).notes == set()
    assert turns(agree.finder(use_marks=True), messages) == ["Aone<|im_end|>"]
    assert narrow.finder().find(messages).notes == {"markers_differ"}


def test_markers_without_the_end_of_turn_stop_when_they_decide() -> None:
    narrow = next(s for s in SHAPES if s.name == "chatml_generation_narrow")
    with pytest.raises(MaskError, match="leave the end-of-turn token out"):
        narrow.finder(use_marks=True).find([user("One"), assistant("Aone")])


def _trl_templates(pattern: str = "*_training.jinja") -> list[Path]:
    spec = importlib.util.find_spec("trl")
    places = spec.submodule_search_locations if spec else None
    return sorted(Path(places[0], "chat_templates").glob(pattern)) if places else []


# Control tokens as those templates spell them; vision templates take no plain text and are left out.
_CONTROL = re.compile(
    r"<\|[^|>\n]{1,40}\|>|<\uff5c[^\uff5c>\n]{1,40}\uff5c>|</?s>|<(?:start|end)_of_turn>|<\|?turn\|?>"
)
_VISION = ("idefics3", "llava_next", "smolvlm")


def test_real_templates_agree_with_the_markers_that_trl_gives_them() -> None:
    """An independent check: TRL marks the trained part of published templates by hand.

    Its marks may begin with the header and end with white space, which ours leave out; otherwise they are the same.
    """
    compared = 0
    for path in _trl_templates():
        if path.name.startswith(_VISION):
            continue
        source = path.read_text("utf-8")
        control = sorted(set(_CONTROL.findall(source)))
        eos = next(
            t for t in ("<|im_end|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "</s>") if t in source or t == "</s>"
        )
        template = ChatTemplate(source, tokens={"bos_token": "<s>", "eos_token": eos}, name=path.name)
        finder = SpanFinder(template, [*control, eos], ["<think>", "</think>"], eos)
        messages = [user("One"), assistant("Aone"), user("Two"), assistant("Atwo")]
        marked = template.render(messages, show_marks=True)
        theirs = "".join(re.findall(f"{MARK_OPEN}(.*?){MARK_CLOSE}", marked, re.DOTALL))
        for ours in turns(finder, messages):
            assert ours in theirs, path.name
        compared += 1
    if not compared:
        pytest.skip("trl is not installed: make setup installs it")
    assert compared >= 20


def test_no_real_template_leaves_its_header_in_a_turn() -> None:
    """Prompts that go on to open `<think>` (QwQ, Qwen 3.5) once left `assistant` behind the cut."""
    seen = 0
    for path in _trl_templates("*.jinja"):
        if path.name.startswith(_VISION):
            continue
        source = path.read_text("utf-8")
        control = [*sorted(set(_CONTROL.findall(source))), "</s>"]
        template = ChatTemplate(source, tokens={"bos_token": "<s>", "eos_token": "</s>"}, name=path.name)
        finder = SpanFinder(template, control, ["<think>", "</think>"], "</s>")
        for turn in turns(finder, [user("One"), assistant("Aone"), user("Two"), assistant("Atwo")]):
            assert "assistant" not in turn.lower(), path.name
            assert "One" not in turn
        seen += 1
    assert seen == 0 or seen >= 60
