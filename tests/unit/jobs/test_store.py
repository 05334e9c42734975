"""Jobs as a server sees them: idempotent creation, quotas, pages, tenants, and deletion that reaches the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from luthier.errors import ConflictError, IdempotencyError, NotFoundError, QuotaError
from luthier.jobs.database import Database
from luthier.jobs.files import FileStore
from luthier.jobs.job import Idempotency, NewEvent, Outcome, Quota, State
from luthier.jobs.queue import Queue
from luthier.jobs.store import JobStore
from luthier.jobs.tables import events, idempotency
from tests.unit.jobs.conftest import WORKER, Clock, make_final, make_queued, new_job


def test_a_job_starts_with_its_event(store: JobStore, now: Clock) -> None:
    new = new_job(metadata={"team": "a"}, suffix="s", priority=3, needs={"processors": 2}, key="k1")
    job, was_there = store.create(new)
    assert not was_there
    assert (job.state, job.base, job.project, job.created_at) == (State.VALIDATING, "practice", "anna", now.time)
    assert (job.metadata, job.suffix, job.priority, job.needs, job.key) == (
        {"team": "a"},
        "s",
        3,
        {"processors": 2},
        "k1",
    )
    assert store.find("anna", job.id) == job
    events = store.list_events("anna", job.id).items
    assert [(event.seq, event.kind) for event in events] == [(1, "job_created")]
    assert store.last_seq([job.id, "ftjob-none"]) == {job.id: 1}


class TestAgain:
    """The same request makes no second job."""

    def test_the_same_header_and_body_give_the_same_job(self, store: JobStore) -> None:
        asked = Idempotency("k1", "body", header="once\x00\ud800")
        job, was_there = store.create(new_job(), idempotency=asked)
        again, was_there_again = store.create(new_job(), idempotency=asked)
        assert (again.id, was_there, was_there_again) == (job.id, False, True)

    def test_the_same_header_with_another_body_is_refused(self, store: JobStore) -> None:
        store.create(new_job(), idempotency=Idempotency("k1", "body", header="once"))
        with pytest.raises(IdempotencyError):
            store.create(new_job(), idempotency=Idempotency("k1", "other", header="once"))

    @pytest.mark.parametrize(
        ("project", "asked"),
        [
            ("anna", Idempotency("k2", "body", header="once")),
            ("ben", Idempotency("k1", "body", header="once")),
            ("anna", Idempotency("k1", "body", header="twice")),
        ],
    )
    def test_of_another_key_or_project_it_is_another_request(
        self, store: JobStore, project: str, asked: Idempotency
    ) -> None:
        job, _ = store.create(new_job(), idempotency=Idempotency("k1", "body", header="once"))
        other, was_there = store.create(new_job(project), idempotency=asked)
        assert other.id != job.id
        assert not was_there

    def test_after_a_day_a_header_is_free_again(self, store: JobStore, database: Database, now: Clock) -> None:
        asked = Idempotency("k1", "body", header="once")
        job, _ = store.create(new_job(), idempotency=asked)
        now.time += 24 * 3600 - 1
        assert store.create(new_job(), idempotency=asked)[0].id == job.id
        now.time += 2
        assert store.create(new_job(), idempotency=Idempotency("k1", "other", header="once"))[1] is False
        now.time += 24 * 3600 + 1
        store.sweep()
        with database.read() as connection:
            assert connection.scalar(select(func.count()).select_from(idempotency)) == 0

    def test_a_retry_of_a_client_that_counts_gets_the_job_whose_answer_was_lost(
        self, store: JobStore, now: Clock
    ) -> None:
        first, _ = store.create(new_job(), idempotency=Idempotency("k1", "body"))
        now.time += 1
        second, was_there = store.create(new_job(), idempotency=Idempotency("k1", "body"))  # meant: no retry
        assert not was_there
        assert second.id != first.id
        retried, was_there = store.create(new_job(), idempotency=Idempotency("k1", "body", is_retry=True))
        assert (retried.id, was_there) == (second.id, True)

    @pytest.mark.parametrize("asked", [Idempotency("k2", "body", is_retry=True), Idempotency("k1", "x", is_retry=True)])
    def test_a_retry_of_something_else_makes_a_job(self, store: JobStore, asked: Idempotency) -> None:
        store.create(new_job(), idempotency=Idempotency("k1", "body"))
        assert store.create(new_job(), idempotency=asked)[1] is False

    def test_a_retry_after_ten_minutes_makes_a_job(self, store: JobStore, now: Clock) -> None:
        store.create(new_job(), idempotency=Idempotency("k1", "body"))
        now.time += 601
        assert store.create(new_job(), idempotency=Idempotency("k1", "body", is_retry=True))[1] is False

    def test_a_retry_whose_first_try_never_came_makes_one_job(self, store: JobStore) -> None:
        asked = Idempotency("k1", "body", is_retry=True)
        job, was_there = store.create(new_job(), idempotency=asked)
        assert not was_there
        assert store.create(new_job(), idempotency=asked) == (job, True)


def test_a_project_may_have_so_many_unfinished_jobs(store: JobStore) -> None:
    quota = Quota(unfinished=2)
    first, _ = store.create(new_job(), quota=quota)
    store.create(new_job(), quota=quota)
    with pytest.raises(QuotaError, match="2 unfinished"):
        store.create(new_job(), quota=quota)
    store.create(new_job("ben"), quota=quota)
    store.cancel("anna", first.id)
    store.create(new_job(), quota=quota)


def _file(files: FileStore, project: str = "anna") -> str:
    incoming = files.begin(project, "fine-tune", "a.jsonl", limit_bytes=100)
    incoming.write(b"rows of " + project.encode())
    return incoming.finish().id


def test_a_job_needs_files_of_its_own_project(store: JobStore, files: FileStore) -> None:
    mine, theirs = _file(files), _file(files, "ben")
    store.create(new_job(training_file=mine, validation_file=mine))
    for missing in ({"training_file": theirs}, {"training_file": mine, "validation_file": "file-none"}):
        with pytest.raises(NotFoundError) as caught:
            store.create(new_job(**missing))
        assert caught.value.code == "not_found"


def test_a_file_that_an_unfinished_job_uses_is_not_deleted(store: JobStore, files: FileStore) -> None:
    train, valid = _file(files), _file(files)
    job, _ = store.create(new_job(training_file=train, validation_file=valid))
    for file in (train, valid):
        with pytest.raises(ConflictError, match=job.id):
            files.delete("anna", file)
    store.cancel("anna", job.id)
    files.delete("anna", train)
    files.delete("anna", valid)


class TestLists:
    """Pages go on from an id; another project's jobs are not among them."""

    def test_pages_meet_without_gap_or_overlap(self, store: JobStore) -> None:
        made = [store.create(new_job())[0].id for _ in range(5)]
        store.create(new_job("ben"))
        for newest_first in (True, False):
            seen: list[str] = []
            after, more = None, True
            while more:
                page = store.list_jobs("anna", after=after, limit=2, newest_first=newest_first)
                seen += [job.id for job in page.items]
                after, more = seen[-1], page.has_more
            assert seen == (made[::-1] if newest_first else made)

    def test_order_is_that_of_creation_whatever_the_clock_says(self, store: JobStore, now: Clock) -> None:
        made = []
        for jump in (0, 3600, -7200):
            now.time += jump
            made.append(store.create(new_job())[0].id)
        assert [job.id for job in store.list_jobs("anna", newest_first=False).items] == made

    def test_filters(self, store: JobStore) -> None:
        plain, _ = store.create(new_job())
        tagged, _ = store.create(new_job(metadata={"a b'\"": "x", "n": "1"}))
        store.cancel("anna", plain.id)

        def ids(**asked: Any) -> list[str]:
            return [job.id for job in store.list_jobs("anna", **asked).items]

        assert ids(states=[State.CANCELLED]) == [plain.id]
        assert ids(states=[]) == []
        assert ids(metadata={"a b'\"": "x"}) == ids(metadata={"a b'\"": "x", "n": "1"}) == [tagged.id]
        assert ids(metadata={"n": "2"}) == ids(metadata={"n": "1", "z": "x"}) == []
        assert ids(without_metadata=True) == [plain.id]
        assert ids(dialects=["own"]) == [tagged.id, plain.id]
        assert ids(dialects=["openai"]) == []

    def test_events_by_number_kind_and_step(self, store: JobStore, queue: Queue) -> None:
        job = make_queued(store, queue)
        claim = queue.claim(WORKER)
        assert claim is not None
        steps = [NewEvent("step_done", "s", step=step) for step in (1, 2, 3, 2, 3, 4)]  # resumed after step 1
        queue.report(claim, [*steps, NewEvent("evaluated", "e", step=3), NewEvent("note", "n")])

        def found(**asked: Any) -> list[tuple[int, str, int | None]]:
            page = store.list_events("anna", job.id, **asked)
            return [(event.seq, event.kind, event.step) for event in page.items]

        assert [each[0] for each in found()] == list(range(1, 12))
        assert [each[0] for each in found(after_seq=3, limit=2)] == [4, 5]
        assert [each[0] for each in found(newest_first=True, before_seq=6, limit=3)] == [5, 4, 3]
        assert found(kinds=["evaluated", "note"]) == [(10, "evaluated", 3), (11, "note", None)]
        assert [each[0] for each in found(kinds=["step_done", "evaluated"], after_seq=8)] == [9, 10]
        assert [each[0] for each in found(kinds=["step_done", "evaluated"], newest_first=True, limit=2)] == [10, 9]
        assert [each[2] for each in found(kinds=["step_done"], after_step=1)] == [2, 2, 3, 3, 4]
        assert found(kinds=["step_done", "evaluated"], after_step=2, limit=3) == [
            (6, "step_done", 3),
            (8, "step_done", 3),
            (10, "evaluated", 3),
        ]
        assert found(kinds=[]) == []
        assert store.list_events("anna", job.id, limit=10).has_more
        assert not store.list_events("anna", job.id, limit=11).has_more

    def test_new_events_of_many_jobs_at_once(self, store: JobStore, queue: Queue) -> None:
        first = make_final(store, queue)
        second, _ = store.create(new_job())
        found = store.new_events({first.id: 2, second.id: 1, "ftjob-none": 0})
        assert [event.seq for event in found[first.id]] == [3, 4]
        assert set(found) == {first.id}
        assert found[first.id] == store.list_events("anna", first.id, after_seq=2).items


