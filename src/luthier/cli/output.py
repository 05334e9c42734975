"""Everything a command says: results on stdout, one JSON object where asked; progress and warnings on stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
import orjson

from luthier.errors import LuthierError


class Command(click.Command):
    """A command of ours: each takes `--json`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if not any(parameter.name == "as_json" for parameter in self.params):
            self.params.append(
                click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object on stdout.")
            )


class Group(click.Group):
    """A group of such commands."""

    command_class = Command


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether the call asked for JSON, as far as one can tell when the call itself failed."""
    return "--json" in arguments


def print_json(value: object) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS).decode() + "\n")


def say(text: str = "", end: str = "\n") -> None:
    """A line of the result, on stdout."""
    sys.stdout.write(text + end)


def warn(text: str) -> None:
    """A line beside the result, on stderr."""
    sys.stderr.write(f"{_paint('warning:', '33', sys.stderr)} {text}\n")


def print_error(error: LuthierError, *, as_json: bool) -> None:
    """The error and the way on: two lines on stderr, or the one JSON object on stdout."""
    if as_json:
        print_json({"error": error.as_dict()})
        return
    sys.stderr.write(f"{_paint('error:', '31', sys.stderr)} {error.message}\n")
    if error.hint:
        sys.stderr.write(f"{_paint('hint:', '36', sys.stderr)} {error.hint}\n")


def has_colour(stream: Any = None) -> bool:
    """Colour on a terminal, unless NO_COLOR says otherwise."""
    return not os.environ.get("NO_COLOR") and bool((stream or sys.stdout).isatty())


def _paint(text: str, code: str, stream: Any) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if has_colour(stream) else text


def paint(text: str, code: str) -> str:
    """Text in a colour (an ANSI code) where stdout shows it."""
    return _paint(text, code, sys.stdout)


def print_table(rows: Sequence[tuple[str, ...]], *, right: tuple[int, ...] = (), indent: str = "  ") -> None:
    """Rows in columns; those listed in `right` are aligned to the right."""
    if not rows:
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        say(indent + "  ".join(cells).rstrip())


class LiveLine:
    """A line on stderr that is written over; elsewhere than on a terminal, one of its texts every few seconds."""

    def __init__(self, *, plain_seconds: float) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._plain_seconds = plain_seconds
        self._shown = 0.0
        self._is_drawn = False

    def show(self, text: str, *, keep: bool) -> None:
        """Show the text in place of the one before; `keep` leaves it standing."""
        now = time.monotonic()
        if self._is_terminal:
            sys.stderr.write(f"\r\x1b[K{text}" + ("\n" if keep else ""))
            self._is_drawn = not keep
        elif keep or now - self._shown >= self._plain_seconds:
            sys.stderr.write(text + "\n")
            self._shown = now
        sys.stderr.flush()

    def clear(self) -> None:
        """Take away what is drawn."""
        if self._is_drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._is_drawn = False


@contextmanager
def progress_bar(label: str, *, quiet: bool = False) -> Iterator[Callable[[int, int, int], None] | None]:
    """A callback (rows, bytes, bytes in all) that shows progress once it lasts more than two seconds.

    A bar on a terminal; elsewhere a plain line every ten seconds.
    """
    if quiet:
        yield None
        return
    started = time.monotonic()
    shown = 0.0
    drawn = False

    def show(rows: int, seen_bytes: int, total_bytes: int) -> None:
        nonlocal shown, drawn
        now = time.monotonic()
        is_terminal = sys.stderr.isatty()
        if now - started < 2 or now - shown < (0.1 if is_terminal else 10):
            return
        shown = now
        share = min(1.0, seen_bytes / total_bytes) if total_bytes else 0.0
        left = (now - started) * (1 - share) / share if share > 0 else 0
        text = f"{label}: {share:4.0%}  {rows:,} rows  {rows / (now - started):,.0f} rows/s  {left:,.0f} s left"
        drawn = drawn or is_terminal
        sys.stderr.write(f"\r\x1b[K{text}" if is_terminal else text + "\n")
        sys.stderr.flush()

    try:
        yield show
    finally:
        if drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
