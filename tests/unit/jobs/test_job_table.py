"""The job table under any order of events: a state machine that knows what each may do, against the real tables.

Workers die and come back, report late, and finish what is no longer theirs; owners cancel, pause and resume; the wall
clock jumps. After every step the rows have to agree with the model and with the rules of the house.
"""

from __future__ import annotations

import sqlite3
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import event, exc, select, update

from luthier.errors import ConflictError, NotFoundError, StaleAttemptError
from luthier.jobs.database import FILE, Database
from luthier.jobs.endings import ENDINGS
from luthier.jobs.job import FINAL, FOLLOWS, MOST_CRASHES, Claim, Job, NewEvent, Outcome, State, Timings, WorkerRow
from luthier.jobs.queue import Queue
from luthier.jobs.reaper import Reaper
from luthier.jobs.store import JobStore
from luthier.jobs.tables import attempts, events, jobs
from tests.unit.jobs.conftest import Clock, new_job

TIMINGS = Timings()
MOST_JOBS = 4
BEGUN = [State.RUNNING, State.CANCELLING, State.PAUSING, State.QUEUED, State.VALIDATING]
WORKERS = [WorkerRow(f"worker-{number}", f"machine-{number}") for number in range(3)]
# Pairs of a state and how its attempt ends, and the state that has to follow.
AFTER = {
    (State.RUNNING, "succeeded"): State.SUCCEEDED,
    (State.RUNNING, "failed"): State.FAILED,
    (State.RUNNING, "paused"): State.PAUSED,
    (State.RUNNING, "cancelled"): State.CANCELLED,
    (State.RUNNING, "crashed"): State.QUEUED,
    (State.RUNNING, "lost"): State.QUEUED,
    (State.PAUSING, "succeeded"): State.SUCCEEDED,
    (State.PAUSING, "failed"): State.FAILED,
    (State.PAUSING, "paused"): State.PAUSED,
    (State.PAUSING, "cancelled"): State.CANCELLED,
    (State.PAUSING, "crashed"): State.PAUSED,
    (State.PAUSING, "lost"): State.PAUSED,
    (State.VALIDATING, "failed"): State.FAILED,
    (State.VALIDATING, "paused"): State.VALIDATING,
    (State.VALIDATING, "cancelled"): State.CANCELLED,
    (State.VALIDATING, "crashed"): State.VALIDATING,
    (State.VALIDATING, "lost"): State.VALIDATING,
    **{(State.CANCELLING, each): State.CANCELLED for each in ENDINGS},
}


@dataclass
class Known:
    """What the model knows of a job."""

    state: State = State.VALIDATING
    holder: Claim | None = None
    attempts: int = 0
    crashes: int = 0
    crashed_at: float | None = None
    lines: int = 0
    last_words: Job | None = None
    """The row as it was when the job ended."""


@cache
def _empty_database() -> bytes:
    """Made once: the tables take longer than the steps."""
    with tempfile.TemporaryDirectory() as folder:
        database = Database.at_home(Path(folder))
        database.migrate()
        database.close()
        return (Path(folder) / FILE).read_bytes()


def _do_not_sync(connection: sqlite3.Connection, _record: object) -> None:
    connection.execute("PRAGMA synchronous = OFF")  # no crash of the machine is among the rules


