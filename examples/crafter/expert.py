"""A scripted player: the first rule that applies says what to do, from what the agent sees and remembers alone."""

from __future__ import annotations

from collections import deque

from world import STEPS, WALKABLE, Game, Spot

_WOOD_FOR_TABLE = 5
_TOOLS = {
    "wood_pickaxe": {"wood": 1},
    "wood_sword": {"wood": 1},
    "stone_pickaxe": {"wood": 1, "stone": 1},
    "stone_sword": {"wood": 1, "stone": 1},
}


def choose(game: Game) -> str:
    """The next action."""
    if game.is_asleep:
        return "sleep"
    for rule in (_fight, _plant, _make, _drink, _eat, _sleep, _gather_sapling, _lay_stone, _work):
        if action := rule(game):
            return action
    return _explore(game)


def _fight(game: Game) -> str | None:
    """Hit what is in front, or turn to what is at the side."""
    foes = ("zombie", "skeleton")
    if game.ahead() in foes:
        return "do"
    return next((f"move_{way}" for way in STEPS if game.ahead(way) in foes), None)


def _plant(game: Game) -> str | None:
    is_new = game.has["sapling"] and "place_plant" not in game.reached
    return "place_plant" if is_new and game.ahead() == "grass" else None


def _make(game: Game) -> str | None:
    """The next tool, where a table is near."""
    x, y = game.nearest("table") or (9, 9)
    if max(abs(x), abs(y)) > 1:
        return None
    has, done = game.has, game.reached
    for name, needs in _TOOLS.items():
        if f"make_{name}" not in done and all(has[part] >= count for part, count in needs.items()):
            return f"make_{name}"
    wants_furnace = "place_furnace" not in done and has["stone"] >= 4 and game.ahead() in WALKABLE
    return "place_furnace" if wants_furnace else None


def _drink(game: Game) -> str | None:
    left, is_here = game.has["drink"], game.ahead() == "water"
    return _go(game, "water") if left <= 5 or (left <= 8 and is_here) else None


def _eat(game: Game) -> str | None:
    left, is_here = game.has["food"], game.ahead() == "cow"
    is_first = "eat_cow" not in game.reached and _is_close(game, "cow", 4)
    return _go(game, "cow") if left <= 5 or (left <= 7 and is_here) or is_first else None


def _sleep(game: Game) -> str | None:
    is_tired = game.has["energy"] < (3 if "wake_up" in game.reached else 9)
    return "sleep" if is_tired and not _is_close(game, "zombie", 5) else None


def _gather_sapling(game: Game) -> str | None:
    return "do" if "collect_sapling" not in game.reached and game.ahead() == "grass" else None


def _lay_stone(game: Game) -> str | None:
    is_new = game.has["stone"] and "place_stone" not in game.reached
    return "place_stone" if is_new and game.ahead() in (*WALKABLE, "water") else None


def _work(game: Game) -> str | None:
    """What leads to the next tool."""
    has, done = game.has, game.reached
    if "make_wood_pickaxe" not in done or "make_wood_sword" not in done:
        return _work_in_wood(game)
    wants_tools = "make_stone_pickaxe" not in done or "make_stone_sword" not in done
    if has["wood"] < 2:
        return _go(game, "tree")
    if has["stone"] < (2 if wants_tools else 5):
        return _go(game, "stone")
    if wants_tools:
        can_place = game.ahead() in WALKABLE and has["wood"] >= 4
        return _go(game, "table") or ("place_table" if can_place else _go(game, "tree"))
    for ore in ("coal", "iron"):
        if f"collect_{ore}" not in done and (way := _go(game, ore)):
            return way
    return None


def _work_in_wood(game: Game) -> str | None:
    wood = game.has["wood"]
    if wood and game.nearest("table") is not None:
        return _go(game, "table")
    if wood >= _WOOD_FOR_TABLE:
        return "place_table" if game.ahead() in WALKABLE else _free_way(game)
    return _go(game, "tree")


def _is_close(game: Game, name: str, distance: int) -> bool:
    found = game.nearest(name)
    return found is not None and abs(found[0]) + abs(found[1]) <= distance


def _go(game: Game, name: str) -> str | None:
    """Use what is in front, or take the first step of the shortest known way to the nearest of its kind."""
    if game.ahead() == name:
        return "do" if name != "table" else None
    goals, known = game.places(name), game.seen
    if not goals:
        return None
    came: dict[Spot, str] = {game.spot: ""}
    left = deque([game.spot])
    while left:
        spot = left.popleft()
        for way, (dx, dy) in STEPS.items():
            after = (spot[0] + dx, spot[1] + dy)
            if after in came:
                continue
            first = came[spot] or way
            if after in goals:
                return f"move_{first}"
            if known.get(after) in WALKABLE:
                came[after] = first
                left.append(after)
    return None


def _free_way(game: Game) -> str:
    return next((f"move_{way}" for way in STEPS if game.ahead(way) in WALKABLE), "noop")


def _explore(game: Game) -> str:
    """Go on as before, and turn where the way ends."""
    last = next((each.removeprefix("move_") for each in reversed(game.did) if each.startswith("move_")), "right")
    order = {"right": "down", "down": "left", "left": "up", "up": "right"}
    for _ in range(4):
        if game.ahead(last) in WALKABLE:
            return f"move_{last}"
        last = order[last]
    return "noop"
