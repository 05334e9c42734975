"""Chat requests in OpenAI's shape, translated to what a host is asked, and its answers translated back."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, Field

from luthier.host.ask import MOST_LIKELIEST, MOST_STOPS, Ask, Said, TokenSaid
from luthier.server.problems import problem

MOST_CHOICES = 8
_TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
_NOT_HERE = ("functions", "function_call", "audio", "modalities", "prediction", "web_search_options", "logit_bias")


class ChatRequest(BaseModel):
    """What `/chat/completions` takes; what would change the answer and is not known here is refused by name."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=4096)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LIKELIEST)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    response_format: dict[str, Any] | None = None


def read_asks(request: ChatRequest, adapter: str | None) -> list[Ask]:
    """One question to a host for each choice, with draws of its own; raises the problem of what is not known here."""
    _refuse(request)
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stop) > MOST_STOPS or not all(stop):
        raise problem(400, f"`stop` takes up to {MOST_STOPS} texts, none of them empty", param="stop")
    seed = request.seed if request.seed is not None else secrets.randbits(48)
    ask = Ask(
        [_plain(message, number) for number, message in enumerate(request.messages)],
        None if request.tool_choice == "none" else request.tools or None,
        adapter,
        request.max_completion_tokens or request.max_tokens,
        1.0 if request.temperature is None else request.temperature,
        1.0 if request.top_p is None else request.top_p,
        request.top_k or 0,
        stop=tuple(stop),
        likeliest=request.top_logprobs or 0,
    )
    return [replace(ask, seed=(seed + choice) % 2**62) for choice in range(request.n or 1)]


def _refuse(request: ChatRequest) -> None:
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(request, name):
            raise problem(400, f"`{name}` is not supported: tokens are drawn as the model rates them", param=name)
    form = (request.response_format or {}).get("type", "text")
    if form != "text":
        raise problem(400, f"`response_format` is {form!r}: only text is supported", param="response_format")
    if request.top_logprobs and not request.logprobs:
        raise problem(400, "`top_logprobs` needs `logprobs`", param="top_logprobs")
    if request.tool_choice not in (None, "auto", "none"):
        raise problem(400, "`tool_choice` is `auto` or `none` here", param="tool_choice")
    for name in _NOT_HERE:
        if (request.model_extra or {}).get(name):
            raise problem(400, f"`{name}` is not supported", param=name)


def _plain(message: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A message whose content is one text, also where it came in parts."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise problem(400, f"message {number + 1}: only parts of type `text` are supported", param="messages")
        texts.append(part["text"])
    return {**message, "content": "".join(texts)}


@dataclass
class Choice:
    """One answer as it comes together."""

    index: int
    with_logprobs: bool
    with_tools: bool
    text: str = ""
    tokens: list[TokenSaid] = field(default_factory=list)
    prompt_tokens: int = 0
    answer_tokens: int = 0
    finish: str | None = None

    def add(self, said: Said) -> None:
        """One more part."""
        self.text += said.text
        self.tokens += said.tokens
        self.prompt_tokens = said.prompt_tokens or self.prompt_tokens
        self.answer_tokens = max(self.answer_tokens, said.answer_tokens)
        self.finish = said.finish or self.finish

    def render(self) -> dict[str, Any]:
        """The whole answer."""
        content, calls = split_calls(self.text) if self.with_tools else (self.text, [])
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        return {
            "index": self.index,
            "message": message,
            "logprobs": render_logprobs(self.tokens) if self.with_logprobs else None,
            "finish_reason": "tool_calls" if calls else self.finish,
        }


def render_usage(choices: list[Choice]) -> dict[str, int]:
    """Tokens that went in once and came out of every choice."""
    prompt, answer = choices[0].prompt_tokens, sum(choice.answer_tokens for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def render_logprobs(tokens: list[TokenSaid] | tuple[TokenSaid, ...]) -> dict[str, Any]:
    """Log-probabilities of an answer's tokens."""
    shown = [
        {
            **_token(each.text, each.logprob),
            "top_logprobs": [_token(text, logprob) for text, logprob in each.likeliest],
        }
        for each in tokens
    ]
    return {"content": shown, "refusal": None}


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}


def split_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """The calls that an answer makes, in the form most open models were taught (`<tool_call>{...}</tool_call>`)."""
    calls, rest = [], text
    for found in _TOOL_CALL.finditer(text):
        try:
            call = orjson.loads(found[1])
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        given = arguments if isinstance(arguments, str) else orjson.dumps(arguments).decode()
        function = {"name": str(name), "arguments": given}
        calls.append({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
        rest = rest.replace(found[0], "")
    return (rest.strip(), calls) if calls else (text, [])
