"""Certificates made in this process: what a test trains is certified in a moment, without another process's start."""

from __future__ import annotations

from collections.abc import Callable

from luthier.adapters import verify
from luthier.adapters.certificate import Certificate
from luthier.adapters.claims import Order, gather_claims
from luthier.adapters.merge import Stopped


def certify_here(order: Order, should_stop: Callable[[], bool] | None = None) -> Certificate:
    """What the fresh process would find."""
    if should_stop and should_stop():
        raise Stopped
    return gather_claims(order)


def never_start_a_process() -> None:
    """From now on, in this process and its forks."""
    verify.certify_in_fresh_process = certify_here
