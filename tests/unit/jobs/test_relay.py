"""Events of runs as events of jobs: whole lines only, each once, in words, without the server's paths."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from luthier.jobs.relay import Relay, describe
from luthier.runs.events import EVENT_KINDS

PLANNED = {"kind": "planned", "plan": {"steps": 20, "train_examples": 5, "spec": {"data": {"train": "x"}}}}


def line(seq: int, kind: str, **facts: Any) -> str:
    return json.dumps({"seq": seq, "time": "2026-11-20T12:00:00.250Z", "kind": kind, **facts}) + "\n"


def done(seq: int, step: int) -> str:
    return line(seq, "step_done", step=step, loss=1.5)


def test_only_whole_lines_are_carried_and_each_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    relay = Relay(path, tmp_path)
    assert relay.read() is None
    path.write_text(line(1, "planned", plan=PLANNED["plan"]) + done(2, 1) + done(3, 2)[:20])
    first = relay.read()
    assert first is not None
    assert first.lines == (0, 2)
    assert (first.step, first.steps) == (1, 20)
    assert [each.kind for each in first.events] == ["planned", "step_done"]
    assert relay.read() == first  # until it is kept
    relay.keep(2)
    assert relay.read() is None
    path.write_text(path.read_text() + done(3, 2)[20:])
    second = relay.read()
    assert second is not None
    assert second.lines == (2, 3)
    assert second.events[0].message == "Step 2/20: training loss 1.5000"
    assert second.events[0].created_at == 1795176000.25


def test_it_goes_on_after_what_is_kept_already(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(line(1, "planned", plan=PLANNED["plan"]) + "".join(done(n, n) for n in range(2, 1202)))
    relay = Relay(path, tmp_path, kept=1100)
    stretch = relay.read()
    assert stretch is not None
    assert stretch.lines == (1100, 1201)
    assert stretch.steps == 20
    relay.keep(1201)
    assert relay.read() is None
    ahead = Relay(path, tmp_path)
    first = ahead.read()
    assert first is not None
    ahead.keep(1150)  # another worker brought more than this one read
    stretch = ahead.read()
    assert stretch is not None
    assert stretch.lines == (1150, 1201)


def test_a_damaged_line_is_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(done(1, 1) + "not json\n" + "[1]\n" + done(4, 2))
    stretch = Relay(path, tmp_path).read()
    assert stretch is not None
    assert stretch.lines == (0, 4)
    assert [each.step for each in stretch.events] == [1, 2]


@pytest.mark.parametrize("kind", EVENT_KINDS)
def test_every_kind_has_a_sentence_of_its_own(kind: str) -> None:
    values: dict[str, Any] = {"int": 3, "float": 0.5, "str": "words", "bool": True, "list[str]": ["a"]}
    said = {each.name: values.get(str(each.type), {}) for each in fields(EVENT_KINDS[kind])}
    event = describe({"seq": 1, "time": "", "kind": kind, **said}, 9)
    assert event.message != kind.replace("_", " ")
    assert "{" not in event.message
    assert event.created_at is None


def test_paths_and_keys_are_hidden(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    home = tmp_path / "home"
    said = f"{home}/runs/a/x is full; key sk-abcdefghijklmnop"
    path.write_text(line(1, "failed", code="disk_full", message=said) + line(2, "planned", plan=PLANNED["plan"]))
    stretch = Relay(path, home).read()
    assert stretch is not None
    assert stretch.events[0].message == "The run failed: runs/a/x is full; key [hidden]"
    assert stretch.events[0].data["message"] == "runs/a/x is full; key [hidden]"
    assert stretch.events[0].level == "error"
    assert "spec" not in stretch.events[1].data
