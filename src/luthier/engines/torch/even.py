"""Activations that give each number the same whatever its place in the batch.

Some kernels compute the last few of each thread's share in another way than the rest.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from luthier.engines.torch.lora import replace_module

# What torch gives a thread at least, beyond how many numbers some kernels take all threads, and how many they take at
# a time.
_SHARE = 32_768
_MANY = 16_384
_TAKEN = 64


class Even(nn.Module):
    """An activation over some numbers more than there are, so that every thread's share is whole."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        count = x.numel()
        more = 0 if x.is_cuda else lacking_numbers(count, torch.get_num_threads())
        if not more:
            return self.activation(x)  # type: ignore[no-any-return]
        whole: Tensor = self.activation(F.pad(x.reshape(-1), (0, more)))
        return whole[:count].view(x.shape)


def lacking_numbers(count: int, threads: int) -> int:
    """How many more numbers make the share of every thread whole."""
    total = count
    while lacking := -total % shared_by(total, threads):
        total += lacking
    return total - count


def shared_by(total: int, threads: int) -> int:
    """What so many numbers must be a multiple of: of both numbers of shares into which kernels cut them."""
    some = max(1, min(threads, -(-total // _SHARE)))
    return _TAKEN * math.lcm(some, threads if total > _MANY else 1)


def even_out(model: Any) -> None:
    """All activations of a model that are modules."""
    from transformers.activations import ACT2CLS

    kinds: Any = tuple({each[0] if isinstance(each, tuple) else each for each in ACT2CLS.values()})
    found = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    for name, module in found.items():
        replace_module(model, name, Even(module))
