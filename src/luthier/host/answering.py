"""The one thread that computes: answers join between tokens, and each hears its text as it comes."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path

from luthier.data.formats.chat import read_messages
from luthier.data.reasons import RowError
from luthier.data.tokens import ModelText
from luthier.engines.chat import Prompter, Spoken
from luthier.engines.verbs import Decoder, Drawn, SampleParams
from luthier.errors import CallError, LuthierError
from luthier.host.ask import Ask, Said, TokenSaid
from luthier.runs.manifest import MANIFEST, check_manifest

_MOST_STREAMS = 32
_MOST_ADAPTERS = 64
_TOKENS_WITHOUT_ROOM = 1024

Hear = Callable[[Said], None]


class Answer:
    """One answer on its way; `hear` is told its parts from the thread that computes."""

    def __init__(self, ask: Ask, hear: Hear, text: ModelText) -> None:
        self.ask, self.hear = ask, hear
        self.prompt: list[int] = []
        self.most = 0
        self.count = 0
        self.is_cancelled = False
        self.is_stopped = False
        self._fresh: list[str] = []
        self._held = ""
        """Text that may be the beginning of a stop, and is told only when it is not."""
        self._spoken = Spoken(text, self._fresh.append)

    def add(self, token: int) -> None:
        """One more token."""
        self._spoken.add(token)

    def take(self, *, is_last: bool) -> str:
        """What may be told of the text so far: all before a stop, and nothing that may yet become one."""
        if is_last:
            self._spoken.finish()
        self._held += "".join(self._fresh)
        self._fresh.clear()
        places = [place for stop in self.ask.stop if (place := self._held.find(stop)) >= 0]
        self.is_stopped = bool(places)
        keep = 0 if is_last else max((_overlap(self._held, stop) for stop in self.ask.stop), default=0)
        end = min(places) if places else len(self._held) - keep
        told, self._held = self._held[:end], self._held[end:]
        return told


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text begin the stop."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)


class Answering:
    """A decoder and all who wait for it."""

    def __init__(self, decoder: Decoder, prompter: Prompter) -> None:
        self._decoder, self._prompter = decoder, prompter
        self._changed = threading.Condition()
        self._waiting: deque[Answer] = deque()
        self._streams: dict[int, Answer] = {}
        self._adapters: OrderedDict[str, None] = OrderedDict()
        self._number = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._thread.start()

    def ask(self, ask: Ask, hear: Hear) -> Answer:
        """Begin an answer; raises CallError where it cannot be asked so."""
        answer = Answer(ask, hear, self._prompter.text)
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
        with self._changed:
            self._waiting.append(answer)
            self._changed.notify()
        return answer

    def cancel(self, answer: Answer) -> None:
        """Nobody listens any more."""
        answer.is_cancelled = True

    def close(self) -> None:
        """End the thread after the token it computes."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._streams or self._is_closed):
                    self._changed.wait()
                if self._is_closed:
                    return
                joining = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._room()))]
            for answer in joining:
                self._join(answer)
            for number, answer in list(self._streams.items()):
                if answer.is_cancelled:
                    self._leave(number)
            try:
                drawn = self._decoder.step()
            except Exception as error:  # the edge of the thread: whoever waits must hear of it
                self._fail_all(error)
                continue
            for each in drawn:
                self._tell(each)

    def _room(self) -> int:
        return _MOST_STREAMS - len(self._streams)

    def _join(self, answer: Answer) -> None:
        ask = answer.ask
        self._number += 1
        params = SampleParams(answer.most, ask.temperature, ask.top_p, ask.top_k, ask.seed)
        try:
            if ask.adapter is not None:
                self._adopt(ask.adapter)
            self._decoder.join(self._number, answer.prompt, params, adapter=ask.adapter, likeliest=ask.likeliest)
        except LuthierError as error:
            answer.hear(Said(error=error.as_dict()))
            return
        self._streams[self._number] = answer
        answer.hear(Said(prompt_tokens=len(answer.prompt)))

    def _adopt(self, folder: str) -> None:
        """Have the adapter in memory, every byte checked; the one that was not asked for longest makes room."""
        if folder not in self._adapters:
            if (Path(folder) / MANIFEST).is_file():
                check_manifest(Path(folder))
            self._decoder.adopt(folder, Path(folder))
            self._adapters[folder] = None
        self._adapters.move_to_end(folder)
        in_use = {answer.ask.adapter for answer in self._streams.values()}
        for name in list(self._adapters)[: max(0, len(self._adapters) - _MOST_ADAPTERS)]:
            if name not in in_use:
                self._decoder.forget(name)
                del self._adapters[name]

    def _tell(self, drawn: Drawn) -> None:
        answer = self._streams[drawn.stream]
        answer.count += 1
        ends = drawn.token in self._prompter.stops
        if not ends:
            answer.add(drawn.token)
        text = answer.take(is_last=ends or answer.count >= answer.most)
        finish = None
        if ends or answer.is_stopped:
            finish = "stop"
        elif answer.count >= answer.most:
            finish = "length"
        if finish:
            self._leave(drawn.stream)
        tokens = () if ends else (self._token(drawn),)
        answer.hear(Said(text, tokens, answer_tokens=answer.count, finish=finish))

    def _token(self, drawn: Drawn) -> TokenSaid:
        def show(token: int) -> str:
            return str(self._prompter.text.tokenizer.decode([token], skip_special_tokens=False))

        likeliest = tuple((show(token), logprob) for token, logprob in drawn.likeliest)
        return TokenSaid(show(drawn.token), drawn.logprob, likeliest)

    def _leave(self, number: int) -> None:
        self._decoder.leave(number)
        del self._streams[number]

    def _fail_all(self, error: Exception) -> None:
        told = error if isinstance(error, LuthierError) else LuthierError(f"{type(error).__name__}: {error}")
        for number, answer in list(self._streams.items()):
            answer.hear(Said(error=told.as_dict()))
            self._leave(number)
