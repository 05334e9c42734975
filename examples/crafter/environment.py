"""The game itself: Crafter by its own rules, without pictures unless asked for, and the same game from the same seed.

Crafter keeps the creatures of a region in a set, whose order changes from one process to the next, and draws the noise
of its night pictures from the game's own dice. Here regions are put in order, and a picture leaves the dice alone.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import crafter
import numpy as np
import numpy.typing as npt
from crafter import objects, worldgen
from opensimplex import internals

Picture = npt.NDArray[np.uint8]
PICTURE_SIZE = 288


class Environment(crafter.Env):  # type: ignore[misc]
    """Crafter's environment, which is stepped without drawing anything."""

    def __init__(self, seed: int, length: int) -> None:
        super().__init__(seed=seed, length=length, size=(PICTURE_SIZE, PICTURE_SIZE))
        self._sem_view = lambda: None

    def reset(self) -> None:
        """Begin the game of this seed; it is always the same one."""
        world = self._world
        world.reset(seed=(self._seed * 2_654_435_761 + 1) % (2**31 - 1))
        self._step = 0
        self._update_time()
        self._player = objects.Player(world, (world.area[0] // 2, world.area[1] // 2))
        self._last_health = self._player.health
        world.add(self._player)
        self._unlocked: set[str] = set()
        _generate(world, self._player)

    def picture(self) -> Picture:
        """What the game shows a person."""
        dice = self._world.random
        state = dice.get_state()
        drawn: Picture = self.render()
        dice.set_state(state)
        return drawn

    def _obs(self) -> None:
        return None

    def _balance_object(self, chunk: Any, objs: Any, *rules: Any) -> None:
        super()._balance_object(chunk, sorted(objs, key=_place), *rules)


def _place(thing: Any) -> tuple[int, int]:
    return int(thing.pos[0]), int(thing.pos[1])


_PLAIN = {**vars(internals), "GRADIENTS3": internals.GRADIENTS3.tolist()}
"""What the noise is computed with. Python reads lists several times as fast as arrays, one number at a time."""
for _name in ("_extrapolate3", "_noise3"):
    _function = getattr(internals, _name)
    _PLAIN[_name] = FunctionType(getattr(_function, "py_func", _function).__code__, _PLAIN)


class _Noise:
    """The noise that worlds are made of, number for number that of opensimplex."""

    def __init__(self, seed: int) -> None:
        self._tables = [table.tolist() for table in internals._init(seed)]

    def noise3(self, x: float, y: float, z: float) -> float:
        """The noise at a place."""
        found: float = _PLAIN["_noise3"](x, y, z, *self._tables)
        return found


def _generate(world: Any, player: Any) -> None:
    """The world as Crafter makes it."""
    noise = _Noise(world.random.randint(0, 2**31 - 1))
    tunnels = np.zeros(world.area, bool)
    places = [(x, y) for x in range(world.area[0]) for y in range(world.area[1])]
    for place in places:
        worldgen._set_material(world, place, player, tunnels, noise)
    for place in places:
        worldgen._set_object(world, place, player, tunnels)
