"""Engines by name, as strings, so that nothing here reaches a heavy package before one is asked for."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import MissingExtraError, UnsupportedError
from luthier.extras import import_extra, list_missing
from luthier.weights.tensors import find_mlx_bits, read_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from luthier.engines.verbs import Decoder, Logits, Prober, Sampler
    from luthier.runs.resolve import AdapterRef, ResolvedModel

ENGINES = {
    "torch": "luthier.engines.torch.engine",
    "trl": "luthier.training.trl.start",
    "mlx": "luthier.engines.mlx.engine",
    "tinker": "luthier.engines.tinker.engine",
}
REMOTE = ("tinker",)
"""Engines whose work is done elsewhere, with a key of the person who asks; they tell what they wait for."""
LOCAL = tuple(kind for kind in ENGINES if kind not in REMOTE)
# Engines that train whole jobs, not verb by verb: what does so lives beside the loop.
JOBS = {"trl": "luthier.training.trl.job"}
SAMPLERS = {
    "torch": "luthier.engines.torch.sampling",
    "mlx": "luthier.engines.mlx.sampling",
    "tinker": "luthier.engines.tinker.sampling",
}
PROBERS = {"torch": "luthier.engines.torch.probing", "mlx": "luthier.engines.mlx.probing"}
DECODERS = {"torch": "luthier.engines.torch.decoding"}
PACKAGES = {"torch": ("torch",), "trl": ("torch",), "mlx": ("mlx.core", "mlx_lm"), "tinker": ("tinker",)}
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
    import_packages(kind)
    return importlib.import_module(ENGINES[kind]).build


def check_service(kind: str) -> None:
    """Raise within seconds where the service of a remote engine has no key, refuses it, or does not answer."""
    address = importlib.import_module(f"luthier.engines.{kind}.address")
    address.check_service(address.find_service())


def import_packages(kind: str) -> None:
    """The packages of an engine; MissingExtraError where they are not installed, or this machine cannot run them."""
    for package in PACKAGES[kind]:
        try:
            import_extra(package, kind)
        except MissingExtraError:
            raise
        except (ImportError, OSError, ValueError) as error:
            raise MissingExtraError(
                f"`{package}` is installed, and this machine cannot run it: {str(error).splitlines()[0]}",
                hint=f"run: pip install 'luthier[{kind}]'"
                + (" (it needs Apple silicon with macOS 14 or later, or Linux)" if kind == "mlx" else ""),
            ) from None


def is_installed(kind: str) -> bool:
    """Whether the packages of an engine are there; none is imported."""
    return all(importlib.util.find_spec(package.partition(".")[0]) is not None for package in PACKAGES[kind])


def choose_kind(resolved: ResolvedModel, over: AdapterRef | None = None) -> str:
    """The engine that reads a model: the one whose quantised values are in it, else what trained it, else what is here.

    Every engine reads every adapter; only values that one has quantised are known to it alone.
    """
    from luthier.runs.resolve import find_run

    refs = [*resolved.adapters, *([over] if over else [])]
    quantisers: list[str] = sorted({ref.engine for ref in refs if ref.quantised})
    if len(quantisers) > 1:
        raise UnsupportedError(
            f"adapters over values that {' and '.join(quantisers)} quantised lie over each other here",
            hint="merge the first one, and name its merged model as the base of the second",
        )
    if quantisers:
        return quantisers[0]
    if (config := resolved.folder / "config.json").is_file() and find_mlx_bits(read_config(config.parent)) is not None:
        return "mlx"
    run = None if refs else find_run(resolved)
    made = refs[-1].engine if refs else run.spec.engine.kind if run else "torch"
    wanted = "mlx" if made == "mlx" else "torch"
    return next((kind for kind in (wanted, "torch", "mlx") if is_installed(kind)), wanted)


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


def load_sampler(resolved: ResolvedModel, home: Path, kind: str | None = None) -> Sampler:
    """A model loaded to answer with, where the engine's packages are installed."""
    wait_for_imports()
    kind = kind or choose_kind(resolved)
    import_packages(kind)
    sampler: Sampler = importlib.import_module(SAMPLERS[kind]).build_sampler(resolved, home)
    return sampler


def load_decoder(
    resolved: ResolvedModel, home: Path, *, over: AdapterRef | None = None, precision: str = "auto"
) -> Decoder:
    """A base model loaded to answer many streams, in the values that adapters such as `over` were trained on."""
    wait_for_imports()
    import_extra("torch", "torch")
    build = importlib.import_module(DECODERS["torch"]).build_decoder
    decoder: Decoder = build(resolved, home, over=over, precision=precision)
    return decoder


def load_prober(
    resolved: ResolvedModel,
    home: Path,
    *,
    precision: str,
    device: str,
    over: AdapterRef | None = None,
    kind: str | None = None,
) -> Prober:
    """A model read from disk again, by the engine `kind` that trained it where it is one that can."""
    wait_for_imports()
    kind = kind if kind in PROBERS else choose_kind(resolved, over)
    import_packages(kind)
    build = importlib.import_module(PROBERS[kind]).build_prober
    prober: Prober = build(resolved, home, precision=precision, device=device, over=over)
    return prober


def load_mlx_writer(name: str) -> Callable[..., None]:
    """`write_quantised` and `write_dequantised` of mlx_lm's quantiser, where it is installed."""
    wait_for_imports()
    import_packages("mlx")
    write: Callable[..., None] = getattr(importlib.import_module("luthier.engines.mlx.loading"), name)
    return write


def load_dequantise(
    folder: Path, ref: AdapterRef, *, precision: str, device: str
) -> Callable[[str, Logits], Logits | None]:
    """The values that QLoRA trained against, by tensor name: NF4's, or those of mlx_lm's quantiser."""
    import_packages(ref.engine)
    if ref.engine == "mlx":
        by_mlx: Callable[[str, Logits], Logits | None] = importlib.import_module(
            "luthier.engines.mlx.loading"
        ).build_dequantise(folder, precision=precision, bits=ref.bits)
        return by_mlx
    build = importlib.import_module("luthier.engines.torch.nf4").build_dequantise
    found: Callable[[str, Logits], Logits | None] = build(
        folder, precision=precision, double=ref.double_quant, device=device
    )
    return found
