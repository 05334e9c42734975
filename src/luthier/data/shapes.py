"""Learn how a template renders one shape of conversation, so that most rows need no template at all.

For one shape (the roles in order) a template is nearly always fixed text around the contents. It is learnt once from a
probe rendered in full, then rows are joined. Nothing is taken on trust: the first rows of a shape, a sample of all
others and every row with content that a template may treat specially are rendered in full and compared, and one
difference ends learning for the whole run (`ShapeBroken`), which then starts over with full renderings only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from luthier.data.example import Message
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
    """Fixed texts between the contents, and each turn's reach before and behind its content."""

    fixed: list[str]
    reach: dict[int, Span]
    seen: int = 0


class ShapeLearner:
    """Renders plain conversations by joining; everything else goes to the span finder."""

    def __init__(self, finder: SpanFinder, template: ChatTemplate, *, learn: bool = True) -> None:
        self._finder = finder
        self._template = template
        self._shapes: dict[str, _Shape | None] = {}
        self._learn = learn and not template.has_marks
        self._suspicious = re.compile("|".join([_MARKUP, *sorted(map(re.escape, template.watched))]))

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
                return done if self._template.render(messages) == done.text else self._finder.find(messages)
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
        """Learn a shape from a probe whose contents are words that stand nowhere else."""
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
        if done.notes:
            return None
        reach = {i: (bounds[i][0] - start, end - bounds[i][1]) for i, (start, end) in done.turns.items()}
        return _Shape(fixed, reach)


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
    return Rendering("".join(parts), turns)
