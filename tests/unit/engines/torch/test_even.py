"""An activation gives a number the same wherever it stands, with any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.torch


@pytest.fixture
def threads() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_a_number_is_the_same_wherever_it_stands() -> None:
    import torch
    from torch import nn

    from luthier.engines.torch.even import Even

    torch.manual_seed(0)
    for activation in (nn.SiLU(), nn.GELU(approximate="tanh")):
        x = torch.randn(1007, 103)
        whole = Even(activation)(x)
        slope = torch.randn(1007, 103)
        pulled = x.clone().requires_grad_(True)
        Even(activation)(pulled).backward(slope)
        assert pulled.grad is not None
        for start, stop in ((0, 1), (7, 500), (333, 1007), (1000, 1007)):
            part = x[start:stop].clone().requires_grad_(True)
            found = Even(activation)(part)
            found.backward(slope[start:stop])
            assert torch.equal(found, whole[start:stop])
            assert part.grad is not None
            assert torch.equal(part.grad, pulled.grad[start:stop])


@given(st.integers(1, 1 << 22), st.integers(1, 64))
def test_shares_are_whole(count: int, threads: int) -> None:
    from luthier.engines.torch.even import lacking_numbers, shared_by

    lacking = lacking_numbers(count, threads)
    assert (count + lacking) % shared_by(count + lacking, threads) == 0
    assert lacking < 2 * threads * 32_768
