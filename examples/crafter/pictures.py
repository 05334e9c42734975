"""Games for the eye: what each agent has reached by each step, the moments of one game, and a short animation of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from scores import Scores, short_names
from world import Game, Played

from luthier.reports.drawing import Chart, Series, draw_file
from luthier.reports.scale import linear_axis

_MOST_MOMENTS = 8
_STRIP_SIZE = 160
_CAPTION = 22
_GIF_SIZE = 126
_GIF_FRAMES = 48
_GIF_COLOURS = 24
_FRAME_MILLISECONDS = 120


def draw_game(game: Played, folder: Path, name: str) -> list[Path]:
    """Play the game's actions once more, and write `NAME.png` and `NAME.gif`."""
    again = Game(game.seed, game.length)
    frames, moments = [_frame(again)], [(0, "start")]
    for number, action in enumerate(game.actions, 1):
        before = len(again.reached)
        again.act(action)
        frames.append(_frame(again))
        moments += [(number, reached) for reached in again.reached[before:]]
    if tuple(again.reached) != game.reached:
        raise RuntimeError("a game played again came out differently")
    folder.mkdir(parents=True, exist_ok=True)
    strip, animation = folder / f"{name}.png", folder / f"{name}.gif"
    _strip(frames, moments[:_MOST_MOMENTS]).save(strip, optimize=True)
    _animate(frames, moments[-1][0], animation)
    return [strip, animation]


def draw_curves(found: Sequence[Scores], length: int, path: Path) -> Path:
    """Different achievements by step, a curve for each agent."""
    curves = [each.curve(length) for each in found]
    names = short_names([each.name for each in found])
    chart = Chart(
        "achievements",
        "Different achievements a game",
        f"Mean over {len(found[0].games)} held-out games",
        "step",
        linear_axis(0, length, whole=True),
        linear_axis(0, max(float(curve[-1, 1]) for curve in curves), from_zero=True),
        tuple(Series(name, curve, number) for number, (name, curve) in enumerate(zip(names, curves, strict=True), 1)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(draw_file(chart), "utf-8")
    return path


def _frame(game: Game) -> Any:
    return Image.fromarray(game.picture())


def _strip(frames: list[Any], moments: list[tuple[int, str]]) -> Any:
    """Pictures side by side, two rows of them where there are many, each with what was reached."""
    columns = (len(moments) + 1) // 2 if len(moments) > 4 else len(moments)
    rows = -(-len(moments) // columns)
    sheet = Image.new("RGB", (columns * _STRIP_SIZE, rows * (_STRIP_SIZE + _CAPTION)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (number, reached) in enumerate(moments):
        x, y = place % columns * _STRIP_SIZE, place // columns * (_STRIP_SIZE + _CAPTION)
        sheet.paste(frames[number].resize((_STRIP_SIZE - 4, _STRIP_SIZE - 4)), (x + 2, y + 2))
        pen.text((x + 4, y + _STRIP_SIZE + 3), f"{number}: {reached.replace('_', ' ')}", fill="black")
    return sheet.quantize(128)


def _animate(frames: list[Any], last: int, path: Path) -> None:
    """The game up to a little after the last thing that was reached, in few enough pictures to be small."""
    shown = frames[: last + 6]
    every = -(-len(shown) // _GIF_FRAMES)
    small = [frame.resize((_GIF_SIZE, _GIF_SIZE)).quantize(_GIF_COLOURS, dither=0) for frame in shown[::every]]
    small[0].save(path, save_all=True, append_images=small[1:], duration=_FRAME_MILLISECONDS, loop=0, optimize=True)
