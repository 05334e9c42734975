"""Find exactly which characters of a rendered conversation each assistant turn is.

The truth is one full rendering. Spans are found in it, never by joining parts rendered alone:

1. each assistant content is wrapped in sentinels; the contents' places hold only if taking the sentinels out again
   gives the plain rendering byte for byte;
2. else (tool calls, thinking that the template moves or drops) by prefixes: the conversation up to the turn with the
   generation prompt is where it starts, and what follows the same turn made plain is where it ends;
3. else there is no answer, and MaskError says so.

A turn begins where generation would begin and ends with its end-of-turn token; whitespace after that is not in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from luthier.data import notes
from luthier.data.example import Message
from luthier.data.reasons import RowError
from luthier.data.spoken import check_calls, find_last, find_losses, holds_another, own_words
from luthier.data.template import MARK_CLOSE, MARK_OPEN, ChatTemplate
from luthier.errors import MaskError

Span = tuple[int, int]
Tools = list[dict[str, Any]] | None
_OPEN, _CLOSE = "\ue0f2", "\ue0f3"
# Starts with a character that no real answer starts with, so that two renderings part exactly at the turn.
_PLAIN_ANSWER = "\ue0f4answer"
RESERVED = re.compile("[\ue0f0-\ue0f4]")
_SENTINELS = re.compile(f"[{_OPEN}{_CLOSE}]")
_MARKS = re.compile(f"[{MARK_OPEN}{MARK_CLOSE}]")
_PROBE: list[Message] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _PLAIN_ANSWER}]


@dataclass(slots=True)
class Rendering:
    """A conversation as text, and the span of each assistant turn by its message index."""

    text: str
    turns: dict[int, Span]
    notes: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Case:
    """One conversation and its rendering, while its turns are looked for."""

    messages: list[Message]
    tools: Tools
    done: Rendering

    @property
    def text(self) -> str:
        return self.done.text


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
        self._ends = re.compile(rf"\s*((?:{one})+)")
        self._end = re.compile(rf"\s*({one})")
        self._prompt = self._generation_prompt()
        self._usual_end = self._find_usual_end()

    def find(self, messages: list[Message], tools: Tools = None) -> Rendering:
        """The one full rendering and its turns; raises RowError or MaskError."""
        case = _Case(messages, tools, Rendering(self._template.render(messages, tools), {}))
        try:
            self._place_turns(case)
        except MaskError:
            if not tools or not self._place_without_tools(case):
                raise
        check_calls(case.text, case.done.turns, messages)
        self._check_not_empty(case)
        case.done.notes |= find_losses(case.text, messages)
        if self._template.has_marks:
            self._weigh_marks(case)
        return case.done

    def _place_turns(self, case: _Case) -> None:
        contents = self._by_sentinels(case)
        low = 0
        for index in _turns(case.messages):
            if contents is not None:
                first, last = contents[index]
                span = self._with_end(case, index, (self._start_before(case, index, low, first), last))
            else:
                span = self._by_prefixes(case, index, low)
            case.done.turns[index] = span
            low = span[1]

    def _place_without_tools(self, case: _Case) -> bool:
        """Mistral moves the list of tools to the last question: find the turns without it, then shift them past it."""
        bare, text = self.find(case.messages), case.text
        grown = len(text) - len(bare.text)
        at = _shared(bare.text, text)
        if grown < 0 or text[at + grown :] != bare.text[at:]:
            return False
        shifted = {i: (a + grown * (a > at), b + grown * (b > at)) for i, (a, b) in bare.turns.items()}
        case.done.turns = shifted
        case.done.notes |= bare.notes
        return all(text[a:b] == bare.text[slice(*bare.turns[i])] for i, (a, b) in shifted.items())

    def _check_not_empty(self, case: _Case) -> None:
        for index, (start, end) in case.done.turns.items():
            if not self._control.sub("", case.text[start:end]).strip():
                raise RowError("template_refused", f"the chat template leaves nothing of message {index + 1}")

    # -- where a turn begins -----------------------------------------------------------------------------------

    def _start_before(self, case: _Case, index: int, low: int, content_start: int) -> int:
        """Where generation of the turn would begin, somewhere before its content."""
        start = self._prefix_start(case, index)
        if start is not None and low <= start <= content_start:
            return start
        behind = find_last(own_words(case.messages[index - 1]), case.text, low, content_start) if index else None
        found = self._header_end(case.text, low if behind is None else behind, content_start)
        return content_start if found is None else found

    def _prefix_start(self, case: _Case, index: int) -> int | None:
        """Behind the conversation before the turn, and as much of the generation prompt as was rendered."""
        try:
            prompted = self._template.render(case.messages[:index], case.tools, add_generation_prompt=True)
            if case.text.startswith(prompted):
                return len(prompted)
            before = self._template.render(case.messages[:index], case.tools)
        except RowError:
            return None
        if not case.text.startswith(before) or not prompted.startswith(before):
            return None
        prompt, rest = prompted[len(before) :], case.text[len(before) :]
        same = _shared(prompt, rest)
        return len(before) + max((cut for cut in self._cuts(prompt) if cut <= same), default=0)

    def _header_end(self, text: str, low: int, high: int) -> int | None:
        """Behind the last header between two places; None where there is none."""
        for cut in self._cuts(self._prompt):
            found = text.rfind(self._prompt[:cut], low, high)
            if found >= 0:
                return found + cut
        return None if self._prompt else max(low, len(text[:high].rstrip()))

    def _cuts(self, prompt: str) -> Iterator[int]:
        """Lengths at which a header may end, the longest first: QwQ's and R1's prompts go on to open `<think>`.

        Whole, beside white space or beside an added token; never inside a word or a token.
        """
        tokens = [match.span() for match in self._added.finditer(prompt)]
        edges = {edge for span in tokens for edge in span}
        for cut in range(len(prompt), 0, -1):
            is_edge = cut == len(prompt) or cut in edges or prompt[cut].isspace() or prompt[cut - 1].isspace()
            if is_edge and prompt[:cut].strip() and not any(a < cut < b for a, b in tokens):
                yield cut

    def _generation_prompt(self) -> str:
        """What the template adds for the assistant to go on from; empty in templates that add nothing."""
        try:
            plain = self._template.render(_PROBE[:1])
            prompted = self._template.render(_PROBE[:1], add_generation_prompt=True)
        except RowError:
            return ""
        same = _shared(plain, prompted)
        if same == len(plain):
            return prompted[same:]
        # Phi 3 ends a conversation with a token that a generation prompt replaces: cut back to a whole token.
        ends = [match.end() for match in re.finditer(rf"{self._added.pattern}|\n", prompted) if match.end() <= same]
        return prompted[max([0, *ends]) :]

    # -- sentinels ---------------------------------------------------------------------------------------------

    def _by_sentinels(self, case: _Case) -> dict[int, Span] | None:
        """The bounds of each assistant content, or None where sentinels do not come through unharmed."""
        turns = _turns(case.messages)
        if any(case.messages[i].get("tool_calls") or case.messages[i].get("reasoning_content") for i in turns):
            return None
        return self._places_of(case, turns)

    def _places_of(self, case: _Case, wanted: list[int]) -> dict[int, Span] | None:
        """The bounds of the wanted messages' contents in the text; None where they cannot be told."""
        wrapped = [_wrap(message) if index in wanted else message for index, message in enumerate(case.messages)]
        try:
            marked = self._template.render(wrapped, case.tools)
        except RowError:
            return None
        if _SENTINELS.sub("", marked) != case.text:
            return None
        if "".join(_SENTINELS.findall(marked)) != (_OPEN + _CLOSE) * len(wanted):
            return None
        places = [match.start() - count for count, match in enumerate(_SENTINELS.finditer(marked))]
        return dict(zip(wanted, zip(places[::2], places[1::2], strict=True), strict=True))

    # -- prefixes ----------------------------------------------------------------------------------------------

    def _by_prefixes(self, case: _Case, index: int, low: int) -> Span:
        plain = self._with_plain_turn(case, index)
        start = self._prefix_start(case, index)
        if start is None and plain is not None:
            start = self._parting(case, index, low, plain)
        span = None
        if start is not None and start >= low:
            span = self._until_plain_end(case, index, start, plain) or self._until_whole_end(case, index, start)
        if span is None or self._holds_another(case, index, span):
            raise MaskError(
                f"message {index + 1}: the chat template rewrites this turn so that its tokens cannot be told",
                hint="data.unroll = true, or a template with generation markers, may help",
            )
        return span

    def _parting(self, case: _Case, index: int, low: int, plain: str) -> int | None:
        """No prefix holds, but the same conversation with a plain turn parts from this one where the turn begins."""
        high = _shared(plain, case.text)
        behind = find_last(own_words(case.messages[index - 1]), case.text, low, high) if index else low
        return None if behind is None else self._header_end(case.text, behind, high)

    def _with_plain_turn(self, case: _Case, index: int) -> str | None:
        """The conversation with a plain answer in place of the turn; None where the template refuses it."""
        plain = {"role": "assistant", "content": _PLAIN_ANSWER}
        try:
            rendered = self._template.render([*case.messages[:index], plain, *case.messages[index + 1 :]], case.tools)
        except RowError:
            return None
        return rendered if _PLAIN_ANSWER in rendered else None

    def _until_plain_end(self, case: _Case, index: int, start: int, plain: str | None) -> Span | None:
        """To where the text goes on as it does behind a plain answer."""
        if plain is None:
            return None
        behind = plain.partition(_PLAIN_ANSWER)[2]
        end = len(case.text) - len(behind)
        return self._with_end(case, index, (start, end)) if case.text.endswith(behind) and end >= start else None

    def _until_whole_end(self, case: _Case, index: int, start: int) -> Span | None:
        """To the end of a turn that has an ending of its own, as calls have in some templates.

        Tried with the turn as it is, and reduced to its calls, since GPT-OSS drops what stood beside an earlier call.
        """
        message = case.messages[index]
        only_calls = {"role": "assistant", "content": "", "tool_calls": message.get("tool_calls")}
        for turn in [message, only_calls] if message.get("tool_calls") else [message]:
            try:
                shorter = self._template.render([*case.messages[:index], turn], case.tools).rstrip()
                whole = self._template.render([*case.messages[:index], turn, *case.messages[index + 1 :]], case.tools)
            except RowError:
                continue
            behind = whole[len(shorter) :]
            end = len(case.text) - len(behind)
            ended = any(match.end() == end for match in self._control.finditer(case.text, start, max(start, end)))
            if whole.startswith(shorter) and case.text.endswith(behind) and ended:
                return start, end
        return None

    def _holds_another(self, case: _Case, index: int, span: Span) -> bool:
        """Whether the span reaches into what somebody else says."""
        others = [i for i, message in enumerate(case.messages) if message["role"] != "assistant" and own_words(message)]
        places = self._places_of(case, others)
        if places is None:
            return holds_another(case.text[slice(*span)], case.messages, index)
        return any(first < span[1] and span[0] < last for first, last in places.values())

    # -- the end-of-turn token ---------------------------------------------------------------------------------

    def _with_end(self, case: _Case, index: int, span: Span) -> Span:
        """The span with the end-of-turn token that follows it."""
        start, end = span
        match = self._ends.match(case.text, end)
        is_last = index == len(case.messages) - 1
        if match is None:
            return (start, self._added_end(case, index)) if is_last else _refuse_end(index)
        if is_last:
            return start, match.end()
        if self._usual_end and match[1].startswith(self._usual_end):
            return start, match.start(1) + len(self._usual_end)
        first = self._end.match(case.text, end)
        return start, first.end() if first else match.end()

    def _find_usual_end(self) -> str:
        """The control tokens behind the last turn of a plain conversation, such as Command A's two."""
        try:
            match = self._ends.match(self._template.render(_PROBE).partition(_PLAIN_ANSWER)[2])
        except RowError:
            return ""
        return match[1] if match else ""

    def _added_end(self, case: _Case, index: int) -> int:
        """Where turns end with the next header (GLM) the last one is open, and the model must learn to stop."""
        behind = self._template.render([*_PROBE, _PROBE[0]]).partition(_PLAIN_ANSWER)[2]
        if not self._eos or not self._end.match(behind):
            _refuse_end(index)
        case.done.text += self._eos
        case.done.notes.add(notes.EOS)
        return len(case.done.text)

    # -- generation markers ------------------------------------------------------------------------------------

    def _weigh_marks(self, case: _Case) -> None:
        """Compare with the template's generation markers, and take them where the spec says so."""
        turns = _turns(case.messages)
        marked = self._template.render(case.messages, case.tools, show_marks=True)
        places = [match.start() - count for count, match in enumerate(_MARKS.finditer(marked))]
        pairs = list(zip(places[::2], places[1::2], strict=False))
        if pairs == [case.done.turns[index] for index in turns]:
            return
        case.done.notes.add(notes.MARKS)
        if not self._use_marks:
            return
        if len(pairs) != len(turns):
            raise MaskError(f"the template's generation markers name {len(pairs)} turns of {len(turns)}")
        for start, end in pairs:
            last = start + len(case.text[start:end].rstrip())
            if not any(match.end() == last for match in self._control.finditer(case.text, start, end)):
                raise MaskError(
                    "the template's generation markers leave the end-of-turn token out, so it would never be trained",
                    hint='use data.spans = "auto", or move {% endgeneration %} behind the end-of-turn token',
                )
        case.done.turns = dict(zip(turns, pairs, strict=True))


def _turns(messages: list[Message]) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _refuse_end(index: int) -> NoReturn:
    raise MaskError(
        f"message {index + 1}: the chat template ends the assistant's turn with no control token, "
        "so the model would never learn to stop",
        hint="end the assistant's turn with the tokenizer's eos_token in the template (`model.chat_template`)",
    )


def _shared(left: str, right: str) -> int:
    """How many characters two texts share from their start."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(left), len(right)))


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
