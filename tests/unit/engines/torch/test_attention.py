"""Packed attention held against transformers' own, unpacked and padded, on eight architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.engines.verbs import Batch
from luthier.errors import UnsupportedError
from luthier.training.batches import build_batch
from tests.unit.engines.conftest import Shaped
from tests.unit.engines.tiny import (
    EXPERTS,
    HYBRIDS,
    OLDER,
    SHAPES,
    VOCAB,
    WINDOW,
    apart,
    assert_near,
    assert_same_gradients,
    build_engine,
    draw_items,
    every_place,
    gradients_of,
    imitation,
    load_plain,
    make_plan,
    start_update,
)

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch
LENGTHS = (23, 9, 14, 5)


def plain_logits(model: Any, sequence: np.ndarray) -> Any:
    return model(torch.from_numpy(sequence)[None], use_cache=False).logits[0].float()


def packed(sequences: list[np.ndarray]) -> Batch:
    """A batch of several sequences that asks for every token at every place."""
    each = [every_place(sequence) for sequence in sequences]
    ends = np.cumsum([0, *(len(sequence) for sequence in sequences)])
    segments = np.stack([ends[:-1], ends[1:]], 1)
    tokens = np.concatenate(sequences)
    return Batch(
        tokens,
        segments,
        np.zeros_like(segments),
        np.arange(len(tokens)),
        np.concatenate([one.targets for one in each]),
        ends,
        np.arange(len(sequences)),
    )


@pytest.mark.parametrize("kind", [*SHAPES, *EXPERTS, *HYBRIDS, *OLDER])
def test_packed_is_plain_transformers_unpacked_and_padded(kind: str, shaped: Shaped, own_home: Path) -> None:
    engine = build_engine(shaped(kind), own_home)
    assert engine.facts.is_packed is (kind in {**SHAPES, **EXPERTS})
    sequences = [item.sequences[0] for item in draw_items(*LENGTHS)]
    found = engine.forward(packed(sequences)).result().logprobs
    attentions = ["eager"] if kind == "gemma2" or kind in OLDER else ["eager", "sdpa"]
    for attention in attentions:
        model = load_plain(shaped(kind), attention=attention)
        with torch.no_grad():
            alone = torch.cat([plain_logits(model, sequence).log_softmax(-1) for sequence in sequences])
            width = max(LENGTHS)
            ids = torch.tensor([[*sequence, *[0] * (width - len(sequence))] for sequence in sequences])
            seen = torch.tensor([[1] * length + [0] * (width - length) for length in LENGTHS])
            padded = model(ids, attention_mask=seen).logits.float().log_softmax(-1)
        assert_near(found, alone)
        assert_near(found, torch.cat([padded[row, :length] for row, length in enumerate(LENGTHS)]))


@pytest.mark.parametrize("kind", [*SHAPES, *EXPERTS, *HYBRIDS, *OLDER, "phi"])
def test_loss_and_every_gradient_are_those_of_plain_transformers(kind: str, shaped: Shaped, own_home: Path) -> None:
    engine = build_engine(shaped(kind), own_home, make_plan("full"))
    items = draw_items(*LENGTHS)
    batch, loss = imitation(items, scale=1 / sum(item.trained_tokens for item in items))
    computed = engine.forward_backward(batch, loss).result()
    model = load_plain(shaped(kind))
    total = 0.0
    for item in items:
        sequence, places = item.sequences[0], item.trained[0]
        labels = torch.full((1, len(sequence)), -100)
        labels[0, places] = torch.from_numpy(sequence[places])
        ids = torch.from_numpy(sequence)[None]
        share = model(input_ids=ids, labels=labels, num_items_in_batch=len(batch.targets)).loss
        share.backward()
        total += share.item()
    assert computed.value / len(batch.targets) == pytest.approx(total, rel=1e-5)
    expected = {name: each.grad.numpy() for name, each in model.named_parameters() if each.grad is not None}
    assert_same_gradients(gradients_of(engine), expected)


@pytest.mark.parametrize("kind", [*SHAPES, "lfm2"])
def test_a_shared_prompt_is_the_two_sequences_apart(kind: str, shaped: Shaped, own_home: Path) -> None:
    engine = build_engine(shaped(kind), own_home)
    start_update(engine)
    items = draw_items((11, 4, 9), (3, 6, 2), (1, 5, 5), seed=3)
    assert [item.shared for item in items] == [11, 3, 1]
    batch, loss = imitation(items)
    other_batch, other_loss = imitation(apart(items))
    assert len(batch.tokens) == len(other_batch.tokens) - 15
    computed = engine.forward_backward(batch, loss).result()
    found = gradients_of(engine)
    expected = engine.forward_backward(other_batch, other_loss).result()
    assert_near(computed.logprobs, expected.logprobs)
    assert_same_gradients(found, gradients_of(engine))
    assert_near(engine.forward(batch).result().logprobs, expected.logprobs)


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3_text", "phi3", "qwen2"])
def test_windows_are_seen_and_not_only_passed_on(kind: str, shaped: Shaped, own_home: Path) -> None:
    """The last token does not see the first one directly, so in one layer it cannot depend on it."""
    layers = {"layer_types": ["sliding_attention"]} if "layer_types" in SHAPES[kind] else {}
    engine = build_engine(shaped(kind, num_hidden_layers=1, **layers), own_home)
    tokens = np.arange(3, 3 + WINDOW + 1)
    other = np.array([99, *tokens[1:]])
    last = [engine.forward(every_place(each)).result().logprobs[-1] for each in (tokens, other)]
    assert_near(last[0], last[1], 1e-7)
    before = [engine.forward(every_place(each[:-1])).result().logprobs[-1] for each in (tokens, other)]
    assert np.abs(before[0] - before[1]).max() > 1e-3


def test_micro_batches_change_nothing(shaped: Shaped, own_home: Path) -> None:
    engine = build_engine(shaped("qwen3"), own_home)
    start_update(engine)
    items = draw_items(7, 19, 12, 4, 9, 30, seed=2)
    engine.forward_backward(*imitation(items)).result()
    whole = gradients_of(engine)
    for groups in ([[0], [1], [2], [3], [4], [5]], [[5, 0], [3, 1, 4, 2]]):
        for group in groups:
            engine.forward_backward(*imitation([items[place] for place in group])).result()
        assert_same_gradients(gradients_of(engine), whole)


def test_recomputing_changes_nothing(shaped: Shaped, own_home: Path) -> None:
    plans = [make_plan(compute={"recompute": each}, keys={"dropout": 0.2}) for each in ("never", "always")]
    found = []
    for plan in plans:
        engine = build_engine(shaped("gemma3_text"), own_home, plan)
        start_update(engine)
        batch, loss = imitation(draw_items(*LENGTHS))
        value = engine.forward_backward(batch, loss).result().value
        found.append((value, gradients_of(engine)))
    assert found[0][0] == found[1][0]
    assert_same_gradients(found[0][1], found[1][1], 1e-6)


def test_what_packed_attention_lacks_is_refused() -> None:
    from luthier.engines.torch.attention import packed_attention

    tensor = torch.zeros(1, 1, 2, 4)
    for name in ("s_aux", "position_bias"):
        with pytest.raises(UnsupportedError, match=name):
            packed_attention(torch.nn.Module(), tensor, tensor, tensor, **{name: tensor})


def test_positions_restart_in_each_segment_and_go_on_after_a_prefix() -> None:
    batch = build_batch(draw_items(4, (3, 2, 4)))
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 3, 4, 5, 6]
    assert [each.positions.tolist() for each in batch.alone()] == [[*range(4)], [*range(5)], [*range(7)]]
    assert batch.tokens.max() < VOCAB


LONG, STRETCHED = 40, {"rope_theta": 10000.0, "original_max_position_embeddings": 40}
STRETCHES = {
    "longrope": ("phi3", {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}),
    "dynamic": ("llama", {"factor": 4.0}),
}


def stretching(shaped: Shaped, name: str) -> Path:
    """A model whose positions are stretched beyond so many tokens."""
    kind, table = STRETCHES[name]
    more = {"original_max_position_embeddings": LONG} if name == "longrope" else {"max_position_embeddings": LONG}
    return shaped(kind, rope_parameters={"rope_type": name, **STRETCHED, **table}, sliding_window=None, **more)


def test_a_long_sequence_does_not_stretch_the_positions_of_others(shaped: Shaped, own_home: Path) -> None:
    folder = stretching(shaped, "longrope")
    engine = build_engine(folder, own_home)
    assert engine.facts.is_packed
    sequences = [item.sequences[0] for item in draw_items(47, 9, LONG, LONG + 1)]
    model = load_plain(folder)
    with torch.no_grad():
        alone = torch.cat([plain_logits(model, sequence).log_softmax(-1) for sequence in sequences])
    assert_near(engine.forward(packed(sequences)).result().logprobs, alone)
    computed = engine.forward_backward(*imitation(draw_items(47, 9))).result()
    apart = [engine.forward_backward(*imitation([item])).result().logprobs for item in draw_items(47, 9)]
    assert_near(computed.logprobs, np.concatenate(apart))


def test_positions_that_depend_on_what_was_seen_before_are_refused(shaped: Shaped, own_home: Path) -> None:
    engine = build_engine(stretching(shaped, "dynamic"), own_home)
    engine.forward(every_place(np.arange(3, 3 + LONG))).result()
    with pytest.raises(UnsupportedError, match="longest sequence"):
        engine.forward(every_place(np.arange(3, 4 + LONG)))
