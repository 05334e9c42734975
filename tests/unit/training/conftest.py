"""Runs in this process use one thread: more make products this small slower, and the tests beside them too."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The same under a short name."""
    return monkeypatch


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here no machine loses its power; what is synced, and when, has tests of its own."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
