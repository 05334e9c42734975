"""Linear layers under many adapters: one product with the frozen weight, low-rank updates by whose each row is.

On a CPU a row's result does not depend on the rows beside it: products of 16 rows and more compute each row alike,
smaller ones are padded, and what adds rows up is computed for each adapter by itself. On a GPU the updates of all
adapters are one product over their ranks side by side, of which each row keeps its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from luthier.engines.torch.lora import FrozenLinear, PlainWeight, find_targets, replace_module
from luthier.errors import ModelError, UnsupportedError
from luthier.spec.method import LoraMethod

# Products of fewer ranks may add up in another order; grouped ones want multiples.
RANKS = 8
LEAST_ROWS = 16
_ALIGNED_BYTES = 64


@dataclass
class Low:
    """The low-rank update of one layer by one adapter; a trained one has places in which its gradients add up."""

    down: Tensor
    up: Tensor
    scale: float
    slope_down: Tensor | None = None
    slope_up: Tensor | None = None


@dataclass(frozen=True)
class Stretch:
    """Rows of a pass that lie together and belong to one adapter."""

    adapter: str
    start: int
    stop: int


@dataclass
class Pass:
    """The pass that runs now: whose its rows are, and whether gradients are gathered."""

    stretches: Sequence[Stretch] = ()
    count: int = 0
    trains: bool = False
    anchor: Tensor | None = None
    """Something with a gradient, so that the first layer's backward is not left out."""
    others: dict[tuple[tuple[int, int, int], ...], Tensor] = field(default_factory=dict)
    """By rows and ranks: which ranks are another adapter's than a row's, where all are one product."""


@dataclass(frozen=True)
class _Mine:
    """An update and the rows it is for."""

    low: Low
    rows: slice


@dataclass(frozen=True)
class _Mines:
    """The updates of one layer in a pass."""

    each: list[_Mine]
    now: Pass


class SharedLayers:
    """The linear layers of one model as adapters share them, and the pass that they are in."""

    def __init__(self, model: Any) -> None:
        self.now = Pass()
        self._model = model
        self._layers: dict[str, SharedLinear] = {}
        self.targets = _list_targets(model)
        """What an adapter can be trained for, in the order of the model; the head left out."""
        head = model.get_output_embeddings()
        self.head = next((name for name, module in model.named_modules() if module is head), "")
        """The name of the head; empty where it is no linear layer."""
        if not isinstance(head, nn.Linear | FrozenLinear):
            self.head = ""

    def find(self, name: str) -> SharedLinear:
        """A layer by its name, shared from now on."""
        if name not in self._layers:
            try:
                base = self._model.get_submodule(name)
            except AttributeError:
                base = None
            if not isinstance(base, nn.Linear | FrozenLinear):
                raise ModelError(f"the adapter names `{name}`, which is no linear layer of the base model")
            self._layers[name] = SharedLinear(base, lambda: self.now)
            replace_module(self._model, name, self._layers[name])
        return self._layers[name]

    def forget(self, adapter: str) -> None:
        """Take an adapter's updates out of every layer."""
        for layer in self._layers.values():
            layer.updates.pop(adapter, None)


def _list_targets(model: Any) -> tuple[str, ...]:
    try:
        return tuple(find_targets(model, LoraMethod(kind="lora")))
    except UnsupportedError:
        return ()


class SharedLinear(nn.Module):
    """A frozen linear layer under many adapters, each for rows of its own."""

    def __init__(self, base: nn.Linear | FrozenLinear, now: Callable[[], Pass]) -> None:
        super().__init__()
        self.base, self._now = base, now
        self.updates: dict[str, Low] = {}
        self.in_features, self.out_features = base.in_features, base.out_features
        self.bias = base.bias
        self._frozen = base.base_weight if isinstance(base, FrozenLinear) else PlainWeight(base.weight)

    @property
    def weight(self) -> Tensor:
        """The frozen weight."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        now = self._now()
        mine = self._mine(now, x.numel() // x.shape[-1])
        if now.trains:
            product: Tensor = _SharedProduct.apply(x, now.anchor, self._frozen, self.bias, _Mines(mine, now))
            return product
        result: Tensor = self.base(x)
        if mine:
            add_updates(x.reshape(-1, x.shape[-1]), result.view(-1, result.shape[-1]), mine)
        return result

    def _mine(self, now: Pass, rows: int) -> list[_Mine]:
        """The updates of this layer and their rows; where a row of the pass is a stream, its tokens lie together."""
        each = rows // now.count if now.count else 1
        return [
            _Mine(self.updates[stretch.adapter], slice(stretch.start * each, stretch.stop * each))
            for stretch in now.stretches
            if stretch.adapter in self.updates
        ]


def add_updates(flat: Tensor, result: Tensor, mine: Sequence[_Mine]) -> None:
    """Add updates in place, where no gradient is wanted."""
    for each in mine:
        low, rows = each.low, aligned(flat[each.rows])
        count = len(rows)
        inner = padded(rows) @ low.down.T
        result[each.rows] += (inner @ low.up.T)[:count] * low.scale


class _SharedProduct(torch.autograd.Function):
    """x W^T + bias + each adapter's scale (x A^T) B^T on its rows; gradients of A and B are added where they gather."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor | None, weight: Callable[[], Tensor], bias: Tensor | None, mines: _Mines
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        result = F.linear(x, weight(), bias)
        mine = mines.each
        joined = _join(mine, len(flat), mines.now) if x.is_cuda and len(mine) > 1 else None
        kept = _add_joined(flat, result, joined) if joined else _add_each(flat, result, mine)
        ctx.save_for_backward(flat, *kept)
        ctx.weight, ctx.mine, ctx.joined, ctx.shape = weight, mine, joined, x.shape
        return result

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        flat, *kept = ctx.saved_tensors
        slope = slopes[0].reshape(-1, slopes[0].shape[-1])
        slope_x = slope @ ctx.weight() if ctx.needs_input_grad[0] else None
        if ctx.joined:
            _pull_joined(slope, slope_x, flat, kept[0], ctx.joined)
        else:
            _pull_each(slope, slope_x, flat, kept, ctx.mine)
        return (None if slope_x is None else slope_x.view(ctx.shape)), None, None, None, None


