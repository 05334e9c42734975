"""AdamW with both moments held in 8 bits, block by block: a quarter of the optimizer's memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_BLOCK = 256
# Numbers worked on at once: what they need on the way stays in the processor's cache.
_CHUNK = 1 << 20
# Small tensors (norms, biases) save nothing and lose precision.
_SMALLEST = 4096
# A code c stands for (c / 127) ** (2 ** roots) of the block's largest value, so that small values keep some digits.
_ROOTS = {"exp_avg": 2, "exp_avg_sq": 3}
_GOLDEN = 0.6180339887498949


class AdamW8bit(torch.optim.Optimizer):
    """AdamW over 8-bit moments.

    A moment moves by less than the width of a code in one step, so codes are rounded up or down in turn, as often as
    keeps the moment right in the long run: rounding to the nearest would hold it still, and rounding up lets it grow.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 1e-3, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step by the gradients that are there."""
        for group in self.param_groups:
            for master in group["params"]:
                if master.grad is not None:
                    self._step_one(master, group)

    def _step_one(self, master: Tensor, group: dict[str, Any]) -> None:
        state = self.state[master]
        if not state:
            _start(state, master)
        state["step"] += 1
        assert master.grad is not None
        values, gradient = master.view(-1), master.grad.reshape(-1)
        for start in range(0, len(values), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            _step_chunk(state, chunk, values[chunk], gradient[chunk], group)


def _start(state: dict[str, Tensor], master: Tensor) -> None:
    state["step"] = torch.zeros(())
    for name in _ROOTS:
        if master.numel() < _SMALLEST:
            state[name] = torch.zeros(master.numel(), device=master.device)
        else:
            blocks = -(-master.numel() // _BLOCK)
            state[name] = torch.zeros(blocks, _BLOCK, dtype=torch.int8, device=master.device)
            state[f"{name}_scale"] = torch.zeros(blocks, 1, device=master.device)


def _step_chunk(
    state: dict[str, Tensor], chunk: slice, values: Tensor, gradient: Tensor, group: dict[str, Any]
) -> None:
    count, (beta1, beta2) = float(state["step"]), group["betas"]
    first, second = (_read(state, name, chunk, len(values)) for name in _ROOTS)
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    values.mul_(1 - group["lr"] * group["weight_decay"])
    divisor = second.sqrt().div_((1 - beta2**count) ** 0.5).add_(group["eps"])
    values.addcdiv_(first, divisor, value=-group["lr"] / (1 - beta1**count))
    _write(state, "exp_avg", chunk, first)
    _write(state, "exp_avg_sq", chunk, second)


def _blocks(chunk: slice) -> slice:
    return slice(chunk.start // _BLOCK, chunk.stop // _BLOCK)


def _read(state: dict[str, Tensor], name: str, chunk: slice, count: int) -> Tensor:
    codes = state[name]
    if codes.dtype == torch.float32:
        return codes[chunk].clone()
    share = codes[_blocks(chunk)].float().div_(127)
    values = _spread(share.abs(), name).mul_(state[f"{name}_scale"][_blocks(chunk)]).copysign_(share)
    return values.view(-1)[:count]


def _spread(codes: Tensor, name: str) -> Tensor:
    """What codes between 0 and 1 stand for; in place."""
    for _ in range(_ROOTS[name]):
        codes.square_()
    return codes


def _write(state: dict[str, Tensor], name: str, chunk: slice, values: Tensor) -> None:
    if state[name].dtype == torch.float32:
        state[name][chunk] = values
        return
    flat = torch.nn.functional.pad(values, (0, -len(values) % _BLOCK)).view(-1, _BLOCK)
    scale = flat.abs().amax(1, keepdim=True)
    share = flat.abs().div_(scale.clamp_min(torch.finfo(torch.float32).tiny))
    low = share.clone()
    for _ in range(_ROOTS[name]):
        low.sqrt_()
    low.mul_(127).floor_()
    below, above = _spread(low / 127, name), _spread((low + 1) / 127, name)
    low += (share - below).div_(above.sub_(below)) > _turns(state["step"], share.device)
    if name == "exp_avg_sq":
        low.clamp_min_(1)  # a second moment of 0 would make its step huge
    state[name][_blocks(chunk)] = low.clamp_max_(127).copysign_(flat).to(torch.int8)
    state[f"{name}_scale"][_blocks(chunk)] = scale


def _turns(step: Tensor, device: torch.device) -> Tensor:
    """Numbers between 0 and 1 for the places of a block, each of which is spread evenly over the steps."""
    places = torch.arange(_BLOCK, dtype=torch.float64) * 0.7548776662466927
    return (places + float(step) * _GOLDEN).frac_().float().to(device)
