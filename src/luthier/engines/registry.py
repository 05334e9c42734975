"""Engines by name, as strings, so that nothing here reaches a heavy package before one is asked for."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import MissingExtraError, UnsupportedError
from luthier.extras import import_extra, list_missing

if TYPE_CHECKING:
    from collections.abc import Callable

    from luthier.engines.verbs import Decoder, Logits, Prober, Sampler
    from luthier.runs.resolve import AdapterRef, ResolvedModel

ENGINES = {"torch": "luthier.engines.torch.engine", "trl": "luthier.training.trl.start"}
# Engines that train whole jobs, not verb by verb: what does so lives beside the loop.
JOBS = {"trl": "luthier.training.trl.job"}
SAMPLERS = {"torch": "luthier.engines.torch.sampling"}
PROBERS = {"torch": "luthier.engines.torch.probing"}
DECODERS = {"torch": "luthier.engines.torch.decoding"}
# Only some methods need it.
_FOR_SOME = ("bitsandbytes",)
_IMPORTS = "imports of the engines"


def check_engine(kind: str) -> None:
    """Raise UnsupportedError for an engine that is not in this version, MissingExtraError for one that lacks a part."""
    if kind not in ENGINES:
        raise UnsupportedError(
            f"engine `{kind}` is not in this version; there is: {', '.join(ENGINES)}",
            hint='leave engine.kind out, or set it to "torch"',
        )
    if missing := _list_missing(kind):
        raise MissingExtraError(
            f"engine `{kind}` needs the package `{missing[0]}`, which is not installed",
            hint=f"run: {find_missing(kind)}",
        )


def find_missing(kind: str) -> str:
    """The command that installs what an engine lacks; empty where it lacks nothing."""
    return f"pip install 'luthier[{kind}]'" if _list_missing(kind) else ""


def _list_missing(kind: str) -> list[str]:
    return [name for name in list_missing(kind) if name not in _FOR_SOME]


def find_engine(kind: str) -> Any:
    """The `build` function of an engine that `check_engine` lets pass."""
    check_engine(kind)
    wait_for_imports()
    return importlib.import_module(ENGINES[kind]).build


def import_in_background() -> None:
    """Import what engines need beside other work; what goes wrong is said when it is used."""

    def work() -> None:
        for module in ("torch", "transformers.modeling_utils"):
            try:
                importlib.import_module(module)
            except ImportError:
                return

    threading.Thread(target=work, name=_IMPORTS, daemon=True).start()


def wait_for_imports() -> None:
    """Before anything else imports transformers: it puts another module in its own place at the end of its import, and
    who imports it at that moment in another thread is left with the empty one.
    """
    for thread in threading.enumerate():
        if thread.name == _IMPORTS:
            thread.join()


def load_sampler(resolved: ResolvedModel, home: Path, kind: str = "torch") -> Sampler:
    """A model loaded to answer with, where the engine's packages are installed."""
    wait_for_imports()
    import_extra(kind, kind)
    sampler: Sampler = importlib.import_module(SAMPLERS[kind]).build_sampler(resolved, home)
    return sampler


def load_decoder(resolved: ResolvedModel, home: Path, *, over: AdapterRef | None = None) -> Decoder:
    """A base model loaded to answer many streams, in the values that adapters such as `over` were trained on."""
    wait_for_imports()
    import_extra("torch", "torch")
    decoder: Decoder = importlib.import_module(DECODERS["torch"]).build_decoder(resolved, home, over=over)
    return decoder


def load_prober(
    resolved: ResolvedModel, home: Path, *, precision: str, device: str, over: AdapterRef | None = None
) -> Prober:
    """A model read from disk again; any engine's result is read by the one that reads all of them."""
    wait_for_imports()
    import_extra("torch", "torch")
    build = importlib.import_module(PROBERS["torch"]).build_prober
    prober: Prober = build(resolved, home, precision=precision, device=device, over=over)
    return prober


def load_dequantise(
    folder: Path, *, precision: str, double_quant: bool, device: str
) -> Callable[[str, Logits], Logits | None]:
    """The values that QLoRA trained against: each linear layer's weights through NF4, by tensor name."""
    import_extra("torch", "torch")
    build = importlib.import_module("luthier.engines.torch.nf4").build_dequantise
    found: Callable[[str, Logits], Logits | None] = build(
        folder, precision=precision, double=double_quant, device=device
    )
    return found
