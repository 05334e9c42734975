"""Everything a command says: results on stdout, one JSON object where asked; progress and warnings on stderr."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import click
import orjson

from luthier.errors import LuthierError

SILENT_SECONDS = 5.0
_FIRST_SECONDS = 0.8
_BEAT_SECONDS = 0.2


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


def say(text: str = "", end: str = "\n", *, at_once: bool = False) -> None:
    """A line of the result, on stdout; `at_once` also where stdout is a file that would be written later."""
    sys.stdout.write(text + end)
    if at_once:
        sys.stdout.flush()


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


def tell(text: str) -> None:
    """A line beside the result that is no warning, on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def tell_in_handler(text: str) -> None:
    """A line on stderr from inside a signal's handler, where no stream may be waited for."""
    start = "\r\x1b[K" if os.isatty(2) else ""
    with suppress(OSError):
        os.write(2, f"{start}{text}\n".encode())


class LiveLine:
    """A line on stderr that is written over; elsewhere than on a terminal, one of its texts every few seconds."""

    def __init__(self, *, plain_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._plain_seconds = plain_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._is_drawn = False
        self.shown: float = -plain_seconds
        """When something was shown last."""

    def show(self, text: str, *, keep: bool) -> None:
        """Show the text in place of the one before; `keep` leaves it standing."""
        with self._lock:
            now = self._clock()
            if self._is_terminal:
                fitting = text if keep else text[: shutil.get_terminal_size().columns - 1]
                sys.stderr.write(f"\r\x1b[K{fitting}" + ("\n" if keep else ""))
                self._is_drawn = not keep
            elif keep or now - self.shown >= self._plain_seconds:
                sys.stderr.write(text + "\n")
            else:
                return
            self.shown = now
            sys.stderr.flush()

    def clear(self) -> None:
        """Take away what is drawn."""
        with self._lock:
            if self._is_drawn:
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()
                self._is_drawn = False


class Heartbeat:
    """Says what goes on, and for how long already, whenever nothing was said for some seconds."""

    def __init__(self, line: LiveLine, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._line, self._clock = line, clock
        self._text, self._since, self._first_seconds = "", clock(), SILENT_SECONDS
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def doing(self, text: str, *, first_seconds: float = SILENT_SECONDS) -> None:
        """This goes on from now on; it is said after `first_seconds`, and then again every few seconds."""
        self._text, self._since, self._first_seconds = text, self._clock(), first_seconds

    def beat(self) -> None:
        """Say it, if it is time to."""
        now, since, text = self._clock(), self._since, self._text
        is_first = self._line.shown < since
        silent = now - max(self._line.shown, since)
        if text and silent >= (self._first_seconds if is_first else SILENT_SECONDS):
            is_new = now - since < SILENT_SECONDS
            self._line.show(text if is_new else f"{text}: {now - since:.0f} s so far", keep=False)

    def __enter__(self) -> Heartbeat:
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread:
            self._thread.join()
        self._line.clear()

    def _run(self) -> None:
        while not self._over.wait(_BEAT_SECONDS):
            self.beat()


@contextmanager
def heartbeat(text: str, *, quiet: bool = False) -> Iterator[None]:
    """While this takes long, say so within a second, and again every few seconds."""
    if quiet:
        yield
        return
    with Heartbeat(LiveLine(plain_seconds=SILENT_SECONDS)) as heart:
        heart.doing(text, first_seconds=_FIRST_SECONDS)
        yield


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
