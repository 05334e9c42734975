"""The `[method]` table: which weights move. Tagged by `kind`, so that a key of one kind is unknown to another."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from luthier.spec.part import Part

Targets = Literal["auto"] | list[str]


class AdapterKeys(Part):
    """The keys that every method with an adapter takes."""

    rank: int = Field(16, ge=1, le=1024)
    """Width of the low-rank update; larger learns more and costs more memory."""
    alpha: float = Field(32.0, gt=0)
    """Scale of the update: it is multiplied by alpha / rank."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """Share of the adapter's inputs left out at random in training."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, which keeps large ranks stable."""
    targets: Targets = "auto"
    """Names of the linear layers to adapt; `auto` finds every linear layer but the head."""
    last_layers: int | None = Field(None, ge=1)
    """Adapt only the last N transformer layers."""
    also_train: list[str] = []
    """Modules trained whole beside the adapter, such as `lm_head` or `embed_tokens`."""


class AutoMethod(AdapterKeys):
    """QLoRA, unless the plan shows that full fine-tuning fits comfortably."""

    kind: Literal["auto"] = "auto"
    """Let the plan choose the method, and say why."""


class FullMethod(Part):
    """Every weight of the model is trained."""

    kind: Literal["full"]
    """Train every weight."""


class LoraMethod(AdapterKeys):
    """A low-rank adapter over a frozen base."""

    kind: Literal["lora"]
    """Train a low-rank adapter over the frozen base."""


class QloraMethod(AdapterKeys):
    """A low-rank adapter over a quantised base: NF4 on engine `torch`, mlx_lm's own quantiser on `mlx`."""

    kind: Literal["qlora"]
    """Train a low-rank adapter over a quantised base."""
    bits: Literal[4, 8] = 4
    """Bits of each weight of the base; 8 is of engine `mlx`."""
    double_quant: bool = True
    """Quantise the quantisation constants too, which saves about 0.4 bits a weight."""


Method = Annotated[AutoMethod | FullMethod | LoraMethod | QloraMethod, Field(discriminator="kind")]
