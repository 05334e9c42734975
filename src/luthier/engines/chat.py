"""A conversation with a model: what was said is kept, rendered by the chat template, and answered token by token."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
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
        self._text = ModelText(resolved.folder, chat_template=template)
        self._reader = RowReader(
            ReadOptions(Data(), None, resolved.folder, template, learn_shapes=False, fast_tokenizer=False), ("chat",)
        )
        self._sampler = sampler or load_sampler(resolved, home)
        self._stops = self._text.end_tokens({find_end(self._reader)})
        self._room = _context_length(resolved.folder)
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
        prompt = self._prompt([*self._system, *asked])
        if self._room and len(prompt) + params.max_tokens > self._room:
            raise CallError(
                f"the conversation has {len(prompt):,} tokens; {self.name} holds {self._room:,}, its answer among them",
                hint="`/reset` begins a new one",
            )
        spoken = _Spoken(self._text, hear)
        own = SampleParams(
            params.max_tokens, params.temperature, params.top_p, params.top_k, params.seed + len(asked), self._stops
        )
        with suppress(KeyboardInterrupt):
            self._sampler.stream(prompt, own, spoken.add)
        text = spoken.finish()
        if text:
            self.messages = [*asked, {"role": "assistant", "content": text}]
        return text

    def _prompt(self, messages: list[Message]) -> list[int]:
        if self._text.template_source:
            try:
                text = self._reader.prompt(messages)
            except RowError as error:
                raise CallError(str(error), hint="say it in other words, or begin anew with `/reset`") from None
        else:
            # A model that knows no turns is asked to go on with the text.
            text = self._text.text_prefix + "\n".join(str(message["content"]) for message in messages)
        found: list[int] = self._text.tokenizer.encode(text, add_special_tokens=False).ids
        return found


class _Spoken:
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
        return self._told.strip()

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
