"""Who can play: dice, the scripted expert, any MODEL of Luthier, and any OpenAI-compatible endpoint."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import orjson
from expert import choose
from prompts import Form, read_action
from world import ACTIONS, Game

from luthier.data.rows import ReadOptions, RowReader
from luthier.data.tokens import ModelText
from luthier.engines.chat import find_end
from luthier.engines.registry import load_sampler
from luthier.engines.verbs import SampleParams
from luthier.errors import CallError
from luthier.evals.endpoint import ChatEndpoint, NoReplyError, find_key
from luthier.evals.heldout import find_template
from luthier.runs.home import luthier_home
from luthier.runs.resolve import find_resolved
from luthier.spec.data import Data

KEY = "LUTHIER_API_KEY"
_AT_ONCE = 8
_BEYOND = 1_000_003


class Agent(Protocol):
    """Plays many games at once, a step of each at a time."""

    @property
    def name(self) -> str:
        """What the agent was called by."""
        ...

    def choose(self, games: Sequence[Game]) -> list[str]:
        """The next action of each game."""
        ...


class Dice:
    """Every action as likely as any other; the same ones for the same game."""

    name = "random"

    def choose(self, games: Sequence[Game]) -> list[str]:
        """A throw for each game."""
        return [random.Random(game.seed * _BEYOND + len(game.actions)).choice(ACTIONS) for game in games]


class Expert:
    """The scripted player that the rows come from."""

    name = "expert"

    def choose(self, games: Sequence[Game]) -> list[str]:
        """What the script says."""
        return [choose(game) for game in games]


class Local:
    """A MODEL of Luthier, loaded here; all games that go on are asked in one batch."""

    def __init__(self, model: str, form: Form, temperature: float) -> None:
        resolved = find_resolved(model, with_weights=True)
        template = find_template(resolved, None)
        self.name = model
        self._form = form
        self._temperature = temperature
        self._text = ModelText(resolved.folder, chat_template=template)
        options = ReadOptions(Data(), None, resolved.folder, template, learn_shapes=False, fast_tokenizer=False)
        self._reader = RowReader(options, (model,))
        self._stops = self._text.end_tokens({find_end(self._reader)})
        self._sampler = load_sampler(resolved, luthier_home())
        self._asked = 0

    def choose(self, games: Sequence[Game]) -> list[str]:
        """What the model answers to each game's observation."""
        form, tokenizer = self._form, self._text.tokenizer
        shown = [self._reader.prompt(form.messages(game.describe()), form.tool_list) for game in games]
        prompts = [each.ids for each in tokenizer.encode_batch_fast(shown, add_special_tokens=False)]
        self._asked += 1
        params = SampleParams(
            max_tokens=form.max_tokens,
            temperature=self._temperature,
            seed=self._asked,
            stop_tokens=self._stops,
        )
        drawn = self._sampler.sample(prompts, params)
        answers = tokenizer.decode_batch(drawn, skip_special_tokens=False)
        return [read_action(self._reader.answer(answer)) for answer in answers]


@dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible address, such as that of `luthier serve`."""

    url: str
    name: str
    form: Form
    temperature: float = 0.0
    key: str = ""

    def choose(self, games: Sequence[Game]) -> list[str]:
        """What the model answers to each game's observation, some of them asked at once."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(lambda game: read_action(self.ask(game.describe())), games))

    def ask(self, observation: str) -> str:
        """What the model replies; tried again when it is busy. Raises CallError."""
        asked: dict[str, Any] = {"model": self.name, "messages": self.form.messages(observation)}
        asked["temperature"] = self.temperature
        asked["max_tokens"] = self.form.max_tokens
        if self.form.tools:
            asked["tools"] = self.form.tool_list
        endpoint = ChatEndpoint(self.url, self.key)
        try:
            return _read_reply(endpoint.ask(asked))
        except NoReplyError as error:
            message = f"the model at {endpoint.place} does not play: {error}"
            raise CallError(message, hint=f"its key is read from {KEY}") from None


def build_endpoint(url: str, model: str, form: Form, temperature: float) -> Endpoint:
    """The endpoint that a person named, with the key of the environment; raises CallError."""
    return Endpoint(url, model, form, temperature, find_key(url, KEY, what="model"))


def _read_reply(content: bytes) -> str:
    """What was said; a tool's call is written as a model would write it."""
    try:
        message: Any = orjson.loads(content)["choices"][0]["message"]
        calls = message.get("tool_calls") or []
        said = orjson.dumps({"arguments": orjson.loads(calls[0]["function"]["arguments"])}).decode() if calls else ""
        return said or str(message.get("content") or "")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise CallError(
            "the reply is not one of a chat endpoint", hint="--endpoint names an OpenAI-compatible address"
        ) from None