def _add_each(flat: Tensor, result: Tensor, mine: list[_Mine]) -> list[Tensor]:
    out, inners = result.view(len(flat), -1), []
    for each in mine:
        inner = aligned(flat[each.rows]) @ each.low.down.T
        out[each.rows].addmm_(inner, each.low.up.T, alpha=each.low.scale)
        inners.append(inner)
    return inners


def _pull_each(slope: Tensor, slope_x: Tensor | None, flat: Tensor, inners: list[Tensor], mine: list[_Mine]) -> None:
    for each, inner in zip(mine, inners, strict=True):
        through = pull_low(each.low, aligned(slope[each.rows]), aligned(flat[each.rows]), inner)
        if slope_x is not None:
            slope_x[each.rows].addmm_(through, each.low.down)


def pull_low(low: Low, slope: Tensor, rows: Tensor, inner: Tensor) -> Tensor:
    """Gather the gradients of one update from its own rows; returns the slope by what lies between A and B."""
    through = (slope @ low.up) * low.scale
    if low.slope_down is not None and low.slope_up is not None:
        low.slope_down += through.T @ rows
        low.slope_up.add_((slope.T @ inner).to(low.slope_up.dtype), alpha=low.scale)
    return through


# -- all adapters in one product, for a GPU --------------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
    """Updates whose ranks lie side by side, and which of them each row keeps."""

    mine: list[_Mine]
    down: Tensor
    up: Tensor
    """Scaled already."""
    ranks: list[slice]
    others: Tensor
    """True where a rank is another adapter's than the row's."""


def _join(mine: list[_Mine], count: int, now: Pass) -> Joined:
    """One set of ranks for all; each adapter's own are known by their place."""
    starts = [0]
    for each in mine:
        starts.append(starts[-1] + len(each.low.down))
    ranks = [slice(start, stop) for start, stop in pairwise(starts)]
    key = tuple((each.rows.start, each.rows.stop, len(each.low.down)) for each in mine)
    if key not in now.others:
        # Made on the CPU, since a device would be asked for each adapter by itself.
        others = torch.ones(count, starts[-1], dtype=torch.bool)
        for each, own in zip(mine, ranks, strict=True):
            others[each.rows, own] = False
        now.others[key] = others.to(mine[0].low.down.device)
    down = torch.cat([each.low.down for each in mine])
    up = torch.cat([each.low.up * each.low.scale for each in mine], 1)
    return Joined(mine, down, up, ranks, now.others[key])


def _add_joined(flat: Tensor, result: Tensor, joined: Joined) -> list[Tensor]:
    inner = (flat @ joined.down.T).masked_fill_(joined.others, 0)
    result.view(len(flat), -1).addmm_(inner, joined.up.T)
    return [inner]


def _pull_joined(slope: Tensor, slope_x: Tensor | None, flat: Tensor, inner: Tensor, joined: Joined) -> None:
    through = (slope @ joined.up).masked_fill_(joined.others, 0)
    slope_down, slope_up = through.T @ flat, slope.T @ inner
    for each, ranks in zip(joined.mine, joined.ranks, strict=True):
        low = each.low
        if low.slope_down is not None and low.slope_up is not None:
            low.slope_down += slope_down[ranks]
            low.slope_up.add_(slope_up[:, ranks].to(low.slope_up.dtype), alpha=low.scale)
    if slope_x is not None:
        slope_x.addmm_(through, joined.down)


# -- rows as products like them --------------------------------------------------------------------------------


def lacking_rows(count: int) -> int:
    """How many rows of nothing make a product compute each of so few rows as it would among many.

    Products of fewer rows may add up in another order; a thread of its own needs four.
    """
    if torch.get_num_threads() > 2:
        return -count % 16
    return 4 - count if count <= 4 else -count % 8


def aligned(rows: Tensor) -> Tensor:
    """The rows where they lie, or a copy where they begin at an odd place: products may add up otherwise there."""
    return rows if rows.data_ptr() % _ALIGNED_BYTES == 0 and rows.is_contiguous() else rows.clone()


def padded(rows: Tensor) -> Tensor:
    """The rows, and some of zeros where they are few."""
    missing = lacking_rows(len(rows)) if len(rows) < LEAST_ROWS else 0
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows
