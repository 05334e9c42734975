"""Eight clients of different ranks, layouts and losses leave the same adapters alone and together, bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.service.tinker.sdk import run_client, serve_practice

pytest.importorskip("tinker")
pytestmark = pytest.mark.slow


def test_eight_clients_leave_the_adapters_that_each_leaves_alone(tmp_path: Path) -> None:
    with serve_practice(tmp_path) as served:
        found = run_client("sdk_tenants.py", served, tmp_path)
    assert len(set(found["alone"])) == 8
    assert found["together"] == found["alone"]
