"""Models here are small: with more than one thread they, and the tests beside them, wait for each other."""

from __future__ import annotations

import importlib.util
import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here no machine loses its power; what is synced, and when, has tests of its own."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
