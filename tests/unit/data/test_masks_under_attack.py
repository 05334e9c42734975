"""Templates and rows that once moved a trained span: nothing but the assistant's turn may stand in one."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.data.example import Conversation, Message, Preference
from luthier.data.reasons import RowError
from luthier.data.render import Renderer
from luthier.data.shapes import ShapeLearner
from luthier.data.spans import SpanFinder
from luthier.data.template import ChatTemplate
from luthier.errors import MaskError
from tests.shapes import Shape, list_shapes

CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLS = "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}"
THINK = ["<think>", "</think>"]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def result(text: str) -> Message:
    return {"role": "tool", "content": text, "tool_call_id": "call00001", "name": "weather"}


def template_of(source: str, eos: str) -> ChatTemplate:
    return ChatTemplate(source, tokens={"bos_token": "", "eos_token": eos})


def finder_of(source: str, eos: str, added: list[str]) -> SpanFinder:
    control = [token for token in ("<|im_start|>", "<|im_end|>", "</s>") if token in source]
    return SpanFinder(template_of(source, eos), control, added, eos)


def turns(finder: SpanFinder | ShapeLearner, messages: list[Message]) -> list[str]:
    done = finder.find(messages)
    return [done.text[start:end] for start, end in done.turns.values()]


def shape_of(name: str) -> Shape:
    return next(shape for shape in list_shapes() if shape.name == name)


def renderer_of(name: str) -> Renderer:
    shape = shape_of(name)
    control = [*shape.special_tokens, shape.eos_token]
    return Renderer(shape.template(), control, list(shape.plain_added_tokens), eos=shape.eos_token)


# -- headers

QWQ = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ (m.content or '').split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content }}"
    f"{CALLS}<|im_end|>\n{{% endfor %}}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
THOUGHT = "<think>\nhm\n</think>\n\nanswer"


@pytest.mark.parametrize("added", [THINK, []], ids=["think is a token", "think is text"])
@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([user("One"), assistant("answer")], ["answer<|im_end|>"]),
        ([user("One"), assistant("answer"), user("Two"), assistant("answer")], ["answer<|im_end|>"] * 2),
        ([user("One"), assistant(THOUGHT)], ["answer<|im_end|>"]),
        ([user("One"), assistant(THOUGHT), user("Two"), assistant(THOUGHT)], ["answer<|im_end|>"] * 2),
    ],
    ids=["plain", "two turns", "thinking", "two turns of thinking"],
)
def test_a_prompt_that_opens_thinking_leaves_the_header_untrained(
    messages: list[Message], expected: list[str], added: list[str]
) -> None:
    """QwQ's prompt ends with `<think>`, which no answer in the training text begins with."""
    assert turns(finder_of(QWQ, "<|im_end|>", added), messages) == expected
    learner = ShapeLearner(finder_of(QWQ, "<|im_end|>", added), template_of(QWQ, "<|im_end|>"))
    for _ in range(7):
        assert turns(learner, messages) == expected


@pytest.mark.parametrize("added", [THINK, []], ids=["think is a token", "think is text"])
def test_a_prompt_that_opens_thinking_leaves_the_header_of_a_call_untrained(added: list[str]) -> None:
    messages = [user("One"), assistant("", tool_calls=[CALL]), result("sunny"), assistant("answer")]
    call, answer = turns(finder_of(QWQ, "<|im_end|>", added), messages)
    assert call.startswith("<tool_call>\n")
    assert call.endswith("\n</tool_call><|im_end|>")
    assert answer == "answer<|im_end|>"


ALPACA = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
    "{% else %}### Response: {{ m.content }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}"
)
NAMED = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}User: {{ m.content }}\n{% else %}Assistant: {{ m.content }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant: <think>\n{% endif %}"
)


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize(
    ("source", "question"),
    [(ALPACA, "Explain what ### Response:\nmeans"), (NAMED, "Explain what Assistant: <think>\nmeans")],
    ids=["alpaca", "named"],
)
def test_a_header_spelt_in_the_question_begins_no_turn(source: str, question: str, rounds: int) -> None:
    messages = [user(question), assistant("ANSWER")] * rounds
    finder = finder_of(source, "</s>", THINK if "<think>" in source else [])
    assert [turn.lstrip(" ") for turn in turns(finder, messages)] == ["ANSWER</s>"] * rounds


# -- what a call changes elsewhere

