"""The chunked head held against autograd through log_softmax over all logits at once."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.engines.conftest import Shaped
from tests.unit.engines.tiny import assert_near, load_plain

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch
ROWS, WIDTH, VOCAB = 150, 24, 90


@pytest.fixture(params=["whole", "chunks"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in one go, and once in the smallest chunks there are."""
    from luthier.engines.torch import head

    if request.param == "chunks":
        for name in ("_CHUNK_ELEMENTS", "_CACHE_ELEMENTS"):
            monkeypatch.setattr(head, name, 1)


def draw(targets: int | None) -> tuple[Any, Any, Any]:
    """Hidden states, targets and the slope of a loss by each log-probability."""
    generator = torch.Generator().manual_seed(1)
    shape = (ROWS,) if targets is None else (ROWS, targets)
    hidden = torch.randn(ROWS, WIDTH, generator=generator)
    return hidden, torch.randint(0, VOCAB, shape, generator=generator), torch.randn(shape, generator=generator)


def by_autograd(head: Any, hidden: Any, targets: Any, slope: Any) -> tuple[Any, Any]:
    """The same through all logits at once: log-probabilities and the gradient by hidden states."""
    hidden = hidden.clone().requires_grad_(True)
    logits = head.module(hidden) * head.scale
    if head.softcap:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    logprobs = logits.log_softmax(1).gather(1, targets if targets.dim() == 2 else targets[:, None])
    logprobs = logprobs if targets.dim() == 2 else logprobs[:, 0]
    (logprobs * slope).sum().backward()
    return logprobs.detach(), hidden.grad


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("targets", [None, 1, 3])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (4.0, 1.0), (None, 0.25), (3.0, 2.0)])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_autograd(
    targets: int | None, softcap: float | None, scale: float, bias: bool
) -> None:
    from luthier.engines.torch.head import Head

    torch.manual_seed(3)
    head = Head(torch.nn.Linear(WIDTH, VOCAB, bias=bias), softcap, scale)
    hidden, wanted, slope = draw(targets)
    logprobs, by_hidden = by_autograd(head, hidden, wanted, slope)
    pulled = head.pull(hidden, wanted, slope, head.weight)
    assert_near(pulled[0], logprobs)
    assert_near(pulled[1], by_hidden)
    assert len(pulled[2]) == 1 + bias
    for parameter in head.module.parameters():
        assert_near(pulled[2][parameter], parameter.grad)
    with torch.no_grad():
        scored, hits = head.score(hidden, wanted, with_hits=True)
    assert_near(scored, logprobs)
    if targets is None:
        likeliest = head.module(hidden).argmax(1)
        assert (hits == (likeliest == wanted)).all()
    else:
        assert hits is None


def test_one_target_named_twice_counts_twice() -> None:
    from luthier.engines.torch.head import Head

    head = Head(torch.nn.Linear(WIDTH, VOCAB, bias=False))
    hidden, wanted, slope = draw(2)
    wanted[:, 1] = wanted[:, 0]
    logprobs, by_hidden = by_autograd(head, hidden, wanted, slope)
    pulled = head.pull(hidden, wanted, slope, head.weight)
    assert_near(pulled[0], logprobs)
    assert_near(pulled[1], by_hidden)


def test_a_frozen_weight_gets_no_gradient() -> None:
    from luthier.engines.torch.head import Head

    head = Head(torch.nn.Linear(WIDTH, VOCAB, bias=False).requires_grad_(False))
    assert head.pull(*draw(None), head.weight)[2] == {}


@pytest.mark.parametrize(
    ("kind", "settings", "softcap", "scale"),
    [
        ("gemma2", {}, 5.0, 1.0),
        ("cohere", {"logit_scale": 0.5}, None, 0.5),
        ("granite", {"logits_scaling": 4.0}, None, 0.25),
    ],
)
def test_caps_and_scales_are_found_in_the_config(
    kind: str, settings: dict[str, float], softcap: float | None, scale: float, shaped: Shaped
) -> None:
    from luthier.engines.torch.head import find_head

    model = load_plain(shaped(kind, **settings))
    head = find_head(model)
    assert (head.softcap, head.scale) == (softcap, scale)
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state[0]
        found, _ = head.score(hidden[:-1], tokens[0, 1:], with_hits=False)
        expected = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    assert_near(found, expected)
