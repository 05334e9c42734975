"""A conversation with a model: what was said is kept, rendered by the chat template, and answered token by token."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from luthier.data.example import Message
from luthier.data.reasons import RowError
from luthier.data.rows import ReadOptions, RowReader
from luthier.data.tokens import ModelText
from luthier.engines.registry import load_sampler
from luthier.engines.verbs import SampleParams, Sampler
from luthier.errors import CallError, LuthierError
from luthier.runs.resolve import ResolvedModel
from luthier.spec.data import Data

_SAMPLE = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}
_UNFINISHED = "\ufffd"


def find_end(reader: RowReader) -> str:
    """The token that ends an answer by the chat template; empty where none can be told.

    Some templates refuse so short a conversation; then the end of text alone ends an answer.
    """
    try:
        return reader.question(_SAMPLE).end
    except (RowError, LuthierError):
        return ""


class Prompter:
    """A model's side of a conversation in text: prompts rendered for it, what ends an answer, tokens becoming text."""

    def __init__(self, folder: Path, *, template: Path | None = None) -> None:
        self.text = ModelText(folder, chat_template=template)
        self._reader = RowReader(
            ReadOptions(Data(), None, folder, template, learn_shapes=False, fast_tokenizer=False), ("chat",)
        )
        self.stops = self.text.end_tokens({find_end(self._reader)})
        self.room = _context_length(folder)
        """Tokens that the model was made for; 0 where it does not say."""

    def render(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """The conversation as the model is asked to go on with it; raises CallError where its template refuses."""
        if self.text.template_source:
            try:
                text = self._reader.prompt(messages, tools)
            except RowError as error:
                raise CallError(str(error), hint="say it in other words, or begin anew") from None
        else:
            # A model that knows no turns is asked to go on with the text.
            text = self.text.text_prefix + "\n".join(str(message["content"]) for message in messages)
        found: list[int] = self.text.tokenizer.encode(text, add_special_tokens=False).ids
        return found


class Chat:
    """One conversation with one model."""

    def __init__(
        self,
        resolved: ResolvedModel,
        home: Path,
        *,
        template: Path | None = None,
        system: str = "",
        sampler: Sampler | None = None,
    ) -> None:
        self.name = resolved.name
        self._prompter = Prompter(resolved.folder, template=template)
        self._sampler = sampler or load_sampler(resolved, home)
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = []

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = []

    def answer(self, said: str, params: SampleParams, hear: Callable[[str], None]) -> str:
        """What the model answers; `hear` is told its text as it comes. Both are kept. An interrupt cuts the answer off.

        Raises CallError where the message, or all that was said with it, cannot be asked.
        """
        asked = [*self.messages, {"role": "user", "content": said}]
        prompt, room = self._prompter.render([*self._system, *asked]), self._prompter.room
        if room and len(prompt) + params.max_tokens > room:
            raise CallError(
                f"the conversation has {len(prompt):,} tokens; {self.name} holds {room:,}, its answer among them",
                hint="`/reset` begins a new one",
            )
        spoken = Spoken(self._prompter.text, hear)
        own = replace(params, seed=params.seed + len(asked), stop_tokens=self._prompter.stops)
        with suppress(KeyboardInterrupt):
            self._sampler.stream(prompt, own, spoken.add)
        text = spoken.finish().strip()
        if text:
            self.messages = [*asked, {"role": "assistant", "content": text}]
        return text


class Spoken:
    """Tokens becoming text: a character that is not whole yet waits for the tokens that finish it."""

    def __init__(self, text: ModelText, hear: Callable[[str], None]) -> None:
        self._text, self._hear = text, hear
        self._tokens: list[int] = []
        self._told = ""

    def add(self, token: int) -> None:
        """One more token."""
        self._tokens.append(token)
        whole = self._decoded()
        if not whole.endswith(_UNFINISHED):
            self._tell(whole)

    def finish(self) -> str:
        """All that was said, the rest of it told."""
        self._tell(self._decoded())
        return self._told

    def _tell(self, whole: str) -> None:
        if whole.startswith(self._told) and len(whole) > len(self._told):
            self._hear(whole[len(self._told) :])
            self._told = whole

    def _decoded(self) -> str:
        return str(self._text.tokenizer.decode(self._tokens, skip_special_tokens=True))


def _context_length(folder: Path) -> int:
    """Tokens that the model was made for; 0 where it does not say."""
    path = folder / "config.json"
    facts: dict[str, Any] = orjson.loads(path.read_bytes()) if path.is_file() else {}
    inner = facts.get("text_config")
    found = (inner if isinstance(inner, dict) else facts).get("max_position_embeddings")
    return found if isinstance(found, int) else 0
