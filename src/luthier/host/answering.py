"""Answers to conversations: prompts rendered for the model, and text told as it comes, up to a stop."""

from __future__ import annotations

from collections.abc import Callable

from luthier.data.formats.chat import read_messages
from luthier.data.reasons import RowError
from luthier.data.tokens import ModelText
from luthier.engines.chat import Prompter, Spoken
from luthier.engines.verbs import Drawn, SampleParams
from luthier.errors import CallError, LuthierError
from luthier.host.ask import Ask, Said, TokenSaid
from luthier.host.streams import Opening, Streams

_TOKENS_WITHOUT_ROOM = 1024

Hear = Callable[[Said], None]


class Answer:
    """One answer on its way; `told` hears its parts from the thread that computes."""

    def __init__(self, ask: Ask, told: Hear, text: ModelText, stops: tuple[int, ...] = ()) -> None:
        self.ask, self.told, self._text, self._stops = ask, told, text, stops
        self.prompt: list[int] = []
        self.most = 0
        self.count = 0
        self.is_cancelled = False
        self.is_stopped = False
        self._fresh: list[str] = []
        self._held = ""
        """Text that may be the beginning of a stop, and is told only when it is not."""
        self._spoken = Spoken(text, self._fresh.append)

    @property
    def opening(self) -> Opening:
        """What is wanted."""
        ask = self.ask
        params = SampleParams(self.most, ask.temperature, ask.top_p, ask.top_k, ask.seed)
        return Opening(self.prompt, [params], ask.adapter, ask.likeliest)

    def begin(self) -> None:
        """Its stream joined."""
        self.told(Said(prompt_tokens=len(self.prompt)))

    def hear(self, place: int, drawn: Drawn) -> bool:
        """One more token; true where it was the last that is wanted."""
        self.count += 1
        ends = drawn.token in self._stops
        if not ends:
            self.add(drawn.token)
        text = self.take(is_last=ends or self.count >= self.most)
        finish = None
        if ends or self.is_stopped:
            finish = "stop"
        elif self.count >= self.most:
            finish = "length"
        tokens = () if ends else (self._token(drawn),)
        self.told(Said(text, tokens, answer_tokens=self.count, finish=finish))
        return finish is not None

    def fail(self, error: LuthierError) -> None:
        """There will be no more."""
        self.told(Said(error=error.as_dict()))

    def add(self, token: int) -> None:
        """One more token."""
        self._spoken.add(token)

    def take(self, *, is_last: bool) -> str:
        """What may be told of the text so far: all before a stop, and nothing that may yet become one."""
        if is_last:
            self._spoken.finish()
        self._held += "".join(self._fresh)
        self._fresh.clear()
        found = [(place + len(stop), place) for stop in self.ask.stop if (place := self._held.find(stop)) >= 0]
        self.is_stopped = bool(found)
        keep = 0 if is_last else max((_overlap(self._held, stop) for stop in self.ask.stop), default=0)
        # The stop that is whole first counts, so that it does not matter where tokens end.
        end = min(found)[1] if found else len(self._held) - keep
        told, self._held = self._held[:end], self._held[end:]
        return told

    def _token(self, drawn: Drawn) -> TokenSaid:
        def show(token: int) -> str:
            return str(self._text.tokenizer.decode([token], skip_special_tokens=False))

        tokens, logprobs = drawn.likeliest or ((), ())
        likeliest = tuple((show(int(token)), float(each)) for token, each in zip(tokens, logprobs, strict=True))
        return TokenSaid(show(drawn.token), drawn.logprob, likeliest)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text begin the stop."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)


class Answering:
    """A model's side of conversations."""

    def __init__(self, streams: Streams, prompter: Prompter) -> None:
        self._streams, self._prompter = streams, prompter

    def ask(self, ask: Ask, told: Hear) -> Answer:
        """Begin an answer; raises CallError where it cannot be asked so."""
        answer = Answer(ask, told, self._prompter.text, self._prompter.stops)
        try:
            messages = read_messages(list(ask.messages))
        except RowError as error:
            raise CallError(str(error), where="messages") from None
        answer.prompt = self._prompter.render(messages, ask.tools)
        room = self._prompter.room - len(answer.prompt) if self._prompter.room else _TOKENS_WITHOUT_ROOM
        if room < (ask.max_tokens or 1):
            raise CallError(
                f"the conversation has {len(answer.prompt):,} tokens, and {ask.max_tokens or 1:,} are asked for; "
                f"the model holds {self._prompter.room:,}",
                hint="send fewer messages, or ask for fewer tokens",
                where="messages",
            )
        answer.most = ask.max_tokens or room
        self._streams.add(answer)
        return answer
