"""A model's chat template, compiled in a sandbox without transformers and rendered exactly as transformers would.

What a template may see is what transformers shows it, with one difference: `strftime_now` answers a fixed day, so that
the same rows give the same tokens tomorrow (docs/decisions/0003-fixed-date.md).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from luthier.data.example import Message
from luthier.data.reasons import RowError
from luthier.errors import TemplateError

MAX_TEMPLATE_BYTES = 64 << 10
FIXED_DAY = datetime.datetime(2024, 7, 26, tzinfo=datetime.UTC)
# Two characters of the private use area, which no tokenizer's text and no template holds.
MARK_OPEN, MARK_CLOSE = "\ue0f0", "\ue0f1"


class _Generation(Extension):
    """`{% generation %}` blocks: their bounds are shown when the context asks for marks, else they leave no trace."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_render", [nodes.ContextReference()], lineno=line)
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _render(self, context: jinja2.runtime.Context, caller: Callable[[], str]) -> str:
        text = caller()
        return f"{MARK_OPEN}{text}{MARK_CLOSE}" if context.get("show_marks") else text


class _Refused(Exception):
    """The template called raise_exception."""


def _raise(message: str) -> str:
    raise _Refused(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Plain JSON: jinja2's own filter escapes for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


# Methods that look at the edges of a text only; content with white space at an edge is rendered in full anyway.
_EDGE_METHODS = ("strip", "lstrip", "rstrip", "trim")


def _watched_words(tree: nodes.Template) -> frozenset[str]:
    """Texts that the template compares with, searches for or replaces: content with one may be treated specially."""
    found: set[str] = set()
    for node in tree.find_all((nodes.Compare, nodes.Call, nodes.Filter, nodes.Test)):
        if isinstance(node, nodes.Compare):
            if not _is_role(node.expr):
                found |= _texts_in([node.expr, *(operand.expr for operand in node.ops)])
        elif isinstance(node, nodes.Call):
            if isinstance(node.node, nodes.Getattr) and node.node.attr not in _EDGE_METHODS:
                found |= _texts_in(node.args)
        elif isinstance(node, nodes.Filter | nodes.Test):
            found |= _texts_in(node.args)
    return frozenset(found - {""})


def _is_role(node: nodes.Node) -> bool:
    """`message.role` and `message['role']`: what they are compared with says nothing of contents."""
    if isinstance(node, nodes.Getattr):
        return node.attr == "role"
    return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "role"


def _texts_in(parts: Iterable[nodes.Node]) -> set[str]:
    """The texts among these expressions, and in lists of them."""
    whole = [inner for part in parts for inner in (part, *part.find_all((nodes.Const,)))]
    return {node.value for node in whole if isinstance(node, nodes.Const) and isinstance(node.value, str)}


class ChatTemplate:
    """One compiled template; `render` is a pure function of the conversation."""

    def __init__(self, source: str, *, tokens: dict[str, str], name: str = "chat_template") -> None:
        if len(source.encode()) > MAX_TEMPLATE_BYTES:
            raise TemplateError(
                f"{name}: a template of {len(source.encode()):,} bytes; the most is {MAX_TEMPLATE_BYTES:,}"
            )
        self.source = source
        self.name = name
        self.tokens = tokens
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = FIXED_DAY.strftime
        try:
            self._compiled = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateError(f"{name}: not a valid template: {error}", where=name) from None
        self.has_marks = "endgeneration" in source
        self.watched = _watched_words(environment.parse(source))

    def render(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        show_marks: bool = False,
    ) -> str:
        """The conversation as one text; raises RowError when the template refuses it."""
        if any("reasoning_content" in message for message in messages):
            messages = [_with_thinking(message) for message in messages]
        try:
            return self._compiled.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                show_marks=show_marks,
                **self.tokens,
            )
        except _Refused as error:
            raise RowError("template_refused", f"the chat template says: {error}") from None
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
        ) as error:
            said = " ".join(str(error).split())[:200]
            raise RowError("template_refused", f"the chat template fails: {type(error).__name__}: {said}") from None
        except (MemoryError, RecursionError) as error:
            raise TemplateError(f"{self.name}: the template ran away ({type(error).__name__})") from None


def _with_thinking(message: Message) -> Message:
    """Thinking under every name that templates read it by: GPT-OSS says `thinking`, others `reasoning`."""
    thought = message.get("reasoning_content")
    return message if thought is None else {**message, "thinking": thought, "reasoning": thought}
