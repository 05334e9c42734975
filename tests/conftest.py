"""No test reaches the network, a person's folders or their keys; hypothesis runs by a named profile."""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything imports numpy or torch: workers that each take every core wait for one another most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

from tests.certifying import certify_here

_HERE = Path(__file__).parent
# An assertion that fails outside the test itself shows its values too.
_TESTS = {f"tests.{each.stem}" for each in _HERE.iterdir()}
pytest.register_assert_rewrite(*_TESTS.difference(sys.modules))

settings.register_profile("fast", max_examples=25, deadline=None, derandomize=True)
settings.register_profile(
    "thorough",
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

_KEY_WORDS = ("API_KEY", "_TOKEN", "_SECRET")
_LOOPBACK = ("127.", "::1", "localhost")
# Whole folders and files that load models or start servers in nearly every test: `make test` runs them and
# `make test-fast` does not.
_SLOW_PLACES = (
    "contract/",
    "runs/",
    "service/test_",
    "unit/adapters/",
    "unit/cli/test_chat.py",
    "unit/cli/test_compare.py",
    "unit/cli/test_evaluate.py",
    "unit/cli/test_train.py",
    "unit/engines/",
    "unit/evals/",
    "unit/host/test_hosts.py",
    "unit/jobs/test_job_table.py",
    "unit/training/",
)


def _is_slow(path: Path) -> bool:
    return path.relative_to(_HERE).as_posix().startswith(_SLOW_PLACES)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What `make test-fast` leaves out is not even imported."""
    return True if "not slow" in config.option.markexpr and _is_slow(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _is_slow(item.path):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """What a file's tests imported stays for good: no later look for garbage goes through it again."""
    yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this machine can be reached."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        is_here = self.family == getattr(socket, "AF_UNIX", None) or str(address[0]).startswith(_LOOPBACK)
        assert is_here, f"a test tried to reach {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here)


@pytest.fixture(autouse=True)
def certified_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates are made in this process; that another one finds the same has tests of its own."""
    monkeypatch.setattr("luthier.adapters.verify.certify_in_fresh_process", certify_here)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own, and no keys."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "LUTHIER_HOME", "XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(home))
    for name in list(os.environ):
        if name.endswith(_KEY_WORDS):
            monkeypatch.delenv(name)
    return home
