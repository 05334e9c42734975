"""The worker: claims jobs that fit its machine, has them checked and trained, and keeps the database informed.

`python -m luthier.jobs.worker --home DIR` runs one; the database is named by LUTHIER_DATABASE, never by an argument,
which everybody on the machine could read. It may be killed at any moment: trainers go on for a while without it, and
the next worker of the machine takes them up.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import logging
import os
import platform
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import IO

from luthier.errors import DatabaseError, LuthierError, StaleAttemptError
from luthier.jobs.attempt import running_seconds
from luthier.jobs.capacity import Capacity, does_fit, may_check, read_needs
from luthier.jobs.checking import Limits
from luthier.jobs.holding import Checking, Held, Place, Training, free_devices, needs_in_use
from luthier.jobs.job import Claim, Job, Outcome, State, Timings, WorkerRow
from luthier.jobs.launchers import Launcher
from luthier.jobs.launchers.local import LocalLauncher

log = logging.getLogger("luthier.worker")
DATABASE_VARIABLE = "LUTHIER_DATABASE"
_MOST_CHECKS = 2
_CLAIMING = "claiming"
_FIRST_RETRY_SECONDS = 0.2
_NAMES = ("luthier", "torch", "transformers")


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker is started with."""

    home: Path
    database: str | None = None
    """Address of the database; the SQLite file in the home when absent."""
    models: Path | None = None
    slots: int | None = None
    """Jobs at once; as many as there are accelerators, or one, when absent."""
    offers: Mapping[str, str] = field(default_factory=dict)
    timings: Timings = field(default_factory=Timings)
    limits: Limits = field(default_factory=Limits)
    most_running: int | None = None
    """Jobs of one project at once."""


