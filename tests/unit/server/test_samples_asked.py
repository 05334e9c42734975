"""What a request for samples may ask: stops of a few words, and lists of tokens that travel as numbers."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.errors import CallError, LuthierError
from luthier.host.protobuf import Message
from luthier.host.tensors import read_tensor
from luthier.server.problems import status_of
from luthier.server.routes.tinker.asked import SampleAsked
from luthier.server.routes.tinker.sampling import _read_stops, _read_targets


@pytest.mark.parametrize("stop", ["", "x" * 1001, ["a", "x" * 1001], ["a", ""], ["a"] * 65, list(range(65))])
def test_stops_are_few_and_short(stop: str | list[str] | list[int]) -> None:
    with pytest.raises(LuthierError) as raised:
        _read_stops(stop)
    assert status_of(raised.value) == 400


def test_stops_are_texts_or_tokens() -> None:
    assert _read_stops("x" * 1000)["stop_texts"] == ["x" * 1000]
    assert _read_stops([7, 8]) == {"stop_texts": [], "stop_tokens": [7, 8], "with_stops": True}
    assert _read_stops(None)["with_stops"]
    assert not _read_stops([])["with_stops"]


def test_targets_travel_as_numbers() -> None:
    assert _read_targets(SampleAsked(prompt={})) == b""
    tensor = {"data": [4, -1, 6, 7], "dtype": "int64", "shape": [2, 2]}
    found = read_tensor(Message(_read_targets(SampleAsked(prompt={}, target_prompt_logprobs=tensor))))
    assert isinstance(found, np.ndarray)
    assert found.tolist() == [[4, -1], [6, 7]]
    with pytest.raises(CallError, match="target_prompt_logprobs"):
        _read_targets(SampleAsked(prompt={}, target_prompt_logprobs={**tensor, "shape": [3, 2]}))
