"""AdamW with both moments held in 8 bits, block by block: a quarter of the optimizer's memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_BLOCK = 256
# Small tensors (norms, biases) save nothing and lose precision.
_SMALLEST = 4096


class AdamW8bit(torch.optim.Optimizer):
    """AdamW over 8-bit moments: the second is held as its root, which keeps small values from falling to 0."""

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
            state["step"] = torch.zeros(())
        state["step"] += 1
        count, (beta1, beta2) = float(state["step"]), group["betas"]
        gradient = master.grad
        assert gradient is not None
        first = _read(state, "exp_avg", master)
        second = _read(state, "exp_avg_sq", master).square_()
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = second.sqrt()
        master.mul_(1 - group["lr"] * group["weight_decay"])
        divisor = (root / (1 - beta2**count) ** 0.5).add_(group["eps"])
        master.addcdiv_(first, divisor, value=-group["lr"] / (1 - beta1**count))
        _write(state, "exp_avg", first)
        _write(state, "exp_avg_sq", root)


def _read(state: dict[str, Tensor], name: str, master: Tensor) -> Tensor:
    if name not in state:
        return torch.zeros_like(master)
    codes = state[name]
    if codes.dtype == torch.float32:
        return codes.clone()
    # Squares spend more of the codes on small values, where moments mostly lie.
    share = codes.float().div_(127)
    return (share.abs() * share * state[f"{name}_scale"]).view(-1)[: master.numel()].view_as(master)


def _write(state: dict[str, Tensor], name: str, values: Tensor) -> None:
    if values.numel() < _SMALLEST:
        state[name] = values
        return
    flat = torch.nn.functional.pad(values.reshape(-1), (0, -values.numel() % _BLOCK)).view(-1, _BLOCK)
    scale = flat.abs().amax(1, keepdim=True)
    share = flat / scale.clamp_min(torch.finfo(torch.float32).tiny)
    codes = (share.abs().sqrt() * 127).ceil_().mul_(share.sign())
    state[name], state[f"{name}_scale"] = codes.to(torch.int8), scale
