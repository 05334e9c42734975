"""A trained model quantised again, refused where what it learned does not survive the rounding."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from luthier.adapters.certificate import CERTIFICATE, Certificate, Claim, hash_files, write_certificate
from luthier.adapters.export import check_allowed, find_final
from luthier.adapters.merge import merge_adapter
from luthier.adapters.start import open_start
from luthier.adapters.verify import MergeOptions, merge_run
from luthier.engines.registry import load_mlx_writer, load_prober
from luthier.engines.verbs import Ints
from luthier.errors import CallError, ProofError
from luthier.machine import find_machine
from luthier.runs.events import utc_now
from luthier.runs.home import luthier_home
from luthier.runs.layout import FINAL_MODEL, MERGED_MODEL, PROBE
from luthier.runs.lineage import list_versions
from luthier.runs.manifest import seal
from luthier.runs.resolve import ResolvedModel, find_resolved, resolve_start
from luthier.runs.run import Run
from luthier.training.probe import PLACES, read_probe, read_text_facts

BITS = (4, 8)
MOST_LOST = 0.5
"""The largest part of the effect of training that rounding may take."""
_MOST_NOISE = 3.0
_FLOOR = 1e-6
Rows = np.ndarray


@dataclass(frozen=True)
class Quantised:
    """A quantised model: where it lies, and what was found of it."""

    folder: Path
    certificate: Certificate


def quantise_run(run: Run, out: Path | None, bits: int, options: MergeOptions) -> Quantised:
    """The run's whole model through mlx_lm's quantiser at `out`, `merged_model_4bit` in the run folder when absent.

    The full model is merged and certified first where it is not there. The quantised one appears only if it still does
    what was learned: ProofError with the claims that failed otherwise.
    """
    if bits not in BITS:
        raise CallError(f"--quantise {bits}: not known here", hint="--quantise 4 or --quantise 8")
    write_quantised = load_mlx_writer("write_quantised")
    folder = out or run.folder / f"{MERGED_MODEL}_{bits}bit"
    if folder.exists():
        raise CallError(f"{folder}: already there", hint="name a folder that does not exist yet: -o DIR")
    whole = _whole_model(run, options)
    check_allowed(run, options.certified, f"quantise to {bits} bits: {folder}")
    made: list[Certificate] = []

    def write(draft: Path) -> None:
        write_quantised(whole, draft, bits)
        certificate = _certify(run, whole, (draft, folder.name), bits)
        if not certificate.is_valid:
            first = certificate.broken[0]
            raise ProofError(
                f"in {bits} bits {run.id} is not what was trained: {first.claim}: found {first.found}, "
                f"allowed {first.allowed}",
                hint="--quantise 8 keeps more; the merged model itself keeps all"
                if bits < 8
                else "keep the full model",
                details=certificate.as_dict(),
            )
        made.append(certificate)
        write_certificate(draft / CERTIFICATE, certificate)

    folder.parent.mkdir(parents=True, exist_ok=True)
    seal(folder, write, {"kind": "quantised_model", "run": run.id, "bits": bits})
    return Quantised(folder, made[0])


def _whole_model(run: Run, options: MergeOptions) -> Path:
    final, merged = find_final(run), run.folder / MERGED_MODEL
    if final.name == FINAL_MODEL:
        return final
    return merged if merged.is_dir() else merge_run(run, None, options).folder


def _certify(run: Run, whole: Path, named: tuple[Path, str], bits: int) -> Certificate:
    """The quantised model held against the full one, and its effect against what quantising costs the base."""
    (quantised, name), prompts = named, _prompts(run)
    precision = run.spec.compute.precision

    def ask(folder: Path) -> Rows:
        device = find_machine(engine="mlx").device
        prober = load_prober(ResolvedModel(folder), luthier_home(), precision=precision, device=device, kind="mlx")
        found = np.concatenate([_log_softmax(each) for each in prober.logits(prompts, PLACES)])
        del prober
        gc.collect()
        return found

    with tempfile.TemporaryDirectory(prefix=".base-", dir=quantised.parent) as place:
        rounded = Path(place) / "quantised"
        with _open_base(run, Path(place)) as base:
            load_mlx_writer("write_quantised")(base, rounded, bits)
            asked = ask(base), ask(rounded)
    claims = [*_claims(name, *asked, ask(whole), ask(quantised)), *_text_claims(name, whole, quantised)]
    facts = {
        "run": run.id,
        "made": utc_now().isoformat(timespec="seconds"),
        "bits": bits,
        "precision": precision,
        "prompts": len(prompts),
        "versions": list_versions(),
    }
    return Certificate(name, tuple(claims), _own_files(quantised), facts)


def _own_files(folder: Path) -> dict[str, str]:
    """The files by their names in the folder, since it may lie anywhere."""
    return {name.partition("/")[2]: digest for name, digest in hash_files(folder, folder.name).items()}


def _prompts(run: Run) -> list[Ints]:
    probe = read_probe(run.folder / PROBE)
    return [each for each in (*probe.tokens, *probe.text.chats) if len(each)]


@contextmanager
def _open_base(run: Run, place: Path) -> Iterator[Path]:
    """What the run started from as one folder in full width: earlier adapters are merged into it."""
    below = resolve_start(find_resolved(str(run.folder), with_weights=True))
    with open_start(below, nf4=True, precision=run.spec.compute.precision, beside=place) as start:
        if not start.adapters:
            yield start.folder
            return
        out = place / "base"
        merge_adapter(start.folder, start.adapters, out, dtype=start.dtype, dequantise=start.dequantise)
        yield out


def _claims(name: str, before: Rows, rounded: Rows, whole: Rows, quantised: Rows) -> Sequence[Claim]:
    """Effect and noise as root mean squares of log-probabilities."""
    effect, left = whole - before, quantised - rounded
    noise, cost = _size(rounded - before), _size(quantised - whole)
    lost = _size(left - effect) / max(_size(effect), _FLOOR)
    limit = max(_MOST_NOISE * noise, _FLOOR)
    return (
        Claim(
            name,
            "what was learned survives (tuned minus base, before and after rounding)",
            f"{lost:.1%} of an effect of {_size(effect):.2g} is lost; rounding alone moves the base by {noise:.2g}",
            f"{MOST_LOST:.0%}",
            bool(np.isfinite(lost) and lost <= MOST_LOST),
        ),
        Claim(
            name,
            "rounding moves it no further than it moves the base",
            f"{cost:.2g}",
            f"{limit:.2g}: {_MOST_NOISE:.0f} times what it moves the base",
            bool(cost <= limit),
        ),
    )


def _text_claims(name: str, whole: Path, quantised: Path) -> Sequence[Claim]:
    one, other = read_text_facts(whole, None), read_text_facts(quantised, None)
    same = one.hash == other.hash and one.stops == other.stops
    found = "equal" if same else "changed"
    return (Claim(name, "tokenizer, template and stop tokens are the full model's", found, "equal", same),)


def _size(values: Rows) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _log_softmax(logits: np.ndarray) -> Rows:
    wide = logits.astype(np.float64)
    top = wide.max(1, keepdims=True)
    found: Rows = wide - top - np.log(np.exp(wide - top).sum(1, keepdims=True))
    return found
