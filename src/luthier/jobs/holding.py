"""One job in a worker's hands: its check or its trainer started, told what is wanted, watched, and settled."""

from __future__ import annotations

import logging
import secrets
import signal
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import DatabaseError, DiskFullError, LuthierError
from luthier.jobs.attempt import (
    Identity,
    Order,
    attempt_folder,
    attempts_folder,
    boot_id,
    read_identity,
    read_lease,
    read_order,
    read_outcome,
    run_folder,
    running_seconds,
    write_lease,
    write_order,
    write_stop,
)
from luthier.jobs.capacity import Capacity, Needs, read_needs
from luthier.jobs.checking import Check, FileReport, Limits, drop_tokens, link_rows, safe_name
from luthier.jobs.job import Attempt, Claim, NewEvent, Outcome, State, Timings
from luthier.jobs.launchers import Ended, Launch, Launcher
from luthier.jobs.launchers.local import trainer_environment
from luthier.jobs.relay import Relay
from luthier.runs.events import redact
from luthier.runs.layout import EVENTS

if TYPE_CHECKING:
    from luthier.jobs.files import FileStore
    from luthier.jobs.queue import Queue

log = logging.getLogger("luthier.worker")
_MEMORY_MARGIN = 1.5
"""What a trainer's plan may count on, by what it was found to need: estimates may have been corrected since."""
_ENDED_BY_LEASE = (-signal.SIGALRM,)
_WORDS = {"pause": "paused", "cancel": "cancelled", "lost": "lost"}


@dataclass
class Siblings:
    """What other workers of this machine have in their hands, and how many they are."""

    count: int = 0
    needs: list[Needs] = field(default_factory=list)
    devices: set[int] = field(default_factory=set)

    def look(self, home: Path, attempts: Iterable[Attempt]) -> None:
        """At their attempts, by the orders of their trainers."""
        self.needs, self.devices = [], set()
        for attempt in attempts:
            with suppress(OSError, ValueError, TypeError):
                order = read_order(attempt_folder(home, attempt.job, attempt.number))
                self.needs.append(read_needs(order.needs))
                self.devices |= set(order.devices)


@dataclass(frozen=True)
class Place:
    """Where a worker works, and with what."""

    home: Path
    models: Path | None
    queue: Queue
    files: FileStore
    launcher: Launcher
    timings: Timings
    capacity: Capacity
    limits: Limits = field(default_factory=Limits)
    siblings: Siblings = field(default_factory=lambda: Siblings())

    def tables_of(self, claim: Claim) -> dict[str, Any]:
        """The job's spec with its files by path, under names that stay the same at every attempt."""
        job = claim.job
        folder = attempts_folder(self.home, job.id)
        data = dict(job.spec.get("data", {}))
        for key, id, name in (("train", job.training_file, "train"), ("valid", job.validation_file, "valid")):
            if id is not None:
                file = self.files.find(job.project, id)
                data[key] = str(link_rows(self.files.path(file), folder, safe_name(file.filename, name)))
        return {**job.spec, "data": data}

    def hide(self, text: str) -> str:
        """The text without the places of the server's disk."""
        return str(redact(text)).replace(f"{self.home.resolve()}/", "").replace(f"{self.home}/", "")


class Checking:
    """The check of a job in VALIDATING: its rows with the base's template, and its plan."""

    def __init__(self, place: Place, claim: Claim) -> None:
        self.claim, self._place = claim, place
        self._report: FileReport | None = None
        folder = attempt_folder(place.home, claim.job.id, claim.attempt)
        order = {
            "kind": "job",
            "spec": place.tables_of(claim),
            "memory_bytes": place.capacity.memory_bytes if place.capacity.device == "cpu" else None,
            "share_bytes": place.capacity.memory_bytes // place.capacity.slots if place.capacity.slots > 1 else None,
        }
        environment = trainer_environment(place.home, place.models, tokens=folder.parent)
        self._check = Check(folder, order, environment, place.limits)

    needs = Needs(processors=0)

    def renewed(self, renewals: int, asked_at: float) -> None:
        """Its process ends with the worker; it watches no lease."""

    def want(self, wish: str) -> None:
        """A job that is being checked is cancelled at once: the claim is gone then."""

    def look(self) -> bool:
        """Whether it is over and settled."""
        self._report = self._report or self._check.poll()
        if self._report is None:
            return False
        report, queue = self._report, self._place.queue
        if report.ok:
            said = f"{report.rows:,} rows are checked, {report.malformed:,} of them left out as malformed"
            level = "warn" if report.malformed else "info"
            event = NewEvent("data_checked", said, level, data={**_rows_of(report), "plan": dict(report.plan)})
            queue.validated(self.claim, needs=report.needs, events=[event])
            return True
        message = self._place.hide(report.message)
        event = NewEvent("data_rejected", message, "error", data=_rows_of(report))
        outcome = Outcome("failed" if report.is_final else "crashed", report.code, message)
        queue.finish(self.claim, outcome, [event] if report.is_final else [])
        if report.is_final:
            drop_tokens(attempts_folder(self._place.home, self.claim.job.id))
        return True

    def leave(self) -> None:
        """The worker ends: another one checks the job from the start."""
        self._check.stop()
        self._place.queue.finish(self.claim, Outcome("lost", "worker_ended", "its worker ended"))

    def abandon(self) -> None:
        """The job is not ours any more."""
        self._check.stop()


def _rows_of(report: FileReport) -> dict[str, Any]:
    return {
        "rows": report.rows,
        "malformed": report.malformed,
        "formats": dict(report.formats),
        "reasons": dict(report.reasons),
        "problems": [dict(each) for each in report.problems],
    }


class Training:
    """The trainer of a job in RUNNING; it outlives the worker, and is known again by its folder."""

    def __init__(self, place: Place, claim: Claim, launch: Launch, ref: Identity | None = None) -> None:
        self.claim, self._place, self.launch, self._ref = claim, place, launch, ref
        self.needs = read_needs(claim.job.needs)
        self._relay = Relay(run_folder(place.home, claim.job.id) / EVENTS, place.home, claim.relayed)
        self._is_told = ref is not None
        self._wish: str | None = None
        self._wished_at = 0.0
        self._ended: Ended | None = None
        self._outcome: Outcome | None = None

    @classmethod
    def start(cls, place: Place, claim: Claim, devices: tuple[int, ...], asked_at: float) -> Training:
        """Write the order and start the trainer. What cannot be started is settled by `look`."""
        job, timings = claim.job, place.timings
        folder = attempt_folder(place.home, job.id, claim.attempt)
        needs = read_needs(job.needs)
        memory = None
        if place.capacity.device == "cpu" and needs.memory_bytes:
            memory = min(place.capacity.memory_bytes, int(needs.memory_bytes * _MEMORY_MARGIN))
        jobs = place.capacity.slots * (1 + place.siblings.count)
        threads = max(1, place.capacity.processors // jobs // max(1, needs.processors))
        launch = Launch(folder, secrets.token_hex(16), devices, threads, memory)
        held = cls(place, claim, launch)
        try:
            run = str(run_folder(place.home, job.id))
            spec = place.tables_of(claim)
            told = Order(job.id, claim.attempt, launch.token, run, spec, timings, job.suffix, devices, needs.as_dict())
            write_order(folder, told)
            write_lease(folder, 0, asked_at)
            held._ref = place.launcher.submit(launch)
        except DatabaseError as error:
            held._outcome = Outcome("lost", error.code, error.message)
        except DiskFullError as error:
            held._outcome = Outcome("paused", error.code, place.hide(error.message))
        except LuthierError as error:
            held._outcome = Outcome("failed", error.code, place.hide(error.message))
        except OSError as error:
            held._outcome = Outcome("lost", "not_started", f"the trainer could not be started: {error.strerror}")
        return held

    @classmethod
    def adopt(cls, place: Place, claim: Claim, attempt: Attempt) -> Training:
        """Take up an attempt of a worker that died, its trainer alive or not."""
        folder = attempt_folder(place.home, claim.job.id, attempt.number)
        known = read_identity(folder)
        if attempt.pid is not None and attempt.token is not None:
            known = Identity(attempt.pid, attempt.process_started or "", attempt.token)
        try:
            order = read_order(folder)
        except (OSError, ValueError, TypeError):
            order = None
        if known is None or order is None or order.token != known.token:
            # Started or not, it will find this, and its lease is renewed by nobody.
            folder.mkdir(parents=True, exist_ok=True)
            write_stop(folder, "lost")
            held = cls(place, claim, Launch(folder, ""))
            held._outcome = Outcome("lost", "worker_lost", "its worker ended before the trainer was known")
            return held
        held = cls(place, claim, Launch(folder, known.token, order.devices), known)
        held._is_told = attempt.pid is not None
        return held

    def renewed(self, renewals: int, asked_at: float) -> None:
        """The database said that the job is ours still: tell the trainer."""
        if self._ref is not None and self._ended is None:
            self._ended = self._place.launcher.poll(self._ref)  # the lease of the dead tells how they died
        if self._ref is not None and self._ended is None:
            try:
                write_lease(self.launch.folder, renewals, asked_at)
            except OSError as error:  # a full disk: the trainer's fence will stop it
                log.warning("%s: the lease cannot be written: %s", self.claim.job.id, error.strerror)

    def want(self, wish: str) -> None:
        """Run, pause or cancel; a trainer that was asked has its grace, then it is killed."""
        if wish in ("pause", "cancel") and self._wish != wish and self._ref is not None:
            log.info("%s: asked to %s", self.claim.job.id, wish)
            write_stop(self.launch.folder, wish)
            self._place.launcher.signal(self._ref, "TERM")
            self._wish, self._wished_at = wish, time.monotonic()

    def look(self) -> bool:
        """Carry its events over, and whether it is over and settled. Called again after the database failed."""
        queue = self._place.queue
        if self._ref is not None and not self._is_told:
            ref = self._ref
            queue.started(self.claim, pid=ref.pid, process_started=ref.started, token=ref.token)
            self._is_told = True
        if self._ref is not None and self._ended is None:
            self._ended = self._place.launcher.poll(self._ref)
            self._end_after_grace()
        self._carry_events()
        if self._ref is not None and self._ended is None:
            return False
        self._outcome = self._outcome or self._find_outcome()
        state = queue.finish(self.claim, self._outcome)
        log.info("%s: attempt %s %s; the job is %s", self.claim.job.id, self.claim.attempt, self._outcome.ending, state)
        if state in (State.SUCCEEDED, State.FAILED, State.CANCELLED):
            drop_tokens(self.launch.folder.parent)
        return True

    def _carry_events(self) -> None:
        while (stretch := self._relay.read()) is not None:
            kept = self._place.queue.report(
                self.claim, stretch.events, step=stretch.step, steps=stretch.steps, lines=stretch.lines
            )
            self._relay.keep(kept)

    def _end_after_grace(self) -> None:
        if self._ended is None and self._wish and time.monotonic() - self._wished_at > self._place.timings.grace:
            log.warning("%s: did not stop within its grace; it is killed", self.claim.job.id)
            assert self._ref is not None
            self._place.launcher.signal(self._ref, "KILL")

    def _find_outcome(self) -> Outcome:
        """What the trainer said; where it said nothing, what its end tells."""
        said = read_outcome(self.launch.folder, self.launch.token)
        if said is not None:
            return replace(said, message=self._place.hide(said.message))
        if self._wish is not None:
            return Outcome(_WORDS[self._wish], message="it ended before it could save; the newest checkpoint stays")
        lease, code = read_lease(self.launch.folder), self._ended.code if self._ended else None
        if lease is not None and lease.boot != boot_id():
            return Outcome("lost", "machine_restarted", "the machine was started again")
        is_old = lease is not None and running_seconds() - lease.at >= self._place.timings.fence
        if is_old or code in _ENDED_BY_LEASE:
            return Outcome("lost", "lease_lost", "its lease was not renewed, and it ended itself")
        return Outcome("crashed", "process_died", f"the trainer {_how(code)}")

    def leave(self) -> None:
        """The worker ends: the trainer goes on, and another worker takes it up."""

    def abandon(self) -> None:
        """The job is not ours any more: this trainer must not take another step."""
        if self._ref is not None:
            write_stop(self.launch.folder, "lost")
            self._place.launcher.signal(self._ref, "KILL")


def _how(code: int | None) -> str:
    if code is None:
        return "is gone"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


Held = Checking | Training


def needs_in_use(held: Mapping[str, Held]) -> list[Needs]:
    """What the trainers of a worker take."""
    return [each.needs for each in held.values() if isinstance(each, Training)]


def free_devices(held: Mapping[str, Held], place: Place) -> list[int]:
    """Numbers of the accelerators that no trainer of this machine has."""
    taken = {number for each in held.values() if isinstance(each, Training) for number in each.launch.devices}
    return [number for number in range(place.capacity.devices) if number not in taken | place.siblings.devices]
