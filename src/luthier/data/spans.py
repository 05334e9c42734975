"""Find exactly which characters of a rendered conversation each assistant turn is.

The truth is one full rendering. Spans are found in it, never by joining parts rendered alone:

1. each assistant content is wrapped in sentinels; the spans hold only if taking the sentinels out again gives the
   plain rendering byte for byte;
2. else (tool calls, thinking that the template moves or drops) by prefixes: the conversation up to the turn with the
   generation prompt is where it starts, and what follows the same turn made plain is where it ends;
3. else there is no answer, and MaskError says so.

A turn begins where generation would begin and ends with its end-of-turn token; whitespace after that is not in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import orjson

from luthier.data.example import Message
from luthier.data.reasons import RowError
from luthier.data.template import MARK_CLOSE, MARK_OPEN, ChatTemplate
from luthier.errors import MaskError

Span = tuple[int, int]
_OPEN, _CLOSE = "\ue0f2", "\ue0f3"
_SENTINELS = re.compile("[\ue0f2\ue0f3]")
_MARKS = re.compile(f"[{MARK_OPEN}{MARK_CLOSE}]")
# Starts with a character that no real answer starts with, so that two renderings part exactly at the turn.
_PLAIN_ANSWER = "\ue0f4answer"

NOTE_THINKING = "thinking_dropped"
NOTE_DROPPED = "content_dropped"
NOTE_EOS = "eos_added"
NOTE_MARKS = "markers_differ"
NOTE_TRUNCATED = "truncated"
NOTE_LEAK = "prompt_in_train"
NOTES = {
    NOTE_THINKING: "the template drops thinking; data.unroll = true trains what it drops only of earlier turns",
    NOTE_DROPPED: "the template leaves out what some message says",
    NOTE_EOS: "the template ends the last turn with no token, so the end-of-sequence token was added",
    NOTE_MARKS: "the template's generation markers differ from the turns as rendered",
    NOTE_TRUNCATED: "the end was cut at data.max_length",
    NOTE_LEAK: "the held-out row's prompt is trained too",
}


@dataclass(slots=True)
class Rendering:
    """A conversation as text, and the span of each assistant turn by its message index."""

    text: str
    turns: dict[int, Span]
    notes: set[str] = field(default_factory=set)


class SpanFinder:
    """Finds the turns for one template: `control` are its special tokens, `added` all that are one token by decree."""

    def __init__(
        self,
        template: ChatTemplate,
        control: list[str],
        added: list[str],
        eos_token: str,
        *,
        use_marks: bool = False,
    ) -> None:
        self._template = template
        self._eos = eos_token
        self._use_marks = use_marks
        one = _any_of(control)
        self._control = re.compile(one)
        self._added = re.compile(_any_of([*control, *added]))
        self._end = re.compile(rf"\s*((?:{one})+)")
        self._first_end = re.compile(rf"\s*({one})")
        self._usual_ending: str | None = None
        self._prompt: str | None = None

    def find(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> Rendering:
        """The one full rendering and its turns; raises RowError or MaskError."""
        done = Rendering(self._template.render(messages, tools), {})
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        try:
            self._place_turns(done, messages, tools, turns)
        except MaskError:
            if not tools or not self._place_without_tools(done, messages):
                raise
        _check_calls(done, messages)
        _note_losses(done, messages)
        if self._template.has_marks:
            self._weigh_marks(done, messages, tools, turns)
        return done

    def _place_turns(
        self, done: Rendering, messages: list[Message], tools: list[dict[str, Any]] | None, turns: list[int]
    ) -> None:
        contents = self._by_sentinels(done.text, messages, tools, turns)
        low = 0
        for index in turns:
            if contents is not None:
                start, end = contents[index]
                span = self._with_end(done, messages, index, (self._header_end(done.text, low, start), end))
            else:
                span = self._by_prefixes(done, messages, tools, index, low)
            done.turns[index] = span
            low = span[1]

    def _place_without_tools(self, done: Rendering, messages: list[Message]) -> bool:
        """Mistral moves the list of tools to the last question: find the turns without it, then shift them past it."""
        bare = self.find(messages)
        grown = len(done.text) - len(bare.text)
        at = _shared(bare.text, done.text)
        if grown < 0 or done.text[at + grown :] != bare.text[at:]:
            return False
        shifted = {i: (a + grown * (a > at), b + grown * (b > at)) for i, (a, b) in bare.turns.items()}
        done.turns = shifted
        done.notes |= bare.notes
        return all(done.text[a:b] == bare.text[slice(*bare.turns[i])] for i, (a, b) in shifted.items())

    # -- sentinels ---------------------------------------------------------------------------------------------

    def _by_sentinels(
        self, text: str, messages: list[Message], tools: list[dict[str, Any]] | None, turns: list[int]
    ) -> dict[int, Span] | None:
        """The bounds of each assistant content, or None where sentinels do not come through unharmed."""
        if any(messages[i].get("tool_calls") or messages[i].get("reasoning_content") for i in turns):
            return None
        wrapped = [_wrap(message) if message["role"] == "assistant" else message for message in messages]
        try:
            marked = self._template.render(wrapped, tools)
        except RowError:
            return None
        if _SENTINELS.sub("", marked) != text:
            return None
        places = [match.start() - count for count, match in enumerate(_SENTINELS.finditer(marked))]
        order = "".join(_SENTINELS.findall(marked))
        if order != (_OPEN + _CLOSE) * len(turns):
            return None
        pairs = zip(places[::2], places[1::2], strict=True)
        return dict(zip(turns, pairs, strict=True))

    def _header_end(self, text: str, low: int, content_start: int) -> int:
        """Where generation of this turn would begin: behind the last header before the content."""
        prompt = self._generation_prompt()
        for length in self._header_cuts(prompt):
            found = text.rfind(prompt[:length], low, content_start)
            if found >= 0:
                return found + length
        return content_start if prompt else max(low, len(text[:content_start].rstrip()))

    def _generation_prompt(self) -> str:
        """What the template adds for the assistant to go on from; empty in templates that add nothing."""
        if self._prompt is None:
            question = [{"role": "user", "content": "Hello"}]
            try:
                plain = self._template.render(question)
                prompted = self._template.render(question, add_generation_prompt=True)
            except RowError:
                return ""
            # Phi 3 ends a conversation with a token that a generation prompt replaces: cut back to a whole token.
            same = _shared(plain, prompted)
            ends = [
                match.end() for match in re.finditer(rf"{self._added.pattern}|\n|$", prompted) if match.end() <= same
            ]
            self._prompt = prompted[max([0, *ends]) :] if same < len(plain) else prompted[same:]
        return self._prompt

    def _header_cuts(self, prompt: str) -> list[int]:
        """Lengths at which a header may end: whole, or behind each added token (R1's prompt opens `<think>` too)."""
        cuts = {len(prompt), *(match.end() for match in self._added.finditer(prompt))}
        return sorted(cuts - {0}, reverse=True)

    # -- prefixes ----------------------------------------------------------------------------------------------

    def _by_prefixes(
        self,
        done: Rendering,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        index: int,
        low: int,
    ) -> Span:
        text = done.text
        plain = self._with_plain_turn(messages, tools, index)
        start = self._prefix_start(text, messages, tools, index)
        if start is None and plain is not None:
            # No prefix holds, but the same conversation with a plain turn parts from this one where the turn begins.
            start = self._header_end(text, low, _shared(plain, text))
        span = None
        if start is not None and plain is not None:
            behind = plain.partition(_PLAIN_ANSWER)[2]
            if text.endswith(behind) and len(text) - len(behind) >= start:
                span = self._with_end(done, messages, index, (start, len(text) - len(behind)))
        if start is not None and span is None:
            end = self._whole_turn_end(text, messages, tools, index)
            span = (start, end) if end is not None and end > start else None
        if span is None or _holds_next(text[slice(*span)], messages, index):
            raise MaskError(
                f"message {index + 1}: the chat template rewrites this turn so that its tokens cannot be told",
                hint="data.unroll = true, or a template with generation markers, may help",
            )
        return span

    def _prefix_start(
        self, text: str, messages: list[Message], tools: list[dict[str, Any]] | None, index: int
    ) -> int | None:
        """Where the turn begins: behind the conversation before it and as much of the prompt as was rendered."""
        try:
            prompted = self._template.render(messages[:index], tools, add_generation_prompt=True)
            if text.startswith(prompted):
                return len(prompted)
            before = self._template.render(messages[:index], tools)
        except RowError:
            return None
        if not text.startswith(before) or not prompted.startswith(before):
            return None
        prompt = prompted[len(before) :]
        cuts = [cut for cut in self._header_cuts(prompt) if text.startswith(prompt[:cut], len(before))]
        return len(before) + max(cuts, default=0)

    def _with_plain_turn(self, messages: list[Message], tools: list[dict[str, Any]] | None, index: int) -> str | None:
        """The conversation with a plain answer in place of the turn; None where the template refuses it."""
        plain = {"role": "assistant", "content": _PLAIN_ANSWER}
        try:
            rendered = self._template.render([*messages[:index], plain, *messages[index + 1 :]], tools)
        except RowError:
            return None
        return rendered if _PLAIN_ANSWER in rendered else None

    def _whole_turn_end(
        self, text: str, messages: list[Message], tools: list[dict[str, Any]] | None, index: int
    ) -> int | None:
        """The end of a turn that has an ending of its own, as calls have in some templates."""
        if index == len(messages) - 1:
            end = len(text.rstrip())
        else:
            try:
                shorter = self._template.render(messages[: index + 1], tools)
            except RowError:
                return None
            same = _shared(shorter.rstrip(), text)
            end = same if same == len(shorter.rstrip()) else 0
        tail = [match.end() for match in self._control.finditer(text, 0, end)]
        return end if end and tail and tail[-1] == end else None

    # -- the end-of-turn token ---------------------------------------------------------------------------------

    def _with_end(self, done: Rendering, messages: list[Message], index: int, span: Span) -> Span:
        """The span with the end-of-turn token that follows it."""
        start, end = span
        is_last = index == len(messages) - 1
        match = self._end.match(done.text, end)
        if match is None:
            return self._added_end(done, messages, start, index) if is_last else self._missing_end(index)
        if is_last:
            return start, match.end()
        usual = self._usual_end(messages)
        if usual and match[1].startswith(usual):
            return start, match.start(1) + len(usual)
        first = self._first_end.match(done.text, end)
        return start, first.end() if first else match.end()

    def _usual_end(self, messages: list[Message]) -> str:
        """The control tokens behind the last turn of a plain conversation, such as Command A's two."""
        if self._usual_ending is None:
            plain = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _PLAIN_ANSWER}]
            try:
                behind = self._template.render(plain).partition(_PLAIN_ANSWER)[2]
            except RowError:
                behind = ""
            match = self._end.match(behind)
            self._usual_ending = match[1] if match else ""
        return self._usual_ending

    def _added_end(self, done: Rendering, messages: list[Message], start: int, index: int) -> Span:
        """Where turns end with the next header (GLM) the last one is open, and the model must learn to stop."""
        probe = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _PLAIN_ANSWER}]
        behind = self._template.render([*probe, probe[0]]).partition(_PLAIN_ANSWER)[2]
        if not self._eos or not self._first_end.match(behind):
            return self._missing_end(index)
        done.text += self._eos
        done.notes.add(NOTE_EOS)
        return start, len(done.text)

    def _missing_end(self, index: int) -> Span:
        raise MaskError(
            f"message {index + 1}: the chat template ends the assistant's turn with no control token, "
            "so the model would never learn to stop",
            hint="end the assistant's turn with the tokenizer's eos_token in the template (`model.chat_template`)",
        )

    # -- notes and markers -------------------------------------------------------------------------------------

    def _weigh_marks(
        self, done: Rendering, messages: list[Message], tools: list[dict[str, Any]] | None, turns: list[int]
    ) -> None:
        """Compare with the template's generation markers, and take them where the spec says so."""
        marked = self._template.render(messages, tools, show_marks=True)
        places = [match.start() - count for count, match in enumerate(_MARKS.finditer(marked))]
        pairs = list(zip(places[::2], places[1::2], strict=False))
        if pairs == [done.turns[index] for index in turns]:
            return
        done.notes.add(NOTE_MARKS)
        if not self._use_marks:
            return
        if len(pairs) != len(turns):
            raise MaskError(f"the template's generation markers name {len(pairs)} turns of {len(turns)}")
        for start, end in pairs:
            last = start + len(done.text[start:end].rstrip())
            if not any(match.end() == last for match in self._control.finditer(done.text, start, end)):
                raise MaskError(
                    "the template's generation markers leave the end-of-turn token out, so it would never be trained",
                    hint='use data.spans = "auto", or move {% endgeneration %} behind the end-of-turn token',
                )
        done.turns = dict(zip(turns, pairs, strict=True))