class Worker:
    """One worker process; everything happens in the loop of `run`, in one thread."""

    def __init__(
        self, settings: WorkerSettings, *, launcher: Launcher | None = None, parent: IO[bytes] | None = None
    ) -> None:
        self._settings, self._timings = settings, settings.timings
        self._launcher = launcher or LocalLauncher(settings.home, settings.models)
        self._parent = parent
        self._held: dict[str, Held] = {}
        self._renewals = 0
        self._is_ending = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._next_beat = self._next_wish = self._rest_until = 0.0
        self._retry_seconds = 0.0

    # -- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Work until SIGTERM, until the parent is gone, or until `end`. Trainers go on."""
        with _named(self._settings.home) as (name, machine), self._listening():
            self._open(name, machine)
            log.info("worker %s: %s", name, self._place.capacity)
            while not self._is_ending:
                self._turn()
                self._wait()
            self._drain()

    def end(self) -> None:
        """Ask the loop to end; from any thread, or from a signal's handler."""
        self._is_ending = True
        with suppress(OSError):
            os.write(self._wake_write, b".")

    def _open(self, name: str, machine: str) -> None:
        from luthier.jobs.database import Database
        from luthier.jobs.files import FileStore
        from luthier.jobs.queue import Queue
        from luthier.jobs.reaper import Reaper

        settings = self._settings
        found = self._launcher.capacity()
        capacity = replace(found, slots=settings.slots or found.slots)
        database = Database(settings.database) if settings.database else Database.at_home(settings.home)
        database.migrate()
        queue = Queue(database, settings.timings)
        files = FileStore(database, settings.home)
        self._place = Place(
            settings.home, settings.models, queue, files, self._launcher, settings.timings, capacity, settings.limits
        )
        self._database, self._reaper = database, Reaper(queue, settings.timings)
        self._row = WorkerRow(name, machine, capacity.as_dict(), capacity.as_dict(), _versions())

    def _turn(self) -> None:
        """Once round. What the database does not take now is done in a later turn."""
        if time.monotonic() < self._rest_until:
            return
        try:
            if time.monotonic() >= self._next_beat:
                self._beat()
            self._ask_wishes()
            self._look()
            self._claim()
            self._retry_seconds = 0.0
        except DatabaseError as error:
            self._rest(error)
        except Exception:  # the edge of the worker: a bug must not take the other jobs with it
            log.exception("not foreseen")
            self._rest(None)

    def _rest(self, error: DatabaseError | None) -> None:
        """Try again soon, then less often, but never so seldom that leases lapse by it."""
        if error is not None and not self._retry_seconds:
            log.warning("the database does not answer: %s", error.message)
        self._retry_seconds = min(max(2 * self._retry_seconds, _FIRST_RETRY_SECONDS), self._timings.heartbeat)
        self._rest_until = time.monotonic() + self._retry_seconds

    def _wait(self) -> None:
        """Until the next turn, or something that ends the worker."""
        watched: list[int | IO[bytes]] = [self._wake_read, *([self._parent] if self._parent else [])]
        ready, _, _ = select.select(watched, [], [], self._timings.relay)
        if self._parent in ready and self._parent is not None and not os.read(self._parent.fileno(), 4096):
            log.info("the server is gone")
            self._is_ending = True

    # -- the parts of a turn -----------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Renew the leases, and only then tell the trainers; say that this worker lives; give up those that do not."""
        asked_at = running_seconds()
        ours = self._place.queue.renew(self._claims())
        self._renewals += 1
        for job in list(self._held):
            if job in ours:
                self._held[job].renewed(self._renewals, asked_at)
            else:
                self._abandon(job)
        self._place.queue.heartbeat(replace(self._row, free=self._free().as_dict()))
        here = [each for each in self._place.queue.list_workers() if each.machine == self._row.machine]
        self._place.siblings.count = max(0, len(here) - 1)
        self._next_beat = time.monotonic() + self._timings.heartbeat
        self._adopt()
        for attempt in self._reaper.look():
            log.warning("%s: attempt %s was given up", attempt.job, attempt.number)

    def _ask_wishes(self) -> None:
        if not self._held or time.monotonic() < self._next_wish:
            return
        for job, wish in self._place.queue.wanted(self._claims()).items():
            if wish == "gone":
                self._abandon(job)
            else:
                self._held[job].want(wish)
        self._next_wish = time.monotonic() + max(self._timings.relay, self._timings.heartbeat / 5)

    def _look(self) -> None:
        for job, held in list(self._held.items()):
            try:
                if held.look():
                    del self._held[job]
            except StaleAttemptError as error:
                log.warning("%s", error.message)
                self._abandon(job)

    def _claim(self) -> None:
        """Take what fits, one after the other; of the workers of a machine only one claims at a time."""
        with _lock_path(self._settings.home, _CLAIMING).open("ab") as file:
            if not _take(file):
                return
            held = self._place.queue.held_on(self._row.machine)
            others = [each for each in held if each.worker != self._row.id and each.kind == "train"]
            self._place.siblings.look(self._settings.home, others)
            while not self._is_ending and self._take_one():
                pass

    def _take_one(self) -> bool:
        asked_at = running_seconds()
        claim = self._place.queue.claim(self._row, self._fits, most_running=self._settings.most_running)
        if claim is not None:
            log.info("%s: attempt %s (%s)", claim.job.id, claim.attempt, claim.kind)
            self._begin(claim, asked_at)
        return claim is not None

    def _begin(self, claim: Claim, asked_at: float) -> None:
        try:
            if claim.kind == "check":
                self._held[claim.job.id] = Checking(self._place, claim)
                return
            count = read_needs(claim.job.needs).devices
            devices = tuple(free_devices(self._held, self._place)[:count])
            self._held[claim.job.id] = Training.start(self._place, claim, devices, asked_at)
        except DatabaseError:
            raise
        except LuthierError as error:
            self._place.queue.finish(claim, Outcome("failed", error.code, self._place.hide(error.message)))
        except OSError as error:
            message = f"it could not be started: {error.strerror or error}"
            self._place.queue.finish(claim, Outcome("crashed", "not_started", message))

    def _fits(self, job: Job) -> bool:
        needs = read_needs(job.needs)
        if job.state == State.VALIDATING:
            checks = sum(isinstance(each, Checking) for each in self._held.values())
            return checks < _MOST_CHECKS and may_check(needs, self._place.capacity, self._settings.offers)
        return does_fit(needs, self._free())

    def _free(self) -> Capacity:
        """What is left here, beside what other workers of the machine have taken; their slots are their own."""
        left = self._place.capacity.without(needs_in_use(self._held))
        beside = left.without(self._place.siblings.needs)
        return replace(beside, slots=left.slots)

    def _claims(self) -> list[Claim]:
        return [held.claim for held in self._held.values()]

    def _abandon(self, job: str) -> None:
        log.warning("%s is not ours any more", job)
        self._held.pop(job).abandon()

    def _adopt(self) -> None:
        """Take up what workers of this machine left when they died; those alive are let alone."""
        for attempt in self._place.queue.held_on(self._row.machine):
            mine = attempt.worker == self._row.id
            if attempt.job in self._held or not (mine or _is_dead(self._settings.home, attempt.worker)):
                continue
            claim = self._place.queue.adopt(attempt, self._row)
            if claim is None:
                continue
            log.info("%s: attempt %s is taken up (%s)", attempt.job, attempt.number, attempt.kind)
            if attempt.kind == "check":
                self._place.queue.finish(claim, Outcome("lost", "worker_lost", "its worker ended"))
                continue
            self._held[attempt.job] = held = Training.adopt(self._place, claim, attempt)
            held.renewed(self._renewals, running_seconds())

    # -- the end -----------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Leave trainers their full time to be taken up in, and everything else to others."""
        log.info("ending; %s trainers go on", len(needs_in_use(self._held)))
        with suppress(DatabaseError):
            asked_at = running_seconds()
            ours = self._place.queue.renew(self._claims())
            for job, held in self._held.items():
                if job in ours:
                    held.renewed(self._renewals + 1, asked_at)
            for held in self._held.values():
                with suppress(StaleAttemptError):
                    held.leave()
            self._place.queue.forget_worker(self._row.id)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the loop."""
        before = {number: signal.signal(number, lambda *_: self.end()) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


# -- names and locks -------------------------------------------------------------------------------------------------


def machine_name(home: Path) -> str:
    """The machine as this home's workers know it."""
    digest = hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:8]
    return f"{platform.node() or 'machine'}-{digest}"


