"""Draws of one stream: what the limits of a request leave to choose from."""

from __future__ import annotations

import pytest

from luthier.engines.verbs import SampleParams

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


def drawn_of(**limits: float) -> set[int]:
    """Every token that is ever drawn of four."""
    from luthier.engines.torch.stream import Stream

    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    params = (SampleParams(1, 1.0, seed=seed, **limits) for seed in range(200))  # type: ignore[arg-type]
    return {Stream(0, each).draw(logits).token for each in params}


def test_the_limits_leave_the_likeliest() -> None:
    assert drawn_of() == {0, 1, 2, 3}
    assert drawn_of(top_k=2) == {1, 3}
    assert drawn_of(top_p=0.55) == {1, 3}
    assert drawn_of(top_p=0.75) == {1, 2, 3}


def test_top_p_is_a_share_of_what_top_k_left() -> None:
    """The two likeliest have 4 and 3 of 7 then, and 4 of them are more than 0.55."""
    assert drawn_of(top_k=2, top_p=0.55) == {1}
    assert drawn_of(top_k=2, top_p=0.6) == {1, 3}
