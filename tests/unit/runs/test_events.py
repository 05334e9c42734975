"""Events are appended whole, read in order, and hold no secret."""

from __future__ import annotations

import errno
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import DiskFullError
from luthier.runs import events
from luthier.runs.events import EVENT_KINDS, HIDDEN, EventLog, list_secrets, read_events, redact
from tests.unit.runs.made import step_done


def test_events_come_back_in_order_with_time_and_number(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", clock=lambda: datetime(2026, 11, 20, 1, 2, 3, tzinfo=UTC))
    log.append(step_done(1, metrics={"margin": np.float32(0.5)}))
    log.append(events.Finished(1, "all steps done", 2.0))
    first, second = read_events(tmp_path / "events.jsonl")
    assert (first["seq"], first["time"], first["kind"]) == (1, "2026-11-20T01:02:03.000Z", "step_done")
    assert (first["step"], first["loss"], first["metrics"]) == (1, 1.0, {"margin": 0.5})
    assert second == {
        "seq": 2,
        "time": "2026-11-20T01:02:03.000Z",
        "kind": "finished",
        "step": 1,
        "reason": "all steps done",
        "seconds": 2.0,
    }


def test_every_kind_is_told_apart() -> None:
    assert len(EVENT_KINDS) == len(events.Event.__subclasses__()) >= 18
    assert "" not in EVENT_KINDS


def test_numbers_go_on_when_a_process_takes_over(tmp_path: Path) -> None:
    for step in (1, 2):
        EventLog(tmp_path / "events.jsonl").append(step_done(step))
    assert [event["seq"] for event in read_events(tmp_path / "events.jsonl")] == [1, 2]


@given(cut=st.floats(0, 1))
def test_a_torn_last_line_is_skipped_and_then_cut_off(tmp_path_factory: pytest.TempPathFactory, cut: float) -> None:
    path = tmp_path_factory.mktemp("torn") / "events.jsonl"
    log = EventLog(path)
    log.append(step_done(1))
    whole = path.read_bytes()
    log.append(step_done(2))
    second = path.read_bytes()[len(whole) :]
    path.write_bytes(whole + second[: round(cut * (len(second) - 1))])
    assert [event["step"] for event in read_events(path)] == [1]
    EventLog(path).append(step_done(3))
    assert [(event["seq"], event["step"]) for event in read_events(path)] == [(1, 1), (2, 3)]


def test_a_damaged_line_is_shown_and_stops_nothing(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for step in (1, 2, 3):
        EventLog(path).append(step_done(step))
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b'{"seq": 2', *lines[2:]]))
    assert [event["kind"] for event in read_events(path)] == ["step_done", "unreadable", "step_done"]
    assert EventLog(path).append(step_done(4))["seq"] == 4


def test_nothing_written_is_nothing_read(tmp_path: Path) -> None:
    assert read_events(tmp_path / "events.jsonl") == []


def test_several_threads_write_whole_lines(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")

    def work(first: int) -> None:
        for step in range(first, first + 25):
            log.append(step_done(step))

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 100, 200, 300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [event["seq"] for event in read_events(log.path)] == list(range(1, 101))


@pytest.mark.parametrize(
    "secret",
    [
        "hf_abcDEFghiJKLmnoPQRstuVWXyzABCDEFGH",
        "hf_canary123",
        "sk-proj-0123456789abcdef",
        "Bearer abc.def-123456",
        "ftk_ab12_0123456789abcdefABCDEF",
    ],
)
def test_what_looks_like_a_key_is_never_written(secret: str, tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.append(events.Warned("x", f"the hub said 401 to {secret}, so"))
    log.append(events.Planned({secret: [{"deep": (secret,)}]}))
    assert secret.split()[-1].encode() not in log.path.read_bytes()
    assert read_events(log.path)[0]["message"] == f"the hub said 401 to {HIDDEN}, so"


@pytest.mark.parametrize(
    "text", ["desk-lampshade-0123456789", "hf_data/train.jsonl:17", "task-12345678901234", "1 risk"]
)
def test_plain_words_are_left_alone(text: str) -> None:
    assert redact(text) == text


def test_keys_of_the_environment_are_hidden_whatever_they_look_like(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "correct horse")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    assert list_secrets() == ("correct horse",)
    assert EventLog(tmp_path / "e.jsonl").append(events.Failed("x", "correct horse abc"))["message"] == f"{HIDDEN} abc"


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_hiding_changes_nothing_else(value: Any) -> None:
    if "sk-" not in repr(value) and "hf_" not in repr(value) and "earer" not in repr(value):
        assert redact(value) == value


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    log = EventLog(tmp_path / "events.jsonl")
    log._next_seq = 1  # /dev/full reads without end
    with pytest.raises(DiskFullError):
        log.append(step_done(1))


def test_a_line_is_plain_json(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.append(step_done(1, loss=float("nan")))
    assert orjson.loads(log.path.read_bytes())["loss"] is None


def test_a_line_that_did_not_fit_on_the_disk_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.append(events.Resumed(1))

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> None:
            self.file.write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    opened = Path.open
    with monkeypatch.context() as once:
        once.setattr(Path, "open", lambda self, mode: Full(opened(self, mode)))
        with pytest.raises(DiskFullError):
            log.append(events.Resumed(2))
    log.append(events.Paused(2, "disk_full"))
    assert [(each["seq"], each["kind"]) for each in read_events(log.path)] == [(1, "resumed"), (2, "paused")]
