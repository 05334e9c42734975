"""What is seen of a run: a live line on a terminal, plain lines elsewhere, and a word at least every few seconds."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest

from luthier.cli.live import Live
from luthier.cli.output import SILENT_SECONDS, Heartbeat, LiveLine, tell_in_handler
from luthier.runs import events
from tests.unit.runs.made import step_done

Captured = pytest.CaptureFixture[str]


class Clock:
    """Time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Terminal(io.StringIO):
    """A terminal to write to."""

    def isatty(self) -> bool:
        return True


STORY: tuple[tuple[float, events.Event], ...] = (
    (0, events.RunStarted("run")),
    (0, events.DataReady({})),
    (3, events.EngineLoaded(3.21, True, 7168, "fp32")),
    (1, step_done(1, 4.8233, seconds=1.0, tokens_per_second=2342.4, memory_bytes=469_053_440)),
    (1, step_done(2, 4.6902, seconds=1.0)),
    (1, events.CheckpointSaved(2, 0.001, 0.02, 90_347)),
    (5, step_done(3, 4.4846, seconds=5.0, metrics={"reward_margin": 0.1234, "reward_accuracy": 0.75, "other": 1.0})),
    (1, events.Working("evaluation", 3, 10)),
    (1, events.Evaluated(3, 4.5254, 92.339, 0.461, 76, True)),
    (1, events.StepSkipped(4, "non-finite loss", ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "a.jsonl:4"])),
    (1, events.StepReplayed(5, "out of memory", 128)),
    (1, events.CheckpointBroken("x", "checkpoint_step_2: `manifest.json` is damaged")),
    (1, events.Warned("changed", "resumed although changed: the plan")),
    (1, step_done(6, 4.1872, seconds=1.0)),
    (1, events.Evaluated(6, 4.4, 81.5, 0.5, 76, False)),
    (1, events.Finished(6, "finished", 9.0)),
)
PLAIN = """\
loading the model
model loaded in 3.2 s: 7,168 parameters to train, fp32
step 1/6  loss 4.8233  lr 1.00e-03  2,342 tok/s  5 s left  0.44 GiB
step 3/6  loss 4.4846  margin 0.123  accuracy 0.75  lr 1.00e-03  100 tok/s  7 s left  0.00 GiB
step 3: held-out loss 4.5254  perplexity 92.339  token accuracy 46.1%  best so far
warning: step 4 skipped: non-finite loss; rows a.jsonl:1, a.jsonl:2, a.jsonl:3
warning: step 5 is computed again in smaller parts: out of memory
warning: checkpoint passed over: checkpoint_step_2: `manifest.json` is damaged
warning: resumed although changed: the plan
step 6/6  loss 4.1872  lr 1.00e-03  100 tok/s  0 s left  0.00 GiB
step 6: held-out loss 4.4000  perplexity 81.500  token accuracy 50.0%
"""


def tell(live: Live, clock: Clock) -> None:
    for seconds, event in STORY:
        clock.now += seconds
        live(event)


def test_the_lines_of_a_run(clock: Clock, capsys: Captured) -> None:
    tell(Live(6, clock=clock), clock)
    assert capsys.readouterr().err == PLAIN


def test_warnings_are_shown_where_all_else_is_quiet(clock: Clock, capsys: Captured) -> None:
    with Live(6, quiet=True, clock=clock) as live:
        tell(live, clock)
        assert live.heart._thread is None
    assert capsys.readouterr().err.splitlines() == [line for line in PLAIN.splitlines() if "warning: " in line]


def test_the_live_line_is_written_over_and_fits_the_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", "1")
    live = Live(6, clock=clock)
    tell(live, clock)
    shown = terminal.getvalue()
    drawn = [part for part in shown.replace("\n", "\r\x1b[K").split("\r\x1b[K") if part]
    assert "step 2/6  loss 4.6902  lr 1.00e-03  100 tok/s  4 s left  0.00 GiB"[:59] in drawn
    assert "evaluation: 3 of 10" in drawn
    kept = [line.rpartition("\x1b[K")[2] for line in shown.split("\n")]
    assert kept[0] == "model loaded in 3.2 s: 7,168 parameters to train, fp32"
    assert "warning: step 5 is computed again in smaller parts: out of memory" in kept
    assert not live._on_screen._is_drawn


