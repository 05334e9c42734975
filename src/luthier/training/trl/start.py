"""Where the `trl` engine begins: its libraries are imported in an order that lets none of them fetch code."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.runs.resolve import ResolvedModel
from luthier.spec.plan import RunPlan

if TYPE_CHECKING:
    from luthier.training.trl.engine import TrlEngine


def build(plan: RunPlan, resolved: ResolvedModel, home: Path, *, packed: bool = True) -> TrlEngine:
    """The engine of a plan, loaded and ready to train; TRL pads, so nothing is packed either way."""
    import_libraries()
    from luthier.training.trl.engine import build_engine

    return build_engine(plan, resolved, home)


def import_libraries() -> None:
    """Import bitsandbytes our way first: PEFT would do so in a way that asks the hub for code."""
    from luthier.engines.torch.nf4 import quantiser

    if importlib.util.find_spec("bitsandbytes"):
        quantiser()
