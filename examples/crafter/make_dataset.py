"""Play Crafter with the scripted expert on many seeds, and write what it saw and did as chat rows.

Games are parted by their seeds, so that no game is on both sides. Every step played is accounted for.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from expert import choose
from prompts import Form
from world import Game

HELD_OUT_SEED = 1_000_000
"""Games from this seed on are never made into rows: they are played to see how good an agent is."""
_SHUFFLE = 7
_SLIPS = ("noop", "do", "do", "sleep", "move_left", "move_right", "move_up", "move_down")
_LONGEST_SLIP = 4
_LEFT_OUT = ("steps_of_games_below_min_achievements", "steps_asleep", "steps_seen_before", "steps_thinned_out")


@dataclass(frozen=True)
class Step:
    """What the expert saw, and what it did."""

    seed: int
    number: int
    observation: str
    action: str
    is_asleep: bool = False
    """Whoever sleeps sleeps on whatever they answer, so there is nothing to learn."""


@dataclass(frozen=True)
class Trace:
    """One game of the expert."""

    seed: int
    reached: tuple[str, ...]
    steps: tuple[Step, ...]


def play_game(seed: int, length: int, noise: float) -> Trace:
    """One game, played by the expert from its beginning to its end.

    Now and then the hand slips for a few steps, and something else is done than what the expert chose. The rows say
    what it chose: so there are rows of how to go on after a mistake, and what was done before does not foretell what
    is right, as it would for a player that never errs.
    """
    game = Game(seed, length)
    dice = random.Random(seed)
    steps: list[Step] = []
    slips: list[str] = []
    while not game.is_over:
        observation, action = game.describe(), choose(game)
        steps.append(Step(seed, len(steps), observation, action, game.is_asleep))
        if not slips and dice.random() < noise:
            slips = [dice.choice(_SLIPS)] * dice.randint(1, _LONGEST_SLIP)
        game.act(slips.pop() if slips else action)
    return Trace(seed, tuple(game.reached), tuple(steps))


def play_games(seeds: range, length: int, noise: float, processes: int) -> list[Trace]:
    """Many games, some of them at once; the result does not depend on how many."""
    if processes == 1:
        return [play_game(seed, length, noise) for seed in seeds]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(partial(play_game, length=length, noise=noise), seeds, chunksize=4))


def thin_out(steps: list[Step], most: int) -> list[Step]:
    """At most so many steps: rare actions are kept whole, frequent ones give way until all fit."""
    if len(steps) <= most:
        return steps
    counts = Counter(step.action for step in steps)
    left, room = len(counts), most
    quota: dict[str, int] = {}
    for action, count in sorted(counts.items(), key=lambda item: (item[1], item[0])):
        quota[action] = min(count, room // left)
        room, left = room - quota[action], left - 1
    shuffled = random.Random(_SHUFFLE).sample(steps, len(steps))
    kept = []
    for step in shuffled:
        if quota[step.action] > 0:
            quota[step.action] -= 1
            kept.append(step)
    return sorted(kept, key=lambda step: (step.seed, step.number))


def drop_repeats(steps: list[Step]) -> list[Step]:
    """The first of each observation and action; Luthier would drop the others by name."""
    return list({(step.observation, step.action): step for step in reversed(steps)}.values())[::-1]


@dataclass(frozen=True)
class Options:
    """Which games become rows."""

    games: int
    length: int
    min_achievements: int
    max_examples: int
    valid_share: float
    form: Form


def part_games(seeds: range, share: float) -> set[int]:
    """The seeds whose games are held out: every so manieth, so that an added game moves no other."""
    every = round(1 / share) if share else 0
    return {seed for seed in seeds if every and seed % every == every - 1}


def make_rows(traces: list[Trace], options: Options) -> tuple[dict[str, list[Step]], dict[str, Any]]:
    """The steps of each side, and an account in which every step played is in one place."""
    good = [trace for trace in traces if len(trace.reached) >= options.min_achievements]
    held_out = part_games(range(options.games), options.valid_share)
    steps = [step for trace in good for step in trace.steps]
    awake = [step for step in steps if not step.is_asleep]
    unique = drop_repeats(awake)
    kept = thin_out(unique, options.max_examples) if options.max_examples else unique
    sides = {
        "train": [step for step in kept if step.seed not in held_out],
        "valid": [step for step in kept if step.seed in held_out],
    }
    account: dict[str, Any] = {
        "games": len(traces),
        "games_below_min_achievements": len(traces) - len(good),
        "mean_achievements_of_kept_games": sum(len(trace.reached) for trace in good) / max(1, len(good)),
        "steps": sum(len(trace.steps) for trace in traces),
        "steps_of_games_below_min_achievements": sum(len(trace.steps) for trace in traces) - len(steps),
        "steps_asleep": len(steps) - len(awake),
        "steps_seen_before": len(awake) - len(unique),
        "steps_thinned_out": len(unique) - len(kept),
        "train": len(sides["train"]),
        "valid": len(sides["valid"]),
        "actions": dict(Counter(step.action for step in kept).most_common()),
        "actions_before_thinning": dict(Counter(step.action for step in unique).most_common()),
    }
    places = (*_LEFT_OUT, "train", "valid")
    assert account["steps"] == sum(account[place] for place in places), "a step is in no place or in two"
    return sides, account


def write_rows(path: Path, steps: list[Step], form: Form) -> None:
    """A chat row a line; the seed of its game stands beside it, for `data.group_by`."""
    with path.open("w", encoding="utf-8") as file:
        for step in steps:
            row = {**form.row(step.observation, step.action), "seed": step.seed, "step": step.number}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> int:
    """Play, choose, write, and tell what became of every step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--games", type=int, default=220, help="games to play, of the seeds 0, 1, 2, ... (%(default)s)")
    parser.add_argument("--length", type=int, default=200, help="steps of a game (%(default)s)")
    parser.add_argument("--noise", type=float, default=0.08, help="how often the hand slips (%(default)s)")
    parser.add_argument("--min-achievements", type=int, default=10, help="games with fewer are left out (%(default)s)")
    parser.add_argument(
        "--max-examples",
        type=int,
        default=10000,
        help="rows in all; frequent actions give way; 0 for no limit (%(default)s)",
    )
    parser.add_argument("--valid", type=float, default=0.05, help="share of the games held out (%(default)s)")
    parser.add_argument("--tools", action="store_true", help="answers as calls of a tool instead of plain names")
    parser.add_argument(
        "--rules", action="store_true", help="tell the rules and actions in each row, for larger models"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("build/crafter"))
    given = parser.parse_args()
    if not 0 < given.games <= HELD_OUT_SEED:
        parser.error(f"--games must be from 1 to {HELD_OUT_SEED:,}; games from there on are for playing")
    form = Form(given.rules, given.tools)
    options = Options(given.games, given.length, given.min_achievements, given.max_examples, given.valid, form)
    traces = play_games(range(given.games), given.length, given.noise, given.processes)
    sides, account = make_rows(traces, options)
    given.out.mkdir(parents=True, exist_ok=True)
    for side, steps in sides.items():
        write_rows(given.out / f"{side}.jsonl", steps, form)
    (given.out / "dataset.json").write_text(json.dumps(account, indent=2) + "\n", "utf-8")
    print(render_account(account, given.out))
    return 0 if sides["train"] else 1


def render_account(account: dict[str, Any], out: Path) -> str:
    """The account for a person."""
    lines = [
        f"{account['games']} games played, {account['steps']:,} steps; kept games reach "
        f"{account['mean_achievements_of_kept_games']:.1f} achievements on average",
    ]
    for name in ("train", "valid"):
        lines.append(f"  {name + '.jsonl':<44} {account[name]:>8,}")
    for name in _LEFT_OUT:
        lines.append(f"  {name.replace('_', ' '):<44} {account[name]:>8,}")
    lines.append(f"  every step is in one place                   {account['steps']:>8,}")
    lines.append("actions of the rows (as played)")
    for name, count in account["actions"].items():
        lines.append(f"  {name:<20} {count:>7,}  ({account['actions_before_thinning'][name]:,})")
    return "\n".join([*lines, f"written to {out}/"])


if __name__ == "__main__":
    raise SystemExit(main())