@pytest.mark.parametrize(
    ("event", "doing"),
    [
        (events.DataReady({}), "loading the model"),
        (events.EngineLoaded(1.0, True, 1, "fp32"), "the first step"),
        (step_done(3), "after step 3/6"),
        (step_done(6), "writing the results"),
        (events.Working("merging the adapter into its base", 0, 1), "merging the adapter into its base"),
    ],
)
def test_whatever_takes_long_says_so(event: events.Event, doing: str, clock: Clock, capsys: Captured) -> None:
    live = Live(6, clock=clock)
    live(event)
    said = []
    for _ in range(40):
        clock.now += 0.5
        live.heart.beat()
        said.append(capsys.readouterr().err)
    beats = [number for number, each in enumerate(said) if "so far" in each]
    assert f"{doing}: 10 s so far\n" in said
    gaps = [later - earlier for earlier, later in zip([-1, *beats], beats, strict=False)]
    assert max(gaps) * 0.5 <= SILENT_SECONDS


def test_what_goes_on_is_said_within_a_second_where_nothing_was_said_yet(clock: Clock, capsys: Captured) -> None:
    heart = Heartbeat(LiveLine(plain_seconds=SILENT_SECONDS, clock=clock), clock=clock)
    heart.doing("reading rows.jsonl", first_seconds=0.8)
    for _ in range(60):
        clock.now += 0.2
        heart.beat()
    assert capsys.readouterr().err.splitlines() == [
        "reading rows.jsonl",
        "reading rows.jsonl: 6 s so far",
        "reading rows.jsonl: 11 s so far",
    ]


def test_where_lines_come_anyway_nothing_is_added(clock: Clock, capsys: Captured) -> None:
    live = Live(100, clock=clock)
    for step in range(1, 40):
        clock.now += 1
        live(step_done(step))
        live.heart.beat()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 8
    assert not any("so far" in line for line in lines)


def test_a_resumed_run_says_from_where(clock: Clock, capsys: Captured) -> None:
    live = Live(6, clock=clock)
    live(events.Resumed(4))
    live(events.Resumed(0))
    live(step_done(5, seconds=2.0))
    assert capsys.readouterr().err.splitlines()[:2] == [
        "resumed after step 4",
        "no checkpoint yet: from the first step on",
    ]


@pytest.mark.parametrize(("seconds", "said"), [(89, "89 s left"), (600, "10 min left"), (9000, "2.5 h left")])
def test_time_left_in_words(seconds: float, said: str, clock: Clock, capsys: Captured) -> None:
    Live(2, clock=clock)(step_done(1, seconds=seconds))
    assert said in capsys.readouterr().err


def test_a_heart_beats_by_itself_and_stops(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    beaten: list[str] = []
    heart = Heartbeat(LiveLine(plain_seconds=0.0))
    waited = iter([False, False, True])
    monkeypatch.setattr(heart, "beat", lambda: beaten.append("beat"))
    wait: Callable[[float], bool] = lambda _: next(waited)  # noqa: E731
    monkeypatch.setattr(heart._over, "wait", wait)
    with heart:
        pass
    assert beaten == ["beat", "beat"]


def test_a_handler_writes_past_every_stream(capfd: Any) -> None:
    tell_in_handler("SIGINT: stopping")
    assert capfd.readouterr().err == "SIGINT: stopping\n"


def test_what_a_service_does_is_shown(clock: Clock, capsys: Captured) -> None:
    live = Live(6, clock=clock)
    paths = {"weights": "tinker://run/weights/step_0002", "sampler_weights": "tinker://run/sampler_weights/step_0002"}
    for event in (
        events.Waiting("forward_backward of step 2", 12.0, "paused_capacity", "too many models"),
        events.SavedOnService("step_0002", paths),
        events.Evaluated(2, 4.5254, 92.339, math.nan, 76, False),
    ):
        clock.now += 10
        live(event)
    assert capsys.readouterr().err.splitlines() == [
        "waiting for forward_backward of step 2, 12 s (paused_capacity: too many models)",
        f"saved on the service: {paths['weights']}, {paths['sampler_weights']}",
        "step 2: held-out loss 4.5254  perplexity 92.339",
    ]
