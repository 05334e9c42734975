"""The optimizer step: fp32 masters and moments for every trained weight, gradients gathered in fp32, steps refused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from luthier.engines.torch.eight_bit import AdamW8bit
from luthier.engines.verbs import StepParams, StepTaken

_FIRST_SCALE = 2.0**16


class Masters:
    """What is trained: each weight with its fp32 master, in which gradients gather and steps are taken."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.names = list(parameters)
        self.weights = list(parameters.values())
        self.masters = [_master(weight) for weight in self.weights]
        for weight, master in zip(self.weights, self.masters, strict=True):
            if master is not weight:
                weight.register_post_accumulate_grad_hook(_gatherer(master))

    def named(self) -> dict[str, Tensor]:
        """The masters by name."""
        return dict(zip(self.names, (master.detach() for master in self.masters), strict=True))

    def publish(self) -> None:
        """Bring the weights the model computes with up to their masters."""
        apart = [
            (weight, master) for weight, master in zip(self.weights, self.masters, strict=True) if weight is not master
        ]
        if apart:
            with torch.no_grad():
                torch._foreach_copy_([weight for weight, _ in apart], [master for _, master in apart])

    def gradients(self) -> list[Tensor]:
        """The gradients that there are."""
        return [master.grad for master in self.masters if master.grad is not None]

    def clear(self) -> None:
        """Forget the gradients."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.grad = master.grad = None


def _master(weight: nn.Parameter) -> nn.Parameter:
    return weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float().clone())


def _gatherer(master: nn.Parameter) -> Any:
    def gather(weight: Tensor) -> None:
        gradient = weight.grad
        weight.grad = None
        if gradient is None:
            return
        if master.grad is None:
            master.grad = gradient.float()
        else:
            master.grad.add_(gradient)

    return gather


def build_optimizer(kind: str, masters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a name; rates and decay are set at each step."""
    weights = list(masters)
    if kind == "adafactor":
        from transformers.optimization import Adafactor

        # That of torch takes a rate as a share of each weight's size, which a LoRA's zeros would never leave.
        return Adafactor(weights, lr=1e-3, scale_parameter=False, relative_step=False)
    if kind == "adamw_8bit":
        return AdamW8bit(weights)
    build = torch.optim.AdamW if kind == "adamw" else torch.optim.Adam
    return build(weights, fused=True)


class Stepper:
    """Takes one step at a time over the masters, or refuses to."""

    def __init__(self, kind: str, masters: Masters, *, scales_loss: bool = False) -> None:
        self.masters = masters
        self.optimizer = build_optimizer(kind, masters.masters)
        self.loss_scale = _FIRST_SCALE if scales_loss else 1.0
        self._scales_loss = scales_loss
        self._good_steps = 0

    def step(self, params: StepParams) -> StepTaken:
        """One step by the gradients gathered; refused when they are not finite."""
        gradients = self.masters.gradients()
        norm = self._norm(gradients)
        if not math.isfinite(norm):
            self.masters.clear()
            return StepTaken(False, norm, replay=self._lower_scale())
        factor = 1.0 / self.loss_scale
        if params.max_grad_norm > 0 and norm > params.max_grad_norm:
            factor *= params.max_grad_norm / (norm + 1e-6)
        if factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        self._set(params)
        self.optimizer.step()
        self.masters.clear()
        self.masters.publish()
        self._raise_scale()
        return StepTaken(True, norm)

    def _norm(self, gradients: list[Tensor]) -> float:
        if not gradients:
            return 0.0
        norms = torch.stack(torch._foreach_norm(gradients))
        return float(torch.linalg.vector_norm(norms)) / self.loss_scale

    def _set(self, params: StepParams) -> None:
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = params.learning_rate, params.weight_decay
            if "betas" in group:
                group["betas"], group["eps"] = params.betas, params.eps

    def _lower_scale(self) -> bool:
        """After an overflow in fp16: halve the scale and let the step be tried again."""
        self._good_steps = 0
        if not self._scales_loss or self.loss_scale <= 1.0:
            return False
        self.loss_scale /= 2
        return True

    def _raise_scale(self) -> None:
        self._good_steps += 1
        if self._scales_loss and self._good_steps % 2000 == 0:
            self.loss_scale *= 2

    def state(self) -> dict[str, Tensor]:
        """The optimizer's tensors by name of the weight: `<part>/<name>`."""
        scale = torch.tensor([self.loss_scale, self._good_steps], dtype=torch.float64)
        return {"scale": scale} | read_moments(self.optimizer, self._by_name())

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on from such tensors."""
        scale = tensors.pop("scale")
        self.loss_scale, self._good_steps = float(scale[0]), int(scale[1])
        put_moments(self.optimizer, self._by_name(), tensors)

    def _by_name(self) -> dict[str, nn.Parameter]:
        return dict(zip(self.masters.names, self.masters.masters, strict=True))


def read_moments(optimizer: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """What an optimizer knows of each weight, as tensors by `<part>/<name>`."""
    return {
        f"{part}/{name}": torch.as_tensor(value)
        for name, weight in weights.items()
        for part, value in optimizer.state.get(weight, {}).items()
        if value is not None
    }


def put_moments(
    optimizer: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Give an optimizer back what was read of it."""
    for key, value in tensors.items():
        part, _, name = key.partition("/")
        weight = weights[name]
        # A fused step wants its count on the device, the others on the CPU.
        is_count = part == "step" and not optimizer.defaults.get("fused")
        optimizer.state[weight][part] = value.clone() if is_count else value.to(weight.device, copy=True)
