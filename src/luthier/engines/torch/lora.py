"""LoRA layers: one fused function for the frozen product and the low-rank update, with exact, seeded dropout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from luthier.data.hashes import mix
from luthier.engines.drawing import dropout_starts, dropped_below, first_values, site_of
from luthier.errors import UnsupportedError
from luthier.spec.method import AdapterKeys
from luthier.weights.tensors import is_adaptable, is_in_last_layers, is_named, is_of_experts, layer_number

_FLOAT = torch.float32

Numbers = npt.NDArray[Any]


@dataclass
class Dropout:
    """Which inputs are left out: a function of seed, step, row and site alone, however rows share a batch."""

    share: float
    seed: int
    _starts: Numbers | None = None
    """Where the random numbers of each token of the batch begin; None while nothing is dropped."""

    def start(self, rows: list[tuple[int, int]]) -> None:
        """Drop in the passes that follow; `rows` are (key of the row and step, tokens) in the order of the batch."""
        if self.share > 0:
            self._starts = dropout_starts(rows, self.seed)

    def stop(self) -> None:
        """Drop nothing, as in evaluation and sampling."""
        self._starts = None

    def mask(self, site: int, like: Tensor) -> Tensor | None:
        """What each input is multiplied by: 0, or what makes up for those left out."""
        if self._starts is None:
            return None
        width = like.shape[-1]
        words: Numbers = self._starts[:, None] + np.arange(-(-width // 8), dtype=np.uint64)
        drawn = torch.from_numpy(mix(words, site).view(np.uint8)[:, :width]).to(like.device)
        limit = dropped_below(self.share)
        return drawn.ge(limit).to(like.dtype).mul_(256 / (256 - limit))


class FrozenLinear(nn.Module):
    """A linear layer whose weight is drawn from elsewhere each time, such as from 4 bits."""

    def __init__(self, base: nn.Linear, weight: Callable[[], Tensor]) -> None:
        super().__init__()
        self.base_weight, self.bias = weight, base.bias
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _FrozenProduct.apply(x, self.base_weight, self.bias)
        return result

    @property
    def weight(self) -> Tensor:
        """The weight, for models that do not only call the layer."""
        return self.base_weight()


class _FrozenProduct(torch.autograd.Function):
    """x W^T + bias with the weight drawn again in the backward pass instead of kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight(), bias)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        return slopes[0] @ ctx.weight(), None, None


class LoraLinear(nn.Module):
    """A frozen linear layer and its trained low-rank update, in the place of the layer it wraps."""

    def __init__(self, base: nn.Linear | FrozenLinear, rank: int, scale: float, dropout: Dropout, site: int) -> None:
        super().__init__()
        self.base_weight = base.base_weight if isinstance(base, FrozenLinear) else PlainWeight(base.weight)
        self.bias = None if base.bias is None else base.bias.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        device = self.base_weight().device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=_FLOAT, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=_FLOAT, device=device))
        self.scale, self.dropout, self.site = scale, dropout, site

    def start(self, seed: int, name: str) -> None:
        """The adapter's first values: uniform A as PEFT has it, zero B; a function of seed and name."""
        with torch.no_grad():
            self.lora_A.copy_(torch.from_numpy(first_values(seed, name, *self.lora_A.shape)))
            self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        frozen = _Frozen(self.base_weight, self.bias, self.scale, self.dropout.mask(self.site, x))
        result: Tensor = _LoraProduct.apply(x, self.lora_A, self.lora_B, frozen)
        return result

    @property
    def weight(self) -> Tensor:
        """The weight with its update, for models that do not only call the layer."""
        return self.whole_weight()

    def whole_weight(self) -> Tensor:
        """The weight with its update, for the few places that need it whole."""
        update = (self.lora_B @ self.lora_A) * self.scale
        base = self.base_weight()
        return (base.to(_FLOAT) + update).to(base.dtype)


