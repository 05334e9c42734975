"""Models here are small: with more than one thread they, and the tests beside them, wait for each other."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here no machine loses its power; what is synced, and when, has tests of its own."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