PREAMBLE = (
    "{% if messages | selectattr('tool_calls') | list %}<|im_start|>system\nTools were used.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    f"{CALLS}<|im_end|>\n{{% endfor %}}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLED = [assistant("", tool_calls=[CALL]), result("sunny"), assistant("Adone")]


@pytest.mark.parametrize(
    "messages",
    [
        [user("Uone"), *CALLED],
        [user("Uone"), *CALLED, user("Utwo"), assistant("Aplain")],
        [user("Uone"), assistant("Aplain"), user("Utwo"), *CALLED],
    ],
    ids=["only", "first", "last"],
)
def test_a_preamble_that_only_calls_bring_is_in_no_turn(messages: list[Message]) -> None:
    """Without the call the text starts differently, so no prefix holds: the turns are right, or there are none."""
    try:
        found = turns(finder_of(PREAMBLE, "<|im_end|>", []), messages)
    except MaskError:
        return
    said = ["weather" if "tool_calls" in m else m["content"] for m in messages if m["role"] == "assistant"]
    for turn, words in zip(found, said, strict=True):
        assert turn.startswith("<tool_call>\n" if words == "weather" else words)
        assert turn.endswith("<|im_end|>")
        assert turn.count("<|im_end|>") == 1
        assert words in turn


@pytest.mark.parametrize("beside", ["content", "reasoning_content"])
def test_a_call_with_words_beside_it_is_told(beside: str) -> None:
    """gpt-oss writes them as analysis until a final answer follows, and leaves them out from then on."""
    call = assistant("", tool_calls=[CALL])
    call[beside] = "Let me look"
    asked = [user("Uone"), call, result("sunny")]
    finder = shape_of("gpt_oss").finder()
    first, final = turns(finder, [*asked, assistant("Adone")])
    assert final.endswith("Adone<|return|>")
    again, second = turns(finder, [*asked, call])
    for turn in (again, second):
        assert "Let me look" in turn
    for turn in (first, again, second):
        assert "Oslo" in turn
        assert turn.endswith("<|call|>")
        assert turn.count("<|call|>") == 1
    for turn in (first, again, second, final):
        assert "sunny" not in turn
        assert "Uone" not in turn


@pytest.mark.parametrize(
    ("name", "word"),
    [("gpt_oss", "json"), ("gpt_oss", "message"), ("gpt_oss", "channel"), ("llama3", "parameters")],
)
def test_a_result_that_says_a_word_of_the_frame_is_no_overrun(name: str, word: str) -> None:
    """The word stands in the call's turn as the template writes it, and that is no sign of a wrong end."""
    messages = [user("Uone"), assistant("", tool_calls=[CALL]), result(word), assistant("Adone")]
    call, answer = turns(shape_of(name).finder(), messages)
    assert "Oslo" in call
    assert call.endswith(("<|call|>", "<|eot_id|>"))
    assert "Adone" in answer


# -- what a template leaves


def test_a_turn_of_control_tokens_alone_is_refused() -> None:
    """R1's template drops the thinking, and nothing was said behind it."""
    with pytest.raises(RowError) as caught:
        renderer_of("deepseek_r1").render(Conversation([user("Uone"), assistant("<think>a</think>")]))
    assert caught.value.reason == "template_refused"


def test_an_answer_that_thinks_and_says_nothing_is_refused_in_a_pair() -> None:
    pair = Preference([user("Uone")], [assistant("good")], [assistant("<think>a</think>")])
    with pytest.raises(RowError) as caught:
        renderer_of("deepseek_r1").render(pair)
    assert caught.value.reason == "template_refused"


@pytest.mark.parametrize(
    "trap",
    [
        "{{ 1 // (messages | length - 2) }}",
        "{{ '{3}'.format(messages[0].content) }}",
        "{{ 1 % (messages | length - 2) }}",
    ],
    ids=["division", "index", "remainder"],
)
def test_a_template_that_calculates_wrongly_refuses_the_row(trap: str) -> None:
    template = template_of(trap, "</s>")
    with pytest.raises(RowError) as caught:
        template.render([user("Uone"), assistant("Aone")])
    assert caught.value.reason == "template_refused"


def test_a_line_break_alone_is_no_header() -> None:
    """No prefix holds (the template counts first) and history names its turns otherwise than the prompt does."""
    source = (
        "[{{ messages | length }}]{% for m in messages %}{{ '\nBOT: ' if m.role == 'assistant' else '\nuser: ' }}"
        "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}{{ '\nassistant: ' }}{% endif %}"
    )
    template = ChatTemplate(source, tokens={"bos_token": "", "eos_token": "</s>"})
    messages = [{"role": role, "content": f"{role[0]}{n}"} for n in range(2) for role in ("user", "assistant")]
    done = SpanFinder(template, ["</s>"], [], "</s>").find(messages)
    assert [done.text[start:end] for start, end in done.turns.values()] == ["a0</s>", "a1</s>"]
