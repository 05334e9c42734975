"""What a chat template puts around each message of a chat, found by rendering chats and checked on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from luthier.data.example import Message
from luthier.data.reasons import RowError
from luthier.data.template import ChatTemplate
from luthier.errors import UnsupportedError

_SYSTEM, _WORDS = "Qsys0", ("Quser1", "Qbot2", "Quser3", "Qbot4", "Quser5")
_CONTENTS = ("hello", "two\nlines and 'quotes' \"here\"", "\u00e9 {{ braces }} {% x %}", "- 1\n\n- 2", "a<b>&c")
_ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Turns:
    """A chat that ends with a user's message and waits for an answer: texts between the messages, always the same.

    `start` stands before the first user message; with a system message, `system` is what stands before and after it
    there. A template that puts it at the last user message instead has `late_system` for that place, too.
    """

    start: str
    answer: str  # between a user's message and the assistant's
    question: str  # between the assistant's message and the next user's
    prompt: str  # after the last user message
    system: tuple[str, str] | None = None
    late_system: tuple[str, str] | None = None
    notes: tuple[str, ...] = ()

    def render(self, contents: Sequence[str], system: str | None = None) -> str:
        """The chat of these contents, user and assistant in turn."""
        parts = []
        last = len(contents) - 1
        for place, content in enumerate(contents):
            if place % 2:
                parts.append(content)
                continue
            before = self.start if place == 0 else self.question
            if system is not None and self._holds_system(place, last):
                around = self.system if place == 0 else self.late_system
                assert around is not None
                before = around[0] + system + around[1]
            parts += [before, content, self.prompt if place == last else self.answer]
        return "".join(parts)

    def _holds_system(self, place: int, last: int) -> bool:
        if self.system is None:
            return False
        return place == (0 if self.late_system is None else last)


class _Unlike(Exception):
    """The template does not only put turns one after the other."""


def find_turns(template: ChatTemplate) -> Turns:
    """The texts between messages; UnsupportedError for a template that does more than put them there."""
    try:
        turns = _derive(template)
        _check(template, turns)
    except (_Unlike, RowError) as error:
        raise UnsupportedError(
            f"{template.name}: it does more than put turns one after the other ({error}), "
            "so no Ollama template can be derived from it",
            hint="`luthier export --to gguf` carries the chat template itself: serve it with `llama-server --jinja`, "
            "or write a Modelfile with a TEMPLATE of your own beside it",
        ) from None
    return turns


def find_end_of_turn(template: ChatTemplate, control_tokens: Sequence[str]) -> str | None:
    """The control token that ends an assistant's turn."""
    question = find_turns(template).question
    places = [(question.find(token), -len(token), token) for token in control_tokens if token and token in question]
    return min(places)[2] if places else None


def _derive(template: ChatTemplate) -> Turns:
    start, prompt = _cut(_render(template, _WORDS[:1]), _WORDS[:1])
    first, answer, question, last = _cut(_render(template, _WORDS[:3]), _WORDS[:3])
    if (first, last) != (start, prompt):
        raise _Unlike("a first or last message looks otherwise in a longer chat")
    try:
        alone = _render(template, _WORDS[:1], _SYSTEM)
        longer = _render(template, _WORDS[:3], _SYSTEM)
    except RowError:
        return Turns(start, answer, question, prompt, notes=("the template takes no system message",))
    if _SYSTEM not in alone:
        return Turns(start, answer, question, prompt, notes=("the template leaves a system message out",))
    before, after, _ = _cut(alone, (_SYSTEM, *_WORDS[:1]))
    late = None
    if longer.find(_SYSTEM) > longer.find(_WORDS[1]):
        *_, left, right, _ = _cut(longer, (*_WORDS[:2], _SYSTEM, _WORDS[2]))
        late = (left, right)
    return Turns(start, answer, question, prompt, (before, after), late)


def _cut(text: str, words: Sequence[str]) -> list[str]:
    """What stands before, between and after the words, which come once each and in this order."""
    places = [text.find(word) for word in words]
    if any(text.count(word) != 1 for word in words) or any(after < before for before, after in pairwise(places)):
        raise _Unlike("a message is left out, repeated or moved")
    parts, end = [], 0
    for word, place in zip(words, places, strict=True):
        parts.append(text[end:place])
        end = place + len(word)
    return [*parts, text[end:]]


def _render(template: ChatTemplate, contents: Sequence[str], system: str | None = None) -> str:
    turns: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    turns += [{"role": _ROLES[place % 2], "content": content} for place, content in enumerate(contents)]
    return template.render(turns, add_generation_prompt=True)


def _check(template: ChatTemplate, turns: Turns) -> None:
    """Other lengths and contents come out as the template renders them."""
    systems = [None, "be brief", "two\n\nlines"] if turns.system else [None]
    for length in (1, 3, 5, 9):
        for system in systems:
            for shift in range(len(_CONTENTS)):
                contents = [_CONTENTS[(place + shift) % len(_CONTENTS)] for place in range(length)]
                if turns.render(contents, system) != _render(template, contents, system):
                    raise _Unlike(f"a chat of {length} messages comes out otherwise")


def list_differences(template: ChatTemplate, turns: Turns) -> list[str]:
    """What the template does to some contents, and the derived texts do not."""
    found = []
    cases = {
        "white space at the edges of a message, which the chat template trims": [" a ", " b ", " c "],
        "thinking in earlier answers, which the chat template drops": ["a", "<think>\nt\n</think>\n\nb", "c"],
    }
    for said, contents in cases.items():
        try:
            same = turns.render(contents) == _render(template, contents)
        except RowError:
            same = True
        if not same:
            found.append(f"Ollama keeps {said}")
    return found
