"""What one process holds: a base model, the thread that computes with it, and those for whom it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from luthier.engines.chat import Prompter
from luthier.engines.registry import load_decoder
from luthier.errors import CallError
from luthier.host.answering import Answer, Answering
from luthier.host.ask import Ask, Said
from luthier.host.computing import Computing
from luthier.host.sampling import Sampling
from luthier.host.streams import Streams
from luthier.host.training import KINDS as TRAINED
from luthier.host.training import Training
from luthier.host.work import Done, Work
from luthier.runs.home import luthier_home
from luthier.runs.resolve import AdapterRef, ResolvedModel


@dataclass(frozen=True)
class Room:
    """Chat answers, samples of tokens and models in training over one base; called from any thread."""

    computing: Computing
    answering: Answering
    sampling: Sampling
    training: Training

    def ask(self, ask: Ask, hear: Callable[[Said], None]) -> Answer:
        """Begin an answer; raises CallError where it cannot be asked so."""
        return self.answering.ask(ask, hear)

    def submit(self, work: Work, hear: Callable[[Done], None]) -> None:
        """Begin a work; `hear` is told once what became of it."""
        if work.kind in TRAINED:
            self.training.submit(work, hear)
        elif work.kind == "sample":
            self.sampling.submit(work, hear)
        elif work.kind == "cancel":
            self.sampling.cancel(int(work.facts.get("of", 0)), hear)
            hear(Done(work.id))
        else:
            hear(Done(work.id, error=CallError(f"no work of the kind `{work.kind}` is known here").as_dict()))

    def leave(self, hear: Callable[[Done], None], models: Iterable[str]) -> None:
        """A connection ended, and with it the models that it opened."""
        self.sampling.leave(hear)
        for model in models:
            self.training.submit(Work(0, "drop", model), lambda _: None)

    def close(self) -> None:
        """End after the piece that is computed."""
        self.computing.close()
        self.training.close()


def open_room(resolved: ResolvedModel, *, over: AdapterRef | None = None, precision: str = "auto") -> Room:
    """Load the model, and begin to compute."""
    decoder = load_decoder(resolved, luthier_home(), over=over, precision=precision)
    prompter, computing = Prompter(resolved.folder), Computing()
    streams = Streams(decoder, computing.wake)
    training = Training(decoder.tenants(), computing.wake, longest=prompter.room)
    computing.start(streams, training)
    return Room(
        computing,
        Answering(streams, prompter),
        Sampling(streams, prompter, vocabulary=decoder.tenants().vocabulary),
        training,
    )
