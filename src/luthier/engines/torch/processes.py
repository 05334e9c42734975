"""The processes of one run: who they are, and sums over them by torch.distributed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.errors import ProcessDiedError

_BUCKET_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Processes:
    """This process among those of the run; with one there is nothing to sum."""

    rank: int = 0
    count: int = 1

    def sum_values(self, values: Any) -> Any:
        """The sum of numbers over all processes."""
        if self.count == 1:
            return values
        tensor = torch.from_numpy(np.ascontiguousarray(values, np.float64))
        if torch.distributed.get_backend() == "nccl":
            tensor = tensor.cuda()
        _all_reduce(tensor)
        return tensor.cpu().numpy()

    def sum_gradients(self, masters: list[torch.nn.Parameter]) -> None:
        """Sum gradients in place, many at a time; where a process has none, it adds zeros."""
        if self.count == 1:
            return
        for master in masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        for bucket in _buckets([master.grad for master in masters if master.grad is not None]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            _all_reduce(flat)
            for gradient, part in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def leave(self) -> None:
        """Say goodbye to the others."""
        if self.count > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _all_reduce(tensor: Tensor) -> None:
    try:
        torch.distributed.all_reduce(tensor)
    except RuntimeError as error:
        raise ProcessDiedError(
            f"another process of this run is gone: {str(error).splitlines()[0]}",
            hint="`luthier resume RUN` goes on from the last checkpoint",
        ) from None


def _buckets(tensors: list[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = [[]]
    held = 0
    for tensor in tensors:
        if held and held + tensor.numel() > _BUCKET_ELEMENTS:
            buckets.append([])
            held = 0
        buckets[-1].append(tensor)
        held += tensor.numel()
    return buckets


def join_processes(device: str) -> Processes:
    """The processes that the environment tells of (torch's own names), joined."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Processes()
    rank = int(os.environ["RANK"])
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo", rank=rank, world_size=count)
    return Processes(rank, count)
