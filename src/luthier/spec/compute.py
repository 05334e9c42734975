"""The `[compute]` table: precision, memory for time, and the machine asked for."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from luthier.spec.parallelism import Parallelism
from luthier.spec.part import Part


class Compute(Part):
    """How the machine is used; `gpu_type`, `gpu_count` and `nodes` are asked of a server and checked there."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the frozen weights and the products."""
    recompute: Literal["auto", "always", "never"] = "auto"
    """Compute activations again in the backward pass to save memory."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Tokens computed at once; when absent it follows from memory. It never changes the result."""
    processes: int = Field(1, ge=1)
    """Processes that share each step on this machine."""
    gpu_type: str | None = None
    """Kind of accelerator asked of a server."""
    gpu_count: int | None = Field(None, ge=1)
    """Accelerators asked of a server, for each node."""
    nodes: int | None = Field(None, ge=1)
    """Machines asked of a server."""
    parallelism: Parallelism = Field(default_factory=Parallelism)
    """Settings of trainers on many devices; see `[compute.parallelism]`."""