def _shared(left: str, right: str) -> int:
    """How many characters two texts share from their start."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(left), len(right)))


def _own_words(message: Message) -> str:
    """What a message says, apart from thinking and edge whitespace, which templates may take out."""
    return (message.get("content") or "").rpartition("</think>")[2].strip()


def _said_in(words: str, text: str) -> bool:
    """Whether a text holds the words, as they are or as JSON, in which some templates quote tool results."""
    return words in text or orjson.dumps(words).decode()[1:-1] in text


def _holds_next(turn: str, messages: list[Message], index: int) -> bool:
    """Whether a turn's text holds what the next message says: then its end is wrong."""
    if index + 1 == len(messages):
        return False
    words, own = _own_words(messages[index + 1]), orjson.dumps(messages[index]).decode()
    return bool(words) and words in turn and not _said_in(words, own)


def _check_calls(done: Rendering, messages: list[Message]) -> None:
    """A template without tools renders a call as an empty turn, which would teach the model to say nothing."""
    for index, message in enumerate(messages):
        for call in message.get("tool_calls") or ():
            name = call["function"]["name"]
            if index in done.turns and name not in done.text[slice(*done.turns[index])]:
                raise RowError(
                    "template_refused", f"the chat template leaves out the call of `{name}` in message {index + 1}"
                )


