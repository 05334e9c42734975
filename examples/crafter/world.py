"""Crafter as short text: what an agent sees, has and did, in at most 200 tokens, and actions by name.

The agent sees what the game's own picture shows (nine columns, seven rows) and remembers where it saw what.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from crafter import constants, objects
from environment import Environment, Picture

ACTIONS: tuple[str, ...] = tuple(constants.actions)
ACHIEVEMENTS: tuple[str, ...] = tuple(constants.achievements)
BRIEF = "You play Crafter. Answer with one action."
RULES = f"""You play Crafter: survive, and reach as many different achievements as you can.
Actions: {", ".join(ACTIONS)}.
`do` uses what you face: it cuts, mines, drinks, eats and hits. Trees give wood; a table takes wood and stands where you
face; tools are made beside it; stone wants a wood pickaxe, iron a stone one. Sleep when energy is low.
Answer with one action and nothing else."""
SIGHT = (4, 3)
"""Columns and rows seen to each side."""
WALKABLE = ("grass", "sand", "path")
TOLD = (
    *("tree", "water", "cow", "stone", "table", "zombie", "skeleton"),
    *("coal", "iron", "diamond", "furnace", "plant", "lava"),
)
"""What is worth telling where it is near, the most useful first; everything else is ground."""
MOST_TOLD = 8
MOST_THINGS = 12
"""Things near and in the bag together, so that an observation stays short."""
FAR = 24
"""Beyond so many steps nothing is told."""
MATERIALS = ("sapling", "wood", "stone", "coal", "iron", "diamond")
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
DONE = {
    "place_plant": "plant",
    "eat_cow": "cow",
    "wake_up": "sleep",
    "collect_drink": "drink",
    "place_table": "table",
    "place_stone": "stone",
    "place_furnace": "furnace",
}
"""Achievements that the bag does not show, in a word each."""
_CREATURES = {objects.Cow: "cow", objects.Zombie: "zombie", objects.Skeleton: "skeleton", objects.Plant: "plant"}
_MOVING = ("cow", "zombie", "skeleton")
_VITAL = ("health", "food", "drink", "energy")

Spot = tuple[int, int]


@dataclass(frozen=True)
class Played:
    """What is left of a game: enough to score it, and to play it once more."""

    seed: int
    length: int
    actions: tuple[str, ...]
    reached: tuple[str, ...]
    when: tuple[int, ...]
    """The step in which each achievement was reached."""
    total: float
    unknown: int
    """Steps in which what was said is no action."""


@dataclass
class Game:
    """One game: its world, what the agent remembers, and what it has reached."""

    seed: int
    length: int = 200
    did: deque[str] = field(default_factory=lambda: deque(maxlen=3))
    seen: dict[Spot, str] = field(default_factory=dict)
    actions: list[str] = field(default_factory=list)
    reached: list[str] = field(default_factory=list)
    when: list[int] = field(default_factory=list)
    total: float = 0.0
    unknown: int = 0
    is_over: bool = False

    def __post_init__(self) -> None:
        self._env = Environment(self.seed, self.length)
        self._env.reset()
        self._places: dict[str, set[Spot]] = {name: set() for name in TOLD}
        self._look()

    @property
    def player(self) -> Any:
        return self._env._player

    @property
    def spot(self) -> Spot:
        x, y = self.player.pos
        return int(x), int(y)

    @property
    def has(self) -> dict[str, int]:
        """The inventory, and health, food, drink and energy among it."""
        found: dict[str, int] = self.player.inventory
        return found

    @property
    def is_asleep(self) -> bool:
        return bool(self.player.sleeping)

    def act(self, action: str) -> None:
        """Take a step; what is no action of the game is a step spent doing nothing."""
        known = action if action in ACTIONS else "noop"
        _, reward, self.is_over, info = self._env.step(ACTIONS.index(known))
        self.unknown += action != known
        self.did.append(known if action == known else "nothing")
        self.actions.append(known)
        self.total += float(reward)
        new = [name for name, count in info["achievements"].items() if count and name not in self.reached]
        self.reached += new
        self.when += [len(self.actions)] * len(new)
        self._look()

    def played(self) -> Played:
        """The game as it went so far."""
        done = tuple(self.actions), tuple(self.reached), tuple(self.when)
        return Played(self.seed, self.length, *done, self.total, self.unknown)

    def picture(self) -> Picture:
        """What the game shows a person now."""
        return self._env.picture()

    def at(self, spot: Spot) -> str:
        """What lies at a place, creatures before the ground they stand on."""
        world = self._env._world
        x, y = spot
        if not (0 <= x < world.area[0] and 0 <= y < world.area[1]):
            return "edge"
        if (number := world._obj_map[spot]) and (name := _CREATURES.get(type(world._objects[number]))):
            return name
        return world._mat_names[int(world._mat_map[spot])] or "dark"

    def ahead(self, way: str | None = None) -> str:
        """What lies in a direction; the one that the agent faces where none is named."""
        dx, dy = STEPS[way] if way else self.player.facing
        x, y = self.spot
        return self.at((x + int(dx), y + int(dy)))

    def places(self, name: str) -> set[Spot]:
        """Where one of its kind is or was seen."""
        return self._places[name]

    def nearest(self, name: str) -> Spot | None:
        """The nearest place where one of its kind is or was seen, from the agent."""
        if not (places := self._places[name]):
            return None
        x, y = self.spot
        best, at = sum(self._env._world.area), (0, 0)
        for a, b in places:
            distance = abs(a - x) + abs(b - y)
            if distance < best or (distance == best and (a, b) < at):
                best, at = distance, (a, b)
        return at[0] - x, at[1] - y

    def _look(self) -> None:
        for name in _MOVING:
            for spot in self._places[name]:
                del self.seen[spot]
            self._places[name].clear()
        x, y = self.spot
        for spot in [
            (x + dx, y + dy) for dx in range(-SIGHT[0], SIGHT[0] + 1) for dy in range(-SIGHT[1], SIGHT[1] + 1)
        ]:
            if spot != (x, y):
                self._remember(spot, self.at(spot))
        self._remember((x, y), "")

    def _remember(self, spot: Spot, name: str) -> None:
        before = self.seen.get(spot, "")
        if before == name:
            return
        if before in self._places:
            self._places[before].discard(spot)
        if name in self._places:
            self._places[name].add(spot)
        if name:
            self.seen[spot] = name

    def describe(self) -> str:
        """The observation."""
        state = " ".join(f"{name} {self.has[name]}" for name in _VITAL)
        lines = [
            f"asleep {state}" if self.is_asleep else state,
            ", ".join(self._beside()),
            "near " + (", ".join(self._near()) or "nothing"),
            "have " + (", ".join(self._bag()) or "nothing"),
            "done " + (" ".join(word for name, word in DONE.items() if name in self.reached) or "nothing"),
            "did " + (" ".join(name.removeprefix("move_") for name in self.did) or "nothing"),
        ]
        return "\n".join(lines).replace("_", " ")

    def _beside(self) -> list[str]:
        """What the agent faces, and what bars the other ways."""
        facing = tuple(int(each) for each in self.player.facing)
        faced = next(way for way, step in STEPS.items() if step == facing)
        around = [(way, self.ahead(way)) for way in STEPS if way != faced]
        return [f"face {faced} {self.ahead()}", *(f"{way} {name}" for way, name in around if name not in WALKABLE)]

    def _near(self) -> list[str]:
        """The most useful kinds that are known of, each at its nearest; what is beside the agent is told already."""
        found = [(name, at) for name in TOLD if (at := self.nearest(name)) and 1 < abs(at[0]) + abs(at[1]) <= FAR]
        most = min(MOST_TOLD, MOST_THINGS - len(self._bag()))
        return [f"{name} {_offset(at)}" for name, at in found[:most]]

    def _bag(self) -> list[str]:
        """Materials with their counts, and tools by what they are made of."""
        has = self.has
        found = [f"{name} {has[name]}" for name in MATERIALS if has[name]]
        for tool in ("pickaxe", "sword"):
            if kinds := [kind for kind in ("wood", "stone", "iron") if has[f"{kind}_{tool}"]]:
                found.append(f"{tool} {' '.join(kinds)}")
        return found


def _offset(found: Spot) -> str:
    dx, dy = found
    parts = [f"{'left' if dx < 0 else 'right'} {abs(dx)}"] if dx else []
    parts += [f"{'up' if dy < 0 else 'down'} {abs(dy)}"] if dy else []
    return " ".join(parts)
