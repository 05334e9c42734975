"""What games came to: success rate of each achievement, Crafter score, return, achievements a game, with intervals."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from world import ACHIEVEMENTS, Played

from luthier.evals.exact_match import wilson_interval
from luthier.evals.statistics import RESAMPLES, Difference, compare_means, draw_rows

Floats = npt.NDArray[np.float64]
_TAILS = (2.5, 97.5)
_METHOD_OF_RUN = re.compile(r"^(full|lora|qlora)_.+$")


@dataclass(frozen=True)
class Number:
    """A number, and where it lies with 95 % confidence over all such games."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """For `--json`."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Scores:
    """One agent's games; the same seeds in the same order for every agent that it stands beside."""

    name: str
    games: Sequence[Played]
    seconds: float = 0.0

    @cached_property
    def _reached(self) -> Floats:
        return np.array([[name in game.reached for name in ACHIEVEMENTS] for game in self.games], float)

    @cached_property
    def different(self) -> Floats:
        """Different achievements of each game."""
        return np.asarray(self._reached.sum(1))

    @cached_property
    def returns(self) -> Floats:
        """The return of each game."""
        return np.array([game.total for game in self.games])

    @property
    def mean_different(self) -> Number:
        """Different achievements a game."""
        return self._number(self.different[:, None], lambda means: means[..., 0])

    @property
    def mean_return(self) -> Number:
        """Return a game."""
        return self._number(self.returns[:, None], lambda means: means[..., 0])

    @property
    def score(self) -> Number:
        """The Crafter score: the geometric mean of the success rates in percent, each plus one, less one."""
        return self._number(self._reached, lambda rates: np.expm1(np.log1p(rates * 100).mean(-1)))

    @property
    def rates(self) -> dict[str, Number]:
        """The share of games that reach each achievement."""
        count = len(self.games)
        rights = {name: int(hits) for name, hits in zip(ACHIEVEMENTS, self._reached.sum(0), strict=True)}
        return {name: Number(right / count, *wilson_interval(right, count)) for name, right in rights.items()}

    @property
    def unknown_share(self) -> float:
        """The share of steps in which what was said is no action."""
        return sum(game.unknown for game in self.games) / max(1, sum(len(game.actions) for game in self.games))

    def curve(self, length: int) -> Floats:
        """Rows of a step, and the different achievements a game had by then on average."""
        steps = np.arange(length + 1)
        when = np.sort(np.concatenate([np.array(game.when, int) for game in self.games]))
        return np.column_stack([steps, np.searchsorted(when, steps, side="right") / len(self.games)])

    def _number(self, values: Floats, statistic: Callable[[Floats], Floats]) -> Number:
        drawn = draw_rows(len(values), range(RESAMPLES), 0)
        low, high = np.percentile(statistic(values[drawn].mean(1)), _TAILS)
        return Number(float(statistic(values.mean(0))), float(low), float(high))

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "name": self.name,
            "games": len(self.games),
            "different": self.mean_different.as_dict(),
            "return": self.mean_return.as_dict(),
            "score": self.score.as_dict(),
            "achievements": {name: rate.as_dict() for name, rate in self.rates.items()},
            "unknown_share": self.unknown_share,
            "different_of_each_game": self.different.tolist(),
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Comparison:
    """An agent beside another one in the same games, by different achievements a game."""

    agent: Scores
    against: Scores

    @cached_property
    def gain(self) -> Difference:
        """What it reaches more, with a paired interval."""
        return compare_means(self.against.different, self.agent.different)

    @property
    def is_within(self) -> bool:
        """Whether its mean lies within the interval of the other's."""
        other = self.against.mean_different
        return other.low <= self.agent.mean_different.value <= other.high

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        names = {"agent": self.agent.name, "against": self.against.name}
        return {**names, **self.gain.as_dict(), "is_within_interval": self.is_within}


def compare_all(found: Sequence[Scores]) -> list[Comparison]:
    """Each agent beside the first, and the last one beside the one before it."""
    made = [Comparison(each, found[0]) for each in found[1:]]
    return [*made, Comparison(found[-1], found[-2])] if len(found) > 2 else made


def render(found: Sequence[Scores]) -> str:
    """A table for a person: an agent a column, and what the last ones gain over the first."""
    names = short_names([each.name for each in found])
    width = max(25, *(len(name) + 2 for name in names))
    lines = ["  ".join(["", " " * 20, *(name.rjust(width) for name in names)])]

    def add(title: str, cells: Sequence[str]) -> None:
        lines.append("  ".join(["", title.ljust(20), *(cell.rjust(width) for cell in cells)]))

    add("different a game", [str(each.mean_different) for each in found])
    add("Crafter score in %", [str(each.score) for each in found])
    add("return a game", [str(each.mean_return) for each in found])
    add("no action said", [f"{each.unknown_share:.1%}" for each in found])
    for name in ACHIEVEMENTS:
        rates = [each.rates[name] for each in found]
        if any(rate.value for rate in rates):
            add(name.replace("_", " "), [f"{rate.value:.0%} ({rate.low:.0%} to {rate.high:.0%})" for rate in rates])
    never = [name.replace("_", " ") for name in ACHIEVEMENTS if not any(each.rates[name].value for each in found)]
    lines.append(f"  nobody reaches: {', '.join(never)}" if never else "  every achievement is reached by somebody")
    called = dict(zip([each.name for each in found], names, strict=True))
    made = compare_all(found)
    lines += [_say(each, called) for each in made]
    if len(found) > 2:
        other = made[-1].against.mean_different
        where = "within" if made[-1].is_within else "outside of"
        lines.append(
            f"  {names[-1]} lies with {found[-1].mean_different.value:.2f} {where} the interval of {names[-2]}, "
            f"{other.low:.2f} to {other.high:.2f}"
        )
    return "\n".join(lines)


def _say(made: Comparison, called: dict[str, str]) -> str:
    gain = made.gain
    shown = f"{gain.difference:+.2f} ({gain.low:+.2f} to {gain.high:+.2f})"
    agent, against = called[made.agent.name], called[made.against.name]
    return f"  {agent} against {against}: {shown} different achievements a game: {gain.change}"


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of long names, and the method alone of a run's, as long as they stay different."""
    short = [name.rstrip("/").rpartition("/")[2].rpartition(":")[2] for name in names]
    shorter = [_METHOD_OF_RUN.sub(r"\1", name) for name in short]
    return next((found for found in (shorter, short) if len(set(found)) == len(names)), list(names))
