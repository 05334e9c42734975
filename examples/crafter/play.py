"""Play held-out games with any agents and put them side by side.

An agent is `random`, `expert`, or a MODEL: `practice`, a run, an `ft:` id, a folder, a hub id. With --endpoint, models
are asked by name at an OpenAI-compatible address. Every agent plays the same games, whose seeds no row comes from.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from agents import Agent, Dice, Expert, Local, build_endpoint
from make_dataset import HELD_OUT_SEED
from pictures import draw_curves, draw_game
from prompts import Form
from scores import Scores, compare_all, render
from world import Game

from luthier.errors import CallError, LuthierError

_KEYS: dict[str, tuple[type, ...]] = {
    "model": (str, list),
    "against": (str, list),
    "games": (int,),
    "first_seed": (int,),
    "length": (int,),
    "temperature": (float, int),
    "rules": (bool,),
    "tools": (bool,),
    "endpoint": (str,),
}
_TOLD_EVERY_STEPS = 25


def play(agent: Agent, seeds: Sequence[int], length: int, *, quiet: bool = False) -> Scores:
    """Play one game of each seed, all of them side by side."""
    started = time.perf_counter()
    games = [Game(seed, length) for seed in seeds]
    step = 0
    while going := [game for game in games if not game.is_over]:
        for game, action in zip(going, agent.choose(going), strict=True):
            game.act(action)
        step += 1
        if not quiet and step % _TOLD_EVERY_STEPS == 0:
            reached = sum(len(game.reached) for game in games) / len(games)
            print(f"{agent.name}: step {step} of {length}, {reached:.2f} achievements a game", file=sys.stderr)
    return Scores(agent.name, [game.played() for game in games], time.perf_counter() - started)


def play_all(given: argparse.Namespace) -> list[Scores]:
    """Every agent's games, some agents at once; the result does not depend on how many."""
    if given.processes == 1 or len(given.agents) == 1:
        return [play_named(name, given) for name in given.agents]
    with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(partial(play_named, given=given), given.agents))


def play_named(name: str, given: argparse.Namespace) -> Scores:
    """The games of the agent of a name."""
    seeds = range(given.first_seed, given.first_seed + given.games)
    return play(build_agent(name, given), seeds, given.length, quiet=given.json)


def build_agent(name: str, given: argparse.Namespace) -> Agent:
    """The agent of a name."""
    if name == "random":
        return Dice()
    if name == "expert":
        return Expert()
    form = Form(given.rules, given.tools)
    if given.endpoint:
        return build_endpoint(given.endpoint, name, form, given.temperature)
    return Local(name, form, given.temperature)


def read_call(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for, by flags over what an evaluation TOML says; raises CallError."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "agents", nargs="*", metavar="AGENT", help="random, expert, or a MODEL; the first is compared to"
    )
    parser.add_argument("--config", type=Path, help="an evaluation TOML: " + ", ".join(_KEYS))
    parser.add_argument("--games", type=int, default=20, help="games of each agent (%(default)s)")
    parser.add_argument("--first-seed", type=int, default=HELD_OUT_SEED, help="seed of the first game (%(default)s)")
    parser.add_argument("--length", type=int, default=200, help="steps of a game (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the models' answers (%(default)s)")
    parser.add_argument("--rules", action="store_true", help="tell the rules, as rows made with --rules do")
    parser.add_argument("--tools", action="store_true", help="offer a tool, as rows made with --tools do")
    parser.add_argument("--endpoint", metavar="URL", help="ask the models there; the key is read from LUTHIER_API_KEY")
    parser.add_argument("--model", help="one more MODEL, or the name of the endpoint's")
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="draw all agents' curves, and the best game of the last one"
    )
    parser.add_argument("--processes", type=int, default=1, help="agents that play at once (%(default)s)")
    parser.add_argument("--at-least", type=float, help="exit with 1 where the last agent reaches fewer on average")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    first = parser.parse_args(arguments)
    agents: list[str] = []
    if first.config:
        settings = _read_config(first.config)
        agents = [*_names(settings.pop("against", [])), *_names(settings.pop("model", []))]
        parser.set_defaults(**settings)
    given = parser.parse_args(arguments)
    given.agents = [*agents, *given.agents, *([given.model] if given.model else [])]
    if not given.agents:
        raise CallError("nobody plays", hint="name agents: play.py random practice RUN")
    if min(given.games, given.length, given.processes) < 1:
        raise CallError("a game at least, a step, and a process", hint="--games 20 --length 200 --processes 1")
    if given.first_seed < HELD_OUT_SEED:
        print(f"note: games before seed {HELD_OUT_SEED:,} may have been made into rows", file=sys.stderr)
    return given


def _names(found: str | list[str]) -> list[str]:
    return [found] if isinstance(found, str) else found


def _read_config(path: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CallError(f"no evaluation at {path}", hint="examples/crafter/evaluation.toml is one") from None
    except tomllib.TOMLDecodeError as error:
        raise CallError(f"{path} is no TOML: {error}", hint="examples/crafter/evaluation.toml is one") from None
    if unknown := sorted(set(found) - set(_KEYS)):
        raise CallError(f"{path}: unknown key `{unknown[0]}`", hint=f"there are: {', '.join(_KEYS)}")
    for key, value in found.items():
        if type(value) not in _KEYS[key]:
            raise CallError(
                f"{path}: `{key}` is {value!r}", hint="examples/crafter/evaluation.toml shows what it may be"
            )
    return found


def run(arguments: Sequence[str] | None = None) -> int:
    """Play, and tell who reached what."""
    given = read_call(arguments)
    found = play_all(given)
    told = {
        "games": given.games,
        "first_seed": given.first_seed,
        "length": given.length,
        "agents": [each.as_dict() for each in found],
        "comparisons": [each.as_dict() for each in compare_all(found)],
    }
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(told, indent=2) + "\n", "utf-8")
    if given.json:
        print(json.dumps(told))
    else:
        print(f"{given.games} games of {given.length} steps, 95 % intervals; seeds from {given.first_seed:,}")
        print(render(found))
    if given.pictures:
        best = max(found[-1].games, key=lambda game: (len(game.reached), -game.seed))
        drawn = [
            *draw_game(best, given.pictures, "game"),
            draw_curves(found, given.length, given.pictures / "achievements.svg"),
        ]
        for path in drawn:
            print(f"drawn {path}", file=sys.stderr)
    is_enough = given.at_least is None or found[-1].mean_different.value >= given.at_least
    return 0 if is_enough else 1


def main() -> int:
    """Two lines a person can use where something is wrong."""
    try:
        return run()
    except LuthierError as error:
        print(f"error: {error}\nhint: {error.hint}" if error.hint else f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
