"""A model's chat template, compiled in a sandbox without transformers and rendered exactly as transformers would.

What a template may see is what transformers shows it, with two differences: `strftime_now` answers a fixed day, so that
the same rows give the same tokens tomorrow (docs/decisions/0003-fixed-date.md), and thinking stands under every name
that templates read it by.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator
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


def _watched_words(tree: nodes.Template) -> frozenset[str]:
    """Texts that the template does more with than print: content that holds one may be treated specially."""
    return frozenset(_words_below(tree, is_printed=False)) - {""}


def _words_below(node: nodes.Node, *, is_printed: bool) -> Iterator[str]:
    """The watched texts of a part of a template; what an output prints as it stands is not watched."""
    if isinstance(node, nodes.Const):
        if isinstance(node.value, str) and not is_printed:
            yield node.value
        return
    if isinstance(node, nodes.Compare) and _is_role(node.expr):
        return
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        yield from _words_below(node.node, is_printed=False)
        return
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr in _EDGE_METHODS:
        yield from _words_below(node.node, is_printed=False)
        yield from (word for arg in node.args for word in _words_below(arg, is_printed=False) if word.strip())
        return
    prints = isinstance(node, nodes.Output) or (is_printed and isinstance(node, _JOINERS))
    for name, part in node.iter_fields():
        for inner in part if isinstance(part, list) else [part]:
            if isinstance(inner, nodes.Node):
                yield from _words_below(inner, is_printed=prints and name != "test")


# Methods that look at the edges of a text; what has white space there is rendered in full anyway.
_EDGE_METHODS = ("strip", "lstrip", "rstrip", "trim")
# What an output may be made of without looking at it.
_JOINERS = (nodes.Add, nodes.Concat, nodes.CondExpr)


def _is_role(node: nodes.Node) -> bool:
    """`message.role` and `message['role']`: what they are compared with says nothing of contents."""
    if isinstance(node, nodes.Getattr):
        return node.attr == "role"
    return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "role"


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
            line = f":{error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise TemplateError(f"{name}{line}: not a valid template: {error.message}", where=f"{name}{line}") from None
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