@contextmanager
def _named(home: Path) -> Iterator[tuple[str, str]]:
    """The first free name of this machine, and the machine's; the name is taken for as long as the process lives."""
    machine = machine_name(home)
    (home / "workers").mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        name = f"{machine}-{number}"
        with _lock_path(home, name).open("ab") as file:
            if _take(file):
                yield name, machine
                return
        number += 1


def _lock_path(home: Path, name: str) -> Path:
    return home / "workers" / f"{Path(name).name}.lock"


def _take(file: IO[bytes]) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _is_dead(home: Path, name: str) -> bool:
    """Whether no process has this name."""
    try:
        with _lock_path(home, name).open("rb") as file:
            return _take(file)
    except FileNotFoundError:
        return True


def _versions() -> dict[str, str]:
    found = {}
    for name in _NAMES:
        with suppress(Exception):
            found[name] = version(name)
    return found


# -- the process -----------------------------------------------------------------------------------------------------


def worker_command(settings: WorkerSettings, *, follows_stdin: bool = False) -> tuple[list[str], dict[str, str]]:
    """The command line of a worker with these settings, and what to add to its environment."""
    command = [sys.executable, "-P", "-m", "luthier.jobs.worker", "--home", str(settings.home)]
    if settings.models is not None:
        command += ["--models", str(settings.models)]
    if settings.slots is not None:
        command += ["--slots", str(settings.slots)]
    if settings.most_running is not None:
        command += ["--most-running", str(settings.most_running)]
    command += [part for name, device in settings.offers.items() for part in ("--offer", f"{name}={device}")]
    command += ["--follow-stdin"] if follows_stdin else []
    return command, {DATABASE_VARIABLE: settings.database} if settings.database else {}


def read_settings(arguments: Sequence[str]) -> tuple[WorkerSettings, bool]:
    """Settings from a command line, and whether the worker ends with its standard input."""
    parser = argparse.ArgumentParser(prog="python -m luthier.jobs.worker", description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--slots", type=int)
    parser.add_argument("--most-running", type=int)
    parser.add_argument("--offer", action="append", default=[], metavar="TYPE=DEVICE")
    parser.add_argument("--follow-stdin", action="store_true", help="end when standard input does")
    found = parser.parse_args(arguments)
    pairs: list[tuple[str, str, str]] = [each.partition("=") for each in found.offer]
    settings = WorkerSettings(
        home=found.home,
        database=os.environ.get(DATABASE_VARIABLE) or None,
        models=found.models,
        slots=found.slots,
        offers={name: device for name, _, device in pairs},
        most_running=found.most_running,
    )
    return settings, found.follow_stdin


def main(arguments: Sequence[str], *, build: Callable[..., Worker] = Worker) -> int:
    """Run a worker; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    settings, follows_stdin = read_settings(arguments)
    try:
        build(settings, parent=sys.stdin.buffer if follows_stdin else None).run()
    except LuthierError as error:
        log.error("error: %s", error.message)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
