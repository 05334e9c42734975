"""What becomes of a job when an attempt at it ends: the one place that knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row

from luthier.jobs.job import MOST_CRASHES, NewEvent, Outcome, State
from luthier.jobs.transitions import change, end_attempt, move

ENDINGS = ("succeeded", "failed", "cancelled", "paused", "crashed", "lost")


def settle(
    connection: Connection,
    row: Row[Any],
    outcome: Outcome,
    now: float,
    *,
    before: Sequence[NewEvent] = (),
    lines: tuple[int, int] | None = None,
) -> State:
    """End the attempt that holds a locked job, and take the job to what follows; the state that it is in then."""
    if outcome.ending not in ENDINGS:
        raise ValueError(f"an attempt ends as one of {', '.join(ENDINGS)}, not as {outcome.ending!r}")
    events = list(before) if lines is None or lines[0] == row.relayed else []
    changes: dict[str, Any] = {"holder": None}
    if lines is not None and lines[0] == row.relayed:
        changes["relayed"] = lines[1]
    states, more = _what_follows(State(row.state), row, outcome)
    changes |= more
    ending = "cancelled" if states[-1:] == [State.CANCELLED] and outcome.ending == "succeeded" else outcome.ending
    end_attempt(connection, row, ending, now, error_code=outcome.error_code, message=outcome.message)
    if ending in ("crashed", "lost"):
        words = f"Attempt {row.attempt} {'crashed' if ending == 'crashed' else 'was lost'}"
        message = f"{words}: {outcome.message}" if outcome.message else words
        facts = {"attempt": row.attempt, "code": outcome.error_code, "crashes": changes.get("crashes", row.crashes)}
        events.append(NewEvent(f"attempt_{ending}", message, "warn", data=facts))
    if not states:
        change(connection, row, events, now, **changes)
        return State(row.state)
    words = changes.get("error_message") or "" if states[-1] in (State.FAILED, State.PAUSED) else ""
    move(connection, row, *states, now=now, message=words, before=events, **changes)
    return states[-1]


def _what_follows(state: State, row: Row[Any], outcome: Outcome) -> tuple[list[State], dict[str, Any]]:
    """The states that the job goes through, and the columns that change with them."""
    if state == State.CANCELLING:
        return [State.CANCELLED], {}
    if outcome.ending == "crashed":
        return _after_a_crash(state, row, outcome)
    if outcome.ending == "failed":
        return [State.FAILED], {"error_code": outcome.error_code or "failed", "error_message": outcome.message}
    if outcome.ending == "cancelled":
        return ([State.CANCELLED] if state == State.VALIDATING else [State.CANCELLING, State.CANCELLED]), {}
    if state == State.VALIDATING:
        if outcome.ending == "succeeded":
            raise ValueError("a check does not succeed: say `validated`")
        return [], {}
    if outcome.ending == "succeeded":
        return [State.SUCCEEDED], {"model": outcome.model, "trained_tokens": outcome.trained_tokens}
    if outcome.ending == "paused":
        return [State.PAUSED], {"error_code": outcome.error_code, "error_message": outcome.message or None}
    return [State.PAUSED if state == State.PAUSING else State.QUEUED], {}


def _after_a_crash(state: State, row: Row[Any], outcome: Outcome) -> tuple[list[State], dict[str, Any]]:
    crashes = row.crashes + 1
    if crashes >= MOST_CRASHES:
        last = outcome.message or outcome.error_code or "no reason is known"
        reason = f"it crashed {crashes} times; the last time: {last}"
        failed = {"error_code": "max_attempts", "error_message": reason}
        return [State.FAILED], {"crashes": crashes, **failed}
    if state == State.VALIDATING:
        return [], {"crashes": crashes}
    return [State.PAUSED if state == State.PAUSING else State.QUEUED], {"crashes": crashes}
