"""A first signal sets the flag, a second Ctrl-C interrupts, and what listened before listens again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from luthier.training.signals import EXIT_CODES, AskedToStop, StopFlag


@pytest.fixture(autouse=True)
def others() -> Iterator[list[int]]:
    """Somebody else listens to the signals."""
    heard: list[int] = []
    before = {number: signal.signal(number, lambda each, _: heard.append(each)) for number in (2, 15)}
    yield heard
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", EXIT_CODES)
def test_the_flag_says_which_signal(name: str, others: list[int]) -> None:
    told: list[str] = []
    with StopFlag(told.append) as stop:
        assert not stop
        signal.raise_signal(signal.Signals[name])
        assert stop
        assert stop.reason == name
    assert told == [name]
    assert others == []
    signal.raise_signal(signal.Signals[name])
    assert others == [signal.Signals[name]]


def test_a_second_ctrl_c_interrupts_and_a_second_sigterm_does_not() -> None:
    with StopFlag() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.reason == "SIGTERM"


def test_one_context_inside_another_changes_nothing(others: list[int]) -> None:
    with StopFlag() as stop:
        with stop:
            pass
        signal.raise_signal(signal.SIGTERM)
        assert stop
    assert others == []


def test_where_nothing_is_to_be_saved_a_signal_ends_it_at_once() -> None:
    with StopFlag() as stop:
        with pytest.raises(AskedToStop), stop.at_once():
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(AskedToStop), stop.at_once():
            raise AssertionError("it began")
        signal.raise_signal(signal.SIGTERM)
        assert stop.reason == "SIGTERM"


def test_in_another_thread_it_is_a_plain_flag() -> None:
    found = []

    def work() -> None:
        with StopFlag() as stop:
            stop.reason = "SIGTERM"
            found.append(bool(stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [True]
