"""Batches as the protocol's data, through the SDK's own encoding and our reader of it, and back."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.engines.tinker.datums import MOST_TARGETS, build_data, list_asked, read_logprobs
from luthier.engines.verbs import Batch
from luthier.host.datums import Datum, read_loss_request
from luthier.training.batches import build_batch
from tests.unit.engines.tiny import draw_items

pytest.importorskip("tinker")


def send(batch: Batch, weights: np.ndarray | None) -> tuple[Datum, ...]:
    """What a service reads of a batch."""
    from tinker.proto.request_conv import forward_backward_request_to_proto
    from tinker.types import ForwardBackwardInput
    from tinker.types.forward_backward_request import ForwardBackwardRequest

    data = build_data(list_asked(batch), weights)
    asked = ForwardBackwardInput(data=data, loss_fn="cross_entropy")
    request = ForwardBackwardRequest(forward_backward_input=asked, model_id="m", seq_id=1)
    return read_loss_request(forward_backward_request_to_proto(request).SerializeToString()).data


def answer(data: tuple[Datum, ...]) -> list[dict[str, object]]:
    """A service whose log-probabilities tell place and target."""
    from tinker import types

    found: list[dict[str, object]] = []
    for datum in data:
        targets = datum.inputs["target_tokens"]
        places = np.arange(len(targets), dtype=np.float32).reshape(-1, *[1] * (targets.ndim - 1))
        found.append({"logprobs": types.TensorData.from_numpy((places * 1000 + targets).astype(np.float32))})
    return found


def test_each_sequence_is_one_datum_with_weights_where_it_is_trained() -> None:
    items = draw_items(7, (6, 4, 5), 3)
    batch = build_batch(items)
    weights = np.arange(1.0, len(batch.targets) + 1)
    data = send(batch, weights)
    sequences = [sequence for item in items for sequence in item.sequences]
    trained = [places for item in items for places in item.trained]
    assert len(data) == len(sequences)
    assert sum(float(datum.inputs["weights"].sum()) for datum in data) == weights.sum()
    for datum, sequence, places in zip(data, sequences, trained, strict=True):
        length = int(places.max())
        assert datum.tokens.tolist() == sequence[:length].tolist()
        assert datum.inputs["target_tokens"].tolist() == sequence[1 : length + 1].tolist()
        assert np.flatnonzero(datum.inputs["weights"]).tolist() == (places - 1).tolist()


def test_results_come_back_to_where_they_were_asked() -> None:
    batch = build_batch(draw_items(7, (6, 4, 5), 3))
    found = read_logprobs(list_asked(batch), answer(send(batch, None)), batch.targets.shape)
    expected = [part.sources * 1000 + part.targets for part in batch.alone()]
    assert found.tolist() == np.concatenate(expected).tolist()


def test_a_sequence_that_asks_for_nothing_is_not_sent() -> None:
    item = draw_items(5)[0]
    bare = type(item)(item.example, item.sequences, (np.zeros(0, np.int64),))
    assert list_asked(build_batch([bare])) == []
    assert len(list_asked(build_batch([bare, item]))) == 1


@pytest.mark.parametrize("width", [3, MOST_TARGETS + 5])
def test_many_targets_of_a_place_lie_sparsely_and_are_spread(width: int) -> None:
    tokens = np.arange(20, 28)
    sources, whole = np.array([4, 7]), np.array([[0, 8]])
    targets = np.arange(2 * width).reshape(2, width)
    batch = Batch(tokens, whole, np.zeros_like(whole), sources, targets, np.array([0, 2]), np.zeros(1, np.int64))
    data = send(batch, np.ones(targets.size))
    assert len(data) == -(-width // MOST_TARGETS)
    assert sum(int(datum.inputs["weights"].sum()) for datum in data) == targets.size
    found = read_logprobs(list_asked(batch), answer(data), targets.shape)
    assert found.tolist() == (sources[:, None] * 1000 + targets).tolist()


def test_one_place_asked_twice_has_two_targets() -> None:
    tokens, whole = np.arange(20, 26), np.array([[0, 6]])
    sources, targets = np.array([1, 1, 3]), np.array([9, 8, 7])
    batch = Batch(tokens, whole, np.zeros_like(whole), sources, targets, np.array([0, 3]), np.zeros(1, np.int64))
    data = send(batch, np.array([0.5, -2.0, 3.0]))
    assert data[0].inputs["weights"].tolist() == [[0, 0], [0.5, -2.0], [0, 0], [3.0, 0]]
    assert read_logprobs(list_asked(batch), answer(data), (3,)).tolist() == [1009.0, 1008.0, 3007.0]


def test_an_answer_of_another_shape_is_an_error() -> None:
    batch = build_batch(draw_items(7, 4))
    with pytest.raises(ValueError, match="2 data were sent, and 1 records"):
        read_logprobs(list_asked(batch), answer(send(batch, None))[:1], batch.targets.shape)
