"""Learn how a template renders one shape of conversation, so that most rows need no template at all.

For one shape (the roles in order) a template is nearly always fixed text around the contents. It is learnt once from a
probe rendered in full and tried on difficult contents, then rows are joined. Nothing is taken on trust: every row with
content that the template may treat specially is rendered in full, and so are the first rows of a shape and a sample of
all others, where one difference ends learning for the whole run (`ShapeBroken`), which starts over without it.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass

from luthier.data.example import Message
from luthier.data.notes import EOS
from luthier.data.reasons import RowError
from luthier.data.spans import Rendering, Span, SpanFinder
from luthier.data.template import ChatTemplate
from luthier.errors import MaskError

_ALWAYS_COMPARED = 4
_COMPARED_EVERY = 64
_MARKUP = r"[<>\[\]{}|\ue000-\uf8ff]"
_PLAIN_KEYS = {"role", "content", "weight"}


class ShapeBroken(Exception):
    """A row came out differently from what its shape had taught; learning is off for this template."""


@dataclass(slots=True)
class _Shape:
    """Fixed texts between the contents, and each turn's reach before and behind its content.

    `added` is what stands behind the template's own text: the end-of-sequence token, where turns end with a header.
    """

    fixed: list[str]
    reach: dict[int, Span]
    added: str
    notes: frozenset[str]
    seen: int = 0


class ShapeLearner:
    """Renders plain conversations by joining; everything else goes to the span finder."""

    def __init__(self, finder: SpanFinder, template: ChatTemplate, *, learn: bool = True) -> None:
        self._finder = finder
        self._template = template
        self._shapes: dict[str, _Shape | None] = {}
        self._learn = learn and not template.has_marks
        watched = sorted(map(re.escape, template.watched))
        # A template may look for its words in content that it lowered first.
        self._suspicious = re.compile("|".join([_MARKUP, *watched]), re.IGNORECASE)

    def find(self, messages: list[Message], tools: list[dict[str, object]] | None = None) -> Rendering:
        """As SpanFinder.find, by joining where that is proved to be the same."""
        if not self._learn or tools or any(len(m) > 2 and not m.keys() <= _PLAIN_KEYS for m in messages):
            return self._finder.find(messages, tools)
        key = ".".join([message["role"] for message in messages])
        if key not in self._shapes:
            self._shapes[key] = self._learnt([message["role"] for message in messages])
        shape = self._shapes[key]
        if shape is None:
            return self._finder.find(messages)
        return self._joined(shape, messages)

    def _joined(self, shape: _Shape, messages: list[Message]) -> Rendering:
        contents = [message["content"] for message in messages]
        done = _join(shape, contents)
        for content in contents:
            if self._is_suspicious(content):
                # Where the text is the same, the contents stand at the same places in it, and so do the turns.
                same = self._template.render(messages) + shape.added == done.text
                return done if same else self._finder.find(messages)
        shape.seen += 1
        if shape.seen <= _ALWAYS_COMPARED or shape.seen % _COMPARED_EVERY == 0:
            whole = self._finder.find(messages)
            if (whole.text, whole.turns) != (done.text, done.turns):
                raise ShapeBroken
        return done

    def _is_suspicious(self, content: str) -> bool:
        """Content that the template may treat specially: edge white space, markup, a word it looks for, or nothing."""
        if not content or content[0].isspace() or content[-1].isspace():
            return True
        return self._suspicious.search(content) is not None

    def _learnt(self, roles: list[str]) -> _Shape | None:
        """Learn a shape from a probe whose contents are words that stand nowhere else, and try it on difficult ones."""
        probe = [{"role": role, "content": f"Qz{index}q{role[0]}x"} for index, role in enumerate(roles)]
        try:
            done = self._finder.find(probe)
        except (RowError, MaskError):
            return None
        fixed, bounds, at = [], [], 0
        for message in probe:
            found = done.text.find(message["content"], at)
            if found < 0 or done.text.count(message["content"]) != 1:
                return None
            fixed.append(done.text[at:found])
            at = found + len(message["content"])
            bounds.append((found, at))
        fixed.append(done.text[at:])
        added = done.text[len(self._template.render(probe)) :]
        if done.notes - {EOS}:
            return None
        reach = {i: (bounds[i][0] - start, end - bounds[i][1]) for i, (start, end) in done.turns.items()}
        shape = _Shape(fixed, reach, added, frozenset(done.notes))
        return shape if self._holds_for_difficult_contents(shape, roles) else None

    def _holds_for_difficult_contents(self, shape: _Shape, roles: list[str]) -> bool:
        """Whether joining equals rendering for contents that filters and methods treat in their own ways."""
        for shift in range(0, len(_DIFFICULT) + 1, max(1, len(roles) - 1)):
            contents = [_DIFFICULT[(shift + index) % len(_DIFFICULT)] for index in range(len(roles))]
            messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
            try:
                if self._template.render(messages) + shape.added != _join(shape, contents).text:
                    return False
            except RowError:
                return False
        return True


# Digits, length, several lines, cases, what HTML escapes, and every sign at both edges: filters such as `e`, `indent`,
# `int`, slices and `strip('"')` show on one of these. Markup is not among them, since it is always rendered in full.
_EDGES = [f"{sign}edge{sign}" for sign in string.punctuation if sign not in "<>[]{}|"]
_DIFFICULT = [
    "007",
    "-7.50",
    "1e3",
    "true",
    "Mixed Case here",
    "two\nlines\n\nand a third\tone",
    'Tom & Ann\'s "best"',
    *_EDGES,
]
_DIFFICULT += [("long words and more of them, " * 90).strip(", "), "caf\u00e9 \u6f22\u5b57 \U0001f600", "a  b   c"]


def _join(shape: _Shape, contents: list[str]) -> Rendering:
    parts = [""] * (2 * len(contents) + 1)
    parts[::2] = shape.fixed
    parts[1::2] = contents
    turns: dict[int, Span] = {}
    at = 0
    for index, content in enumerate(contents):
        at += len(shape.fixed[index])
        if index in shape.reach:
            before, behind = shape.reach[index]
            turns[index] = (at - before, at + len(content) + behind)
        at += len(content)
    return Rendering("".join(parts), turns, set(shape.notes))
