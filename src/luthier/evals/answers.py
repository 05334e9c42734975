"""One model asked and measured; what it said is remembered, so that a comparison that was stopped goes on."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import orjson

from luthier.engines.registry import load_sampler
from luthier.engines.verbs import SampleParams, Sampler, Tick
from luthier.evals.asked import Reading, Scored
from luthier.runs.lineage import base_facts, list_versions
from luthier.runs.manifest import write_durably
from luthier.runs.resolve import ResolvedModel

FOLDER = "answers"
_ASKED_AT_ONCE = 64
_SCORED_AT_ONCE = 256
_MOST_KEPT = 4096


class Remembered:
    """Results in LUTHIER_HOME, each under a hash of all that decides it."""

    def __init__(self, home: Path, *facts: Any) -> None:
        self._folder = home / FOLDER
        self._facts = facts

    def get(self, facts: Any, make: Callable[[], Any]) -> Any:
        """What is remembered, or what is made now."""
        key = hashlib.sha256(orjson.dumps([*self._facts, facts], option=orjson.OPT_SORT_KEYS)).hexdigest()
        path = self._folder / f"{key[:40]}.json"
        with suppress(OSError, ValueError, KeyError, TypeError):
            return orjson.loads(path.read_bytes())["found"]
        found = make()
        write_durably(path, orjson.dumps({"found": found}))
        return found

    def prune(self, most: int = _MOST_KEPT) -> None:
        """Forget the oldest, where there are very many."""
        paths = list(self._folder.glob("*.json"))
        if len(paths) > most:
            for path in sorted(paths, key=lambda path: path.stat().st_mtime)[: len(paths) - most]:
                path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Said:
    """What a model answered; cut answers had not ended when they were as long as they may be."""

    answers: list[str]
    is_cut: list[bool]


class Subject:
    """A model that is asked; it is loaded when something is not remembered."""

    def __init__(self, resolved: ResolvedModel, home: Path, engine: str | None = None) -> None:
        self.resolved = resolved
        self._home, self._engine = home, engine
        who = [base_facts(resolved)["hash"], _quantised(resolved), list_versions()]
        self._remembered = Remembered(home, *who, *([engine, resolved.name] if engine else []))

    @property
    def name(self) -> str:
        """By which the model was named."""
        return self.resolved.name

    @cached_property
    def _sampler(self) -> Sampler:
        return load_sampler(self.resolved, self._home, *([self._engine] if self._engine else []))

    def answer(self, reading: Reading, params: SampleParams, tick: Tick | None = None) -> Said:
        """What follows each prompt. A portion of prompts has a seed of its own, whoever is asked and from where on."""
        prompts = [each.ids for each in reading.asked if each.is_asked]
        drawn: list[list[int]] = []
        for start in range(0, len(prompts), _ASKED_AT_ONCE):
            portion = prompts[start : start + _ASKED_AT_ONCE]
            own = SampleParams(
                params.max_tokens,
                params.temperature,
                params.top_p,
                params.top_k,
                seed=params.seed * 1_000_003 + start,
                stop_tokens=reading.stops,
            )
            facts = {"prompts": portion, "params": [own.max_tokens, own.temperature, own.top_p, own.top_k, own.seed]}
            facts["stops"] = list(reading.stops)
            part = _part_of(tick, start, len(prompts)) if tick else None
            drawn += self._remembered.get(facts, partial(self._sample, portion, own, part))
            if tick:
                tick(len(drawn), len(prompts))
        return Said(reading.decode(drawn), [len(each) >= params.max_tokens for each in drawn])

    def score(self, texts: Sequence[Scored]) -> list[float]:
        """The log-probability of what counts of each text."""
        found: list[float] = []
        for start in range(0, len(texts), _SCORED_AT_ONCE):
            portion = texts[start : start + _SCORED_AT_ONCE]
            facts = {"texts": [[each.ids, _packed(each)] for each in portion]}
            found += self._remembered.get(facts, partial(self._score, portion))
        return found

    def _sample(self, prompts: list[list[int]], params: SampleParams, tick: Tick | None) -> list[list[int]]:
        return self._sampler.sample(prompts, params, tick)

    def _score(self, texts: Sequence[Scored]) -> list[float]:
        return self._sampler.score([each.ids for each in texts], [each.counted for each in texts])

    def forget(self) -> None:
        """Let go of the model."""
        sampler = self.__dict__.pop("_sampler", None)
        if hasattr(sampler, "close"):  # one that a service answers for holds a session there
            sampler.close()
        if sampler is not None:
            del sampler
            gc.collect()  # a model's parts know one another, and the next one needs the room
        self._remembered.prune()


def _part_of(tick: Tick, start: int, total: int) -> Tick:
    """Hears of a portion's prompts, and tells of all; the last of a portion is told once it is remembered."""
    return lambda done, count: tick(start + done, total) if done < count else None


def _packed(text: Scored) -> str:
    return bytes(text.counted).hex()


def _quantised(resolved: ResolvedModel) -> list[Any]:
    return [[each.quantised, each.double_quant] for each in resolved.adapters]