def test_of_another_project_there_is_nothing(store: JobStore, queue: Queue) -> None:
    job = make_final(store, queue)
    assert job.model is not None
    asked: list[Callable[[], object]] = [
        lambda: store.find("ben", job.id),
        lambda: store.cancel("ben", job.id),
        lambda: store.pause("ben", job.id),
        lambda: store.resume("ben", job.id),
        lambda: store.delete("ben", job.id),
        lambda: store.list_events("ben", job.id),
        lambda: store.attempts("ben", job.id),
        lambda: store.list_jobs("ben", after=job.id),
        lambda: store.find_model("ben", str(job.model)),
        lambda: store.delete_model("ben", str(job.model)),
        lambda: store.list_models("ben", after=job.model),
    ]
    for ask in asked:
        with pytest.raises(NotFoundError):
            ask()
    assert store.list_jobs("ben").items == store.list_models("ben").items == []
    assert store.find("anna", job.id) == job


class TestDeletion:
    """What is deleted is gone from the disk."""

    def test_a_job_goes_with_its_run_and_attempts(self, store: JobStore, queue: Queue, home: Path) -> None:
        job = make_final(store, queue)
        for folder in ("runs", "attempts"):
            (home / folder / job.id / "deep").mkdir(parents=True)
            (home / folder / job.id / "deep" / "file").write_text("x")
        store.delete("anna", job.id)
        assert not list(home.rglob("*file*"))
        assert store.count_by_state()[State.SUCCEEDED] == 0
        with pytest.raises(NotFoundError):
            store.delete("anna", job.id)

    def test_many_events_go_some_at_a_time(
        self, store: JobStore, queue: Queue, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("luthier.jobs.store._DELETED_AT_ONCE", 3)
        job = make_final(store, queue)
        other = make_final(store, queue)
        marks = database.change_mark()
        store.delete("anna", job.id)
        assert database.change_mark() != marks
        with database.read() as connection:
            assert connection.scalars(select(events.c.seq).order_by(events.c.seq)).all() == [1, 2, 3, 4]
        assert len(store.list_events("anna", other.id).items) == 4

    def test_a_model_goes_and_its_job_and_reports_stay(self, store: JobStore, queue: Queue, home: Path) -> None:
        job = make_final(store, queue)
        assert job.model is not None
        run = home / "runs" / job.id
        weights = ["final_lora_weights", "checkpoint_step_4", "training_state", "merged_model"]
        for name in [*weights, "report"]:
            (run / name).mkdir(parents=True)
            (run / name / "x").write_text("x")
        (run / "events.jsonl").write_text("{}\n")
        assert [model.id for model in store.list_models("anna").items] == [job.model]
        store.delete_model("anna", job.model)
        assert sorted(path.name for path in run.iterdir()) == ["events.jsonl", "report"]
        assert store.list_models("anna").items == []
        with pytest.raises(NotFoundError):
            store.find_model("anna", job.model)
        found = store.find("anna", job.id)
        assert (found.state, found.model) == (State.SUCCEEDED, job.model)
        assert found.model_deleted_at is not None

    def test_a_deletion_that_a_crash_cut_short_is_finished_later(
        self, store: JobStore, queue: Queue, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job = make_final(store, queue)
        assert job.model is not None
        weights = home / "runs" / job.id / "final_model"
        weights.mkdir(parents=True)
        with monkeypatch.context() as crashing:
            crashing.setattr("luthier.jobs.store.remove_models", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                store.delete_model("anna", job.model)
        assert weights.exists()
        store.sweep()
        assert not weights.exists()

    def test_a_model_that_an_unfinished_job_starts_from_stays(self, store: JobStore, queue: Queue) -> None:
        job = make_final(store, queue)
        assert job.model is not None
        other, _ = store.create(new_job().__class__("anna", "own", {"model": {"base": job.model}}))
        with pytest.raises(ConflictError, match=other.id):
            store.delete_model("anna", job.model)
        store.cancel("anna", other.id)
        store.delete_model("anna", job.model)


def test_models_are_listed_in_pages(store: JobStore, queue: Queue) -> None:
    made = [make_final(store, queue).model for _ in range(3)]
    page = store.list_models("anna", limit=2)
    assert ([model.id for model in page.items], page.has_more) == (made[:0:-1], True)
    assert [model.id for model in store.list_models("anna", after=page.items[-1].id).items] == made[:1]


def test_counts(store: JobStore, queue: Queue) -> None:
    make_final(store, queue)
    make_queued(store, queue)
    claim = queue.claim(WORKER)
    assert claim is not None
    queue.finish(claim, Outcome("crashed"))
    counts = store.count_by_state()
    assert (counts[State.SUCCEEDED], counts[State.QUEUED], counts[State.FAILED]) == (1, 1, 0)
    assert store.count_endings() == {"validated": 2, "succeeded": 1, "crashed": 1}