class PlainWeight:
    """A frozen weight that lies in memory as it is used."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()

    def __call__(self) -> Tensor:
        return self.weight


@dataclass(frozen=True)
class _Frozen:
    """What the product needs and autograd need not know."""

    weight: Callable[[], Tensor]
    bias: Tensor | None
    scale: float
    mask: Tensor | None

    def dropped(self, x: Tensor) -> Tensor:
        """The input with what dropout leaves out."""
        return x if self.mask is None else x * self.mask


class _LoraProduct(torch.autograd.Function):
    """x W^T + bias + scale (dropout(x) A^T) B^T; the weight gets no gradient and is not kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, frozen: _Frozen) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        # In the shape of the input, since a view of it could not be changed in place as some models do.
        result = F.linear(x, frozen.weight(), frozen.bias)
        inner = frozen.dropped(flat) @ a.to(x.dtype).T
        result.view(len(flat), -1).addmm_(inner, b.to(x.dtype).T, alpha=frozen.scale)
        ctx.save_for_backward(flat, a, b, inner)
        ctx.frozen, ctx.shape = frozen, x.shape
        return result

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        flat, a, b, inner = ctx.saved_tensors
        frozen: _Frozen = ctx.frozen
        slope = slopes[0].reshape(-1, slopes[0].shape[-1])
        through = (slope @ b.to(slope.dtype)) * frozen.scale
        slope_a = (through.T @ frozen.dropped(flat)).to(a.dtype)
        slope_b = (slope.T @ inner).to(b.dtype) * frozen.scale
        slope_x = None
        if ctx.needs_input_grad[0]:
            slope_x = slope @ frozen.weight()
            if frozen.mask is None:
                slope_x.addmm_(through, a.to(slope.dtype))
            else:
                slope_x += (through @ a.to(slope.dtype)).mul_(frozen.mask)
            slope_x = slope_x.view(ctx.shape)
        return slope_x, slope_a, slope_b, None


def find_targets(model: Any, method: AdapterKeys) -> list[str]:
    """Full names of the linear layers that the method adapts; each name asked for must be found, and be linear."""
    wanted = method.targets
    has_experts = any(is_of_experts(name) for name, _ in model.named_parameters())
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | FrozenLinear)]
    known = [name for name in linears if is_adaptable(name, has_experts=has_experts)]
    if isinstance(wanted, list):
        # A head can be named, though `auto` leaves it out.
        known += [name for name in linears if layer_number(name) is None]
        known = [name for name in known if any(is_named(name, target) for target in wanted)]
    layers = 1 + max((layer_number(name) or 0 for name, _ in model.get_decoder().named_modules()), default=0)
    chosen = [name for name in known if is_in_last_layers(name, method.last_layers, layers)]
    for name in wanted if isinstance(wanted, list) else []:
        if not any(is_named(found, name) for found in known):
            raise _not_linear(model, name)
    if not chosen:
        raise UnsupportedError(
            "no linear layer to adapt was found in this model",
            hint='name them in method.targets, or set method.kind = "full"',
        )
    return chosen


def _not_linear(model: nn.Module, name: str) -> UnsupportedError:
    found = [type(module).__name__ for path, module in model.named_modules() if is_named(path, name)]
    found += ["a parameter of its own" for path, _ in model.named_parameters() if is_named(path, name)]
    what = f"is {found[0]}, not a linear layer" if found else "is no layer of this model"
    return UnsupportedError(
        f"method.targets: `{name}` {what}",
        hint='leave targets out, or set "auto": every linear layer but the head is found',
    )


def adapt(model: Any, method: AdapterKeys, seed: int) -> dict[str, LoraLinear]:
    """Put LoRA layers in the place of the targets; everything else is frozen."""
    model.requires_grad_(False)
    scale = method.alpha / (math.sqrt(method.rank) if method.rslora else method.rank)
    dropout = Dropout(method.dropout, seed)
    layers: dict[str, LoraLinear] = {}
    for name in find_targets(model, method):
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear | FrozenLinear)
        layer = LoraLinear(base, method.rank, scale, dropout, site_of(name))
        layer.start(seed, name)
        replace_module(model, name, layer)
        layers[name] = layer
    return layers


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def lora_layers(model: nn.Module) -> Iterator[LoraLinear]:
    """The LoRA layers of a model."""
    return (module for module in model.modules() if isinstance(module, LoraLinear))