class JobTable(RuleBasedStateMachine):
    """Rules are what owners, workers and time do."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        home = Path(self.folder.name)
        (home / FILE).write_bytes(_empty_database())
        self.database = Database.at_home(home)
        event.listen(self.database._engine, "connect", _do_not_sync)
        self.now, self.clock = Clock(1.8e9), Clock(1000.0)
        self.store = JobStore(self.database, home, now=self.now)
        self.queue = Queue(self.database, TIMINGS, now=self.now, clock=self.clock)
        self.reaper = Reaper(self.queue, TIMINGS, clock=self.clock)
        self.known: dict[str, Known] = {}
        self.claims: list[Claim] = []
        self.dead: set[str] = set()
        self.seen_updates: dict[str, float] = {}

    def teardown(self) -> None:
        self.database.close()
        self.folder.cleanup()

    @initialize()
    def first(self) -> None:
        self.create(0, State.RUNNING)

    @precondition(lambda self: len(self.known) < MOST_JOBS)
    @rule(priority=st.integers(0, 1), state=st.sampled_from(BEGUN))
    def create(self, priority: int, state: State) -> None:
        """A job, and most often one that is well on its way."""
        job, was_there = self.store.create(new_job(priority=priority))
        assert not was_there
        self.known[job.id] = Known()
        if state != State.VALIDATING:
            self._claim(0, job.id)
            self._validate(self.claims[-1])
        if state in (State.RUNNING, State.PAUSING, State.CANCELLING):
            self._claim(0, job.id)
        if state == State.PAUSING:
            self._pause(job.id)
        if state == State.CANCELLING:
            self._cancel(job.id)

    @rule(number=st.integers(0, 2))
    def claim(self, number: int) -> None:
        self._claim(number)

    def _claim(self, number: int, only: str = "") -> None:
        worker = WORKERS[number]
        self.dead.discard(worker.id)
        claim = self.queue.claim(worker, lambda job: only in ("", job.id))
        ready = {name for name, each in self.known.items() if self._may_be_claimed(each)}
        if claim is None:
            assert not {name for name in ready if self.known[name].crashes == 0}
            return
        each = self.known[claim.job.id]
        assert claim.job.id in ready
        assert each.holder is None
        assert claim.attempt == each.attempts + 1, "fencing numbers count on by one"
        assert claim.kind == ("check" if each.state == State.VALIDATING else "train")
        assert claim.relayed == each.lines
        each.attempts += 1
        each.holder = claim
        each.crashed_at = None
        if claim.kind == "train":
            each.state = State.RUNNING
        self.claims.append(claim)

    def _draw_claim(self, data: st.DataObject) -> Claim:
        """Mostly one that holds its job; now and then any that ever did."""
        holding = [claim for claim in self.claims if not self._is_stale(claim)]
        return data.draw(st.sampled_from(holding if holding and data.draw(st.integers(0, 3)) else self.claims))

    def _may_be_claimed(self, each: Known) -> bool:
        rested = each.crashed_at is None or self.clock() > each.crashed_at
        return each.state in (State.VALIDATING, State.QUEUED) and each.holder is None and rested

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), needs=st.integers(1, 3))
    def validate(self, data: st.DataObject, needs: int) -> None:
        self._validate(self._draw_claim(data), needs)

    def _validate(self, claim: Claim, needs: int = 1) -> None:
        each = self.known.get(claim.job.id)
        if each is None or each.holder is not claim or each.state != State.VALIDATING:
            with pytest.raises(StaleAttemptError):
                self.queue.validated(claim)
            return
        self.queue.validated(claim, needs={"processors": needs})
        each.state, each.holder, each.crashes = State.QUEUED, None, 0

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), count=st.integers(0, 3), doubled=st.booleans())
    def report(self, data: st.DataObject, count: int, doubled: bool) -> None:
        claim = self._draw_claim(data)
        each = self.known.get(claim.job.id)
        lines = each.lines if each else 0
        new = [NewEvent("step_done", "a step", step=lines + place) for place in range(count)]
        if each is None or each.holder is not claim:
            with pytest.raises(StaleAttemptError):
                self.queue.report(claim, new, lines=(lines, lines + count))
            return
        for _ in range(1 + doubled):
            assert self.queue.report(claim, new, step=lines, lines=(lines, lines + count)) == lines + count
        each.lines += count

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        claim = self._draw_claim(data)
        each = self.known.get(claim.job.id)
        if each is None or each.holder is not claim:
            with pytest.raises(StaleAttemptError):
                self.queue.started(claim, pid=7, process_started="then", token="t")
        else:
            self.queue.started(claim, pid=7, process_started="then", token="t")

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), ending=st.sampled_from(["succeeded", "failed", "cancelled", "paused"]))
    def finish(self, data: st.DataObject, ending: str) -> None:
        self._finish(self._draw_claim(data), ending)

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), ending=st.sampled_from(["crashed", "lost"]))
    def break_down(self, data: st.DataObject, ending: str) -> None:
        self._finish(self._draw_claim(data), ending)

    def _finish(self, claim: Claim, ending: str) -> None:
        each = self.known.get(claim.job.id)
        outcome = Outcome(ending, "why", "in words", model="ft:m" if ending == "succeeded" else None)
        if each is None or each.holder is not claim:
            with pytest.raises(StaleAttemptError):
                self.queue.finish(claim, outcome)
            return
        if (each.state, ending) not in AFTER:
            with pytest.raises(ValueError, match="validated"):
                self.queue.finish(claim, outcome)
            return
        self._end(each, ending)
        assert self.queue.finish(claim, outcome) == each.state

    def _end(self, each: Known, ending: str) -> None:
        expected = AFTER[each.state, ending]
        if ending == "crashed" and each.state != State.CANCELLING:
            each.crashes += 1
            each.crashed_at = self.clock()
            if each.crashes == MOST_CRASHES:
                expected = State.FAILED
        each.state, each.holder = expected, None

    @precondition(lambda self: any(each.state not in FINAL for each in self.known.values()))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self._cancel(data.draw(st.sampled_from(list(self.known))))

    def _cancel(self, name: str) -> None:
        each = self.known[name]
        if each.state in (State.SUCCEEDED, State.FAILED):
            with pytest.raises(ConflictError):
                self.store.cancel("anna", name)
            return
        if each.state in (State.RUNNING, State.PAUSING, State.CANCELLING):
            each.state = State.CANCELLING
        else:
            each.state, each.holder = State.CANCELLED, None
        assert self.store.cancel("anna", name).state == each.state

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def pause(self, data: st.DataObject) -> None:
        self._pause(data.draw(st.sampled_from(list(self.known))))

    def _pause(self, name: str) -> None:
        each = self.known[name]
        follows = {State.RUNNING: State.PAUSING, State.QUEUED: State.PAUSED}
        if each.state not in (*follows, State.PAUSING, State.PAUSED):
            with pytest.raises(ConflictError):
                self.store.pause("anna", name)
            return
        each.state = follows.get(each.state, each.state)
        assert self.store.pause("anna", name).state == each.state

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(list(self.known)))
        each = self.known[name]
        if each.state not in (State.PAUSED, State.QUEUED, State.RUNNING):
            with pytest.raises(ConflictError):
                self.store.resume("anna", name)
            return
        each.state = State.QUEUED if each.state == State.PAUSED else each.state
        assert self.store.resume("anna", name).state == each.state

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(list(self.known)))
        if self.known[name].state not in FINAL:
            with pytest.raises(ConflictError):
                self.store.delete("anna", name)
            return
        self.store.delete("anna", name)
        del self.known[name]
        with pytest.raises(NotFoundError):
            self.store.find("anna", name)

    @rule(number=st.integers(0, 2))
    def die(self, number: int) -> None:
        """A worker falls silent. What it still writes before it is given up counts; what it writes later does not."""
        self.dead.add(WORKERS[number].id)

    @precondition(lambda self: self.dead)
    @rule(jump=st.sampled_from([0.0, -3600.0, 3600.0]))
    def time_passes(self, jump: float) -> None:
        """Longer than a takeover: the living renew, the reaper looks, the silent are given up.

        The wall clock is set meanwhile, and nothing follows from it.
        """
        self.now.time += jump
        for _ in range(10):
            living = [
                each.holder for each in self.known.values() if each.holder and each.holder.worker not in self.dead
            ]
            assert self.queue.renew(living) == {claim.job.id for claim in living}
            stale = [claim for claim in self.claims if self._is_stale(claim)]
            assert self.queue.renew(stale) == set()
            self.reaper.look()
            self.clock.time += TIMINGS.heartbeat
            self.now.time += TIMINGS.heartbeat
        for each in self.known.values():
            if each.holder and each.holder.worker in self.dead:
                self._end(each, "lost")

    def _is_stale(self, claim: Claim) -> bool:
        each = self.known.get(claim.job.id)
        return each is None or each.holder is not claim

    @precondition(lambda self: any(each.state in FINAL for each in self.known.values()))
    @rule(data=st.data(), state=st.sampled_from(list(State)))
    def resurrect(self, data: st.DataObject, state: State) -> None:
        """Somebody writes to the database past our code."""
        ended = [name for name, each in self.known.items() if each.state in FINAL and each.state != state]
        if ended:
            name = data.draw(st.sampled_from(ended))
            with pytest.raises(exc.IntegrityError), self.database.write() as connection:
                connection.execute(update(jobs).where(jobs.c.id == name).values(state=str(state)))

    @invariant()
    def what_workers_are_told_agrees(self) -> None:
        wishes = {State.PAUSING: "pause", State.CANCELLING: "cancel"}
        stale = [claim for claim in self.claims if self._is_stale(claim)]
        assert set(self.queue.wanted(stale).values()) <= {"gone"}
        holders = [each.holder for each in self.known.values() if each.holder]
        expected = {claim.job.id: wishes.get(self.known[claim.job.id].state, "run") for claim in holders}
        assert self.queue.wanted(holders) == expected

    @invariant()
    def rows_agree(self) -> None:
        with self.database.read() as connection:
            rows = {row.id: row for row in connection.execute(select(jobs))}
            tried = connection.execute(select(attempts).order_by(attempts.c.job, attempts.c.number)).all()
            happened = connection.execute(select(events).order_by(events.c.job, events.c.seq)).all()
        assert set(rows) == set(self.known)
        for name, row in rows.items():
            each = self.known[name]
            assert (row.state, row.crashes, row.relayed) == (each.state, each.crashes, each.lines)
            assert row.holder == (each.holder.worker if each.holder else None)
            mine = [attempt for attempt in tried if attempt.job == row.number]
            assert [attempt.number for attempt in mine] == list(range(1, row.attempt + 1))
            holding = [attempt.number for attempt in mine if attempt.ended_at is None]
            assert holding == ([row.attempt] if each.holder else [])
            _check_events([each for each in happened if each.job == row.number], row.state, row.last_seq)
            assert row.updated_at >= self.seen_updates.get(name, 0.0)
            self.seen_updates[name] = row.updated_at
            self._check_last_words(name, each)

    def _check_last_words(self, name: str, each: Known) -> None:
        if each.state in FINAL:
            found = self.store.find("anna", name)
            assert found.finished_at is not None
            each.last_words = each.last_words or found
            assert found == each.last_words, "what has ended does not change"


def _check_events(found: list, state: str, last_seq: int) -> None:  # type: ignore[type-arg]
    assert [each.seq for each in found] == list(range(1, last_seq + 1)), "numbers have no gaps"
    assert found[0].kind == "job_created"
    at = State.VALIDATING
    for each in found:
        if each.kind == "state_changed":
            assert each.data["from"] == at
            at = State(each.data["to"])
            assert at in FOLLOWS[State(each.data["from"])]
    assert at == state, "the events tell the state"


TestJobTable = JobTable.TestCase
TestJobTable.settings = settings(stateful_step_count=30)


@pytest.mark.parametrize(("state", "ending"), AFTER)
def test_each_ending_leads_where_it_should(store: JobStore, queue: Queue, state: State, ending: str) -> None:
    """Every pair, once; the machine above comes to them in any order."""
    job, _ = store.create(new_job())
    claim = queue.claim(WORKERS[0])
    assert claim is not None
    if state != State.VALIDATING:
        queue.validated(claim)
        claim = queue.claim(WORKERS[0])
        assert claim is not None
    if state == State.PAUSING:
        store.pause("anna", job.id)
    if state == State.CANCELLING:
        store.cancel("anna", job.id)
    assert store.find("anna", job.id).state == state
    assert queue.finish(claim, Outcome(ending, "why", "in words")) == AFTER[state, ending]
    found = store.find("anna", job.id)
    assert found.state == AFTER[state, ending]
    assert found.crashes == (1 if ending == "crashed" and state != State.CANCELLING else 0)
    assert (found.error_code, found.error_message) == (
        ("why", "in words")
        if found.state == State.FAILED or (found.state, ending) == (State.PAUSED, "paused")
        else (None, None)
    )
    assert store.attempts("anna", job.id)[-1].ended_at is not None