def _note_losses(done: Rendering, messages: list[Message]) -> None:
    """Note what the template took out: thinking of earlier turns, or whole messages."""
    for message in messages:
        content = message.get("content") or ""
        thought = message.get("reasoning_content") or (
            content.partition("</think>")[0] if "</think>" in content else ""
        )
        if message["role"] == "assistant" and not _said_in(thought.replace("<think>", "").strip(), done.text):
            done.notes.add(NOTE_THINKING)
        if not _said_in(_own_words(message), done.text):
            done.notes.add(NOTE_DROPPED)


def _any_of(tokens: list[str]) -> str:
    """A pattern of any of the tokens, the longest first; one that never matches where there are none."""
    return "|".join(re.escape(token) for token in sorted(set(tokens) - {""}, key=len, reverse=True)) or r"(?!)"


def _wrap(message: Message) -> Message:
    """The content between sentinels; edge whitespace stays outside, since some templates trim it."""
    content = message.get("content") or ""
    core = content.strip()
    if not core:
        return {**message, "content": f"{_OPEN}{_CLOSE}{content}"}
    head, tail = content[: len(content) - len(content.lstrip())], content[len(content.rstrip()) :]
    return {**message, "content": f"{head}{_OPEN}{core}{_CLOSE}{tail}"}
