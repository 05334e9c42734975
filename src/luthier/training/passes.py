"""A pass over many examples without training: laid out, shared out, stopped and made smaller as memory needs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from luthier.data.pack import lay_out_step
from luthier.data.prepared import Prepared
from luthier.engines.verbs import Batch, Computed, OutOfMemory, Trainee
from luthier.errors import OutOfMemoryError
from luthier.runs import events
from luthier.training.batches import Item, build_batch, read_item
from luthier.training.signals import StopFlag

Watch = Callable[[events.Event], None]
_WINDOW = 256
_TELL_SECONDS = 1.0


@dataclass(frozen=True)
class Passed:
    """Some examples, and what the model says of them."""

    items: list[Item]
    batch: Batch
    computed: Computed


@dataclass
class Pass:
    """How a process goes over examples: what it is for, how many tokens at once, its share, and who may stop it."""

    name: str
    budget_tokens: int
    share: tuple[int, int]
    stop: StopFlag
    watch: Watch

    def over(self, engine: Trainee, prepared: Prepared, examples: Iterable[int]) -> Iterator[Passed]:
        """This process's part of the examples; it ends early where it is asked to stop."""
        rank, count = self.share
        wanted = [int(example) for example in examples]
        told = time.monotonic()
        number = done = 0
        for start in range(0, len(wanted), _WINDOW):
            items = [read_item(prepared, example) for example in wanted[start : start + _WINDOW]]
            for places in lay_out_step([item.tokens for item in items], self.budget_tokens):
                if number % count == rank:
                    for passed in self._compute(engine, [items[place] for place in places]):
                        if self.stop:
                            return
                        yield passed
                number, done = number + 1, done + len(places)
                if time.monotonic() - told > _TELL_SECONDS:
                    told = time.monotonic()
                    self.watch(events.Working(self.name, done, len(wanted)))

    def _compute(self, engine: Trainee, items: list[Item]) -> Iterator[Passed]:
        """The model's word on some examples, in smaller parts where memory runs out."""
        waiting = [items]
        while waiting and not self.stop:
            group = waiting.pop()
            tokens = sum(item.tokens for item in group)
            if len(group) > 1 and tokens > self.budget_tokens:
                waiting += [group[len(group) // 2 :], group[: len(group) // 2]]
                continue
            batch = build_batch(group)
            try:
                computed = engine.forward(batch).result()
            except OutOfMemory as error:
                self._shrink(group, tokens, error)
                waiting.append(group)
                continue
            yield Passed(group, batch, computed)

    def _shrink(self, group: list[Item], tokens: int, error: OutOfMemory) -> None:
        if len(group) == 1:
            raise OutOfMemoryError(
                f"{self.name}: memory ran out with one row at once ({tokens:,} tokens): {error}",
                hint="lower data.max_length; `luthier plan` itemises the memory",
            )
        self.budget_tokens = max(1, tokens // 2)
        told = f"{self.name}: memory ran out, it goes on with {self.budget_tokens:,} tokens at once"
        self.watch(events.Warned("out_of_memory", told))
