"""Render an Example to the texts that will be trained, each with the character spans of its trained tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from luthier.data.example import Conversation, Example, Message, Preference, Text
from luthier.data.reasons import RowError
from luthier.data.shapes import ShapeLearner
from luthier.data.spans import RESERVED, Rendering, Span, SpanFinder
from luthier.data.template import ChatTemplate
from luthier.errors import MaskError, TemplateError
from luthier.spec.data import SpanSource, TrainOn


@dataclass(slots=True)
class Sequence:
    """One text to tokenise, the spans to train in it, and notes."""

    text: str
    spans: list[Span]
    notes: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Question:
    """The last assistant turn of a conversation as a question: what the model is shown, and what the row answers.

    `end` is the token that ends the turn; the answer stands without it.
    """

    prompt: str
    answer: str
    end: str


class Renderer:
    """Turns Examples into sequences: a conversation into one (or one a turn, unrolled), a pair into two."""

    def __init__(
        self,
        template: ChatTemplate | None,
        control_tokens: list[str],
        added_tokens: list[str],
        *,
        bos: str = "",
        eos: str = "",
        train_on: TrainOn = "assistant",
        spans: SpanSource = "auto",
        unroll: bool = False,
        learn: bool = True,
    ) -> None:
        self._template = template
        self._bos, self._eos = bos, eos
        self._train_on: TrainOn = train_on
        self._unroll = unroll
        self._control = re.compile("|".join(re.escape(token) for token in control_tokens) or r"(?!)")
        self._control_starts = tuple({token[0] for token in control_tokens})
        self._control_tokens = [token for token in control_tokens if token]
        if template is not None:
            if spans == "markers" and not template.has_marks:
                raise TemplateError(
                    f'data.spans is "markers", and {template.name} has no generation markers',
                    hint='use data.spans = "auto", or a template with {% generation %} blocks',
                )
            finder = SpanFinder(template, control_tokens, added_tokens, eos, use_marks=spans == "markers")
            self._find = ShapeLearner(finder, template, learn=learn).find

    def render(self, example: Example) -> list[list[Sequence]]:
        """The example's parts, each a list of sequences that stay together; raises RowError or MaskError."""
        if isinstance(example, Text):
            self._refuse_control_tokens([example.text])
            text = f"{self._bos}{example.text}{self._eos}"
            return [[Sequence(text, [(len(self._bos), len(text))])]]
        self._required_template()
        self._refuse_control_tokens(_all_texts(example))
        if isinstance(example, Preference):
            return [self._render_pair(example)]
        return [[sequence] for sequence in self._render_conversation(example)]

    def render_question(self, example: Conversation) -> Question:
        """The conversation up to its last assistant turn with the generation prompt; raises RowError or MaskError."""
        template = self._required_template()
        self._refuse_control_tokens(_all_texts(example))
        done = self._find(example.messages, example.tools)
        prompt = template.render(example.messages[:-1], example.tools, add_generation_prompt=True)
        return Question(prompt, *self.split_end(done.text[slice(*done.turns[len(example.messages) - 1])]))

    def render_prompt(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> str:
        """A conversation as the model is asked to go on with it; raises RowError."""
        template = self._required_template()
        self._refuse_control_tokens([text for message in messages for text in _message_texts(message)])
        return template.render(messages, tools, add_generation_prompt=True)

    def split_end(self, turn: str) -> tuple[str, str]:
        """An answer without the control tokens and white space behind it, and the first of those tokens."""
        answer, end = turn.rstrip(), ""
        while found := next((token for token in self._control_tokens if answer.endswith(token)), ""):
            answer, end = answer[: -len(found)].rstrip(), found
        return answer, end

    def _required_template(self) -> ChatTemplate:
        if self._template is None:
            raise TemplateError(
                "the model has no chat template, which conversations need",
                hint="give one with --set model.chat_template=FILE, or train on plain `text` rows",
            )
        return self._template

    def _refuse_control_tokens(self, texts: list[str]) -> None:
        for text in texts:
            for start in self._control_starts:
                if start in text and (match := self._control.search(text)):
                    raise RowError("control_token", f"the text spells the control token `{match[0]}`")
            if not text.isascii() and (match := RESERVED.search(text)):
                raise RowError("control_token", f"the text holds U+{ord(match[0]):04X}, by which Luthier marks places")

    def _render_pair(self, pair: Preference) -> list[Sequence]:
        first = len(pair.prompt)
        sequences = []
        for answer in (pair.chosen, pair.rejected):
            messages = [*pair.prompt, *answer]
            done = self._find(messages, pair.tools)
            chosen = [index for index in self._chosen_turns(messages) if index >= first]
            if not chosen:
                raise _nothing_trained()
            sequences.append(Sequence(done.text, [done.turns[index] for index in chosen], done.notes))
        return sequences

    def _render_conversation(self, example: Conversation) -> Iterator[Sequence]:
        if not self._unroll:
            yield self._sequence(self._find(example.messages, example.tools), example.messages)
            return
        chosen = self._chosen_turns(example.messages)
        for index in chosen:
            until = example.messages[: index + 1]
            done = self._find(until, example.tools)
            yield Sequence(done.text, [done.turns[index]], done.notes)
        if not chosen:
            raise _nothing_trained()

    def _sequence(self, done: Rendering, messages: list[Message]) -> Sequence:
        if self._train_on == "all":
            muted = [done.turns[index] for index, message in enumerate(messages) if message.get("weight") == 0]
            return Sequence(done.text, _around(muted, len(done.text)), done.notes)
        chosen = self._chosen_turns(messages)
        if not chosen:
            raise _nothing_trained()
        return Sequence(done.text, [done.turns[index] for index in chosen], done.notes)

    def _chosen_turns(self, messages: list[Message]) -> list[int]:
        """Indices of the turns that `data.train_on` and the messages' weights leave to train."""
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if self._train_on == "last_assistant":
            turns = turns[-1:]
        elif self._train_on == "completion":
            last_user = max(index for index, message in enumerate(messages) if message["role"] == "user")
            turns = [index for index in turns if index > last_user]
        return [index for index in turns if messages[index].get("weight") != 0]


def _around(muted: list[Span], length: int) -> list[Span]:
    """All of a text but some stretches of it."""
    edges = [0, *(edge for span in muted for edge in span), length]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]


def _nothing_trained() -> MaskError:
    return MaskError(
        "the example trains nothing: `weight` is 0 on every turn that data.train_on leaves",
        hint="take the row out, or train another turn of it (`data.train_on`)",
    )


def _all_texts(example: Conversation | Preference) -> list[str]:
    messages = (
        example.messages if isinstance(example, Conversation) else [*example.prompt, *example.chosen, *example.rejected]
    )
    texts = [text for message in messages for text in _message_texts(message)]
    if example.tools:
        texts.append(orjson.dumps(example.tools).decode())
    return texts


def _message_texts(message: dict[str, Any]) -> Iterator[str]:
    if message.get("content"):
        yield message["content"]
    if len(message) > 2:
        for key in ("reasoning_content", "name", "tool_call_id"):
            if message.get(key):
                yield message[key]
        if message.get("tool_calls"):
            yield orjson.dumps(message["tool_calls"]).decode()
