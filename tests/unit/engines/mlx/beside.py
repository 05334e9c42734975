"""The two engines over one tiny model, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from luthier.engines.registry import find_engine
from luthier.runs.resolve import ResolvedModel
from tests.unit.engines.tiny import gradients_of, make_plan


def build(kind: str, base: Path, home: Path, method: str = "lora", **tables: Any) -> Any:
    """An engine over a base, in fp32 and without dropout unless told."""
    plan = make_plan(method, engine={"kind": kind}, **tables)
    return find_engine(kind)(plan, ResolvedModel(base, name=str(base)), home)


def both(base: Path, home: Path, method: str = "lora", **tables: Any) -> tuple[Any, Any]:
    """torch's engine and mlx's, with the same update to begin with, that is not zero."""
    engines = build("torch", base, home, method, **tables), build("mlx", base, home, method, **tables)
    for engine in engines:
        begin(engine)
    return engines


def begin(engine: Any) -> None:
    """The same values for each lora_B, by its name alone."""
    import mlx.core as mx
    import torch

    masters = engine._masters
    if hasattr(masters, "arrays"):
        drawn = {name: mx.array(_values(name, array.shape)) for name, array in masters.arrays.items() if _is_b(name)}
        masters.arrays |= drawn
        engine._publish()
        return
    with torch.no_grad():
        for name, master in masters.named().items():
            if _is_b(name):
                master.copy_(torch.from_numpy(_values(name, tuple(master.shape))))
    masters.publish()


def _is_b(name: str) -> bool:
    return name.endswith("lora_B")


def _values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return (np.random.default_rng(list(name.encode())).normal(size=shape) * 0.1).astype(np.float32)


def pulled(engine: Any, batch: Any, loss: Any) -> tuple[float, np.ndarray, dict[str, np.ndarray]]:
    """The value, the log-probabilities and the gradients of a micro-batch."""
    computed = engine.forward_backward(batch, loss).result()
    if not hasattr(engine._masters, "arrays"):
        return computed.value, computed.logprobs, gradients_of(engine)
    gradients = {name: np.array(each) for name, each in engine._masters.gradients.items()}
    engine.discard_gradients()
    return computed.value, computed.logprobs, gradients
