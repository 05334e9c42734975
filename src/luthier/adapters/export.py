"""Export the result of a run: its adapter, the merged model, or either as other programs take them."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from luthier.adapters.arithmetic import check_merged
from luthier.adapters.certificate import CERTIFICATE, find_certificate
from luthier.adapters.gguf import KINDS, write_gguf
from luthier.adapters.gguf_layout import read_settings
from luthier.adapters.gguf_vocabulary import read_vocabulary
from luthier.adapters.merge import merge_adapter
from luthier.adapters.ollama import MODELFILE, build_modelfile
from luthier.adapters.start import Start
from luthier.errors import CallError, CheckpointError, ModelError, ProofError, RunError
from luthier.extras import import_extra
from luthier.runs.events import utc_now
from luthier.runs.layout import FINAL_MODEL, MERGED_MODEL
from luthier.runs.lineage import write_lineage
from luthier.runs.manifest import MANIFEST, check_manifest, hash_file, read_manifest, reserve_check, seal
from luthier.runs.resolve import find_resolved
from luthier.runs.run import Run
from luthier.weights.mlx import read_mlx_adapter, write_mlx_adapter
from luthier.weights.peft import AdapterConfig, read_adapter
from luthier.weights.tensors import read_config, read_model_shape

Target = Literal["peft", "merged", "mlx", "gguf", "ollama"]
TARGETS: tuple[Target, ...] = get_args(Target)
QUANTISED: tuple[Target, ...] = ("gguf", "ollama")
EXPORTS = "exports"
_TEMPLATE = "chat_template.jinja"

Certified = Callable[[Run], None]
"""Raises where the run has no valid certificate; `adapters.certificate.check_certificate` is one."""
Stop = Callable[[], bool]


@dataclass(frozen=True)
class ExportFacts:
    """What was exported: where it lies, its files with their bytes, what each part says of it, and notes for people."""

    to: Target
    folder: Path
    files: dict[str, int]
    details: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """All files together."""
        return sum(self.files.values())


@dataclass(frozen=True)
class ExportOptions:
    """How a result is exported.

    `certified` raises where the run has no valid certificate; None exports without one, and the lineage says so.
    """

    certified: Certified | None
    quantise: str = "own"
    """Of gguf and ollama: f32, f16, bf16, q8_0, or the model's own type."""
    should_stop: Stop | None = None


@dataclass(frozen=True)
class _Job:
    run: Run
    final: Path
    options: ExportOptions

    @property
    def is_adapter(self) -> bool:
        return self.final.name != FINAL_MODEL

    @property
    def template(self) -> Path | None:
        """The chat template that the run was trained with, where it is not the model's own."""
        given = self.run.spec.model.chat_template
        return Path(given) if given else None


@dataclass(frozen=True)
class _Written:
    details: dict[str, Any]
    notes: tuple[str, ...] = ()


def _describe_ground(run: Run, certified: Certified | None) -> dict[str, Any] | None:
    """The certificate that a result goes out on, so that whoever has the copy can tell; None when it goes without."""
    certificate = find_certificate(run) if certified is not None else None
    if certificate is None:
        return None
    return {
        "artefact": certificate.artefact,
        "claims": len(certificate.claims),
        "made": certificate.facts.get("made", ""),
        "sha256": hash_file(run.folder / CERTIFICATE),
    }


def check_allowed(run: Run, certified: Certified | None, what: str) -> None:
    """Go on only with a valid certificate; without the check, the run's lineage says what was let out and when."""
    if certified is not None:
        certified(run)
        return
    before = run.lineage.get("without_certificate", [])
    entry = {"what": what, "time": utc_now().isoformat(timespec="seconds")}
    write_lineage(run, {"without_certificate": [*before, entry]})


def find_final(run: Run) -> Path:
    """The run's final weights, every byte as they were sealed."""
    final = run.final_weights
    if final is None:
        raise RunError(f"{run.id} has no final weights yet", hint=f"`luthier resume {run.id}` trains it to the end")
    try:
        check_manifest(final)
    except CheckpointError as error:
        raise ModelError(f"{final}: damaged: {error.message}", hint="train the run again") from None
    return final


def default_folder(run: Run, to: Target, quantise: str = "own") -> Path:
    """Where an export goes when nobody says."""
    name = f"{to}_{quantise}" if to in QUANTISED and quantise != "own" else to
    return run.folder / EXPORTS / name


def export_run(run: Run, to: Target, out: Path | None, options: ExportOptions) -> ExportFacts:
    """Write the run's result to the folder `out`, complete or not at all."""
    if to not in TARGETS:
        raise CallError(f"no such target: {to}", hint=f"one of: {', '.join(TARGETS)}")
    if options.quantise not in (*KINDS, "own"):
        raise CallError(f"no such type: {options.quantise}", hint=f"one of: own, {', '.join(KINDS)}")
    if options.quantise != "own" and to not in QUANTISED:
        raise CallError(f"--quantise is of {' and '.join(QUANTISED)}, and not of {to}")
    folder = out or default_folder(run, to, options.quantise)
    if folder.exists():
        raise CallError(f"{folder}: already there", hint="name a folder that does not exist yet")
    job = _Job(run, find_final(run), options)
    if to == "peft" and not job.is_adapter:
        raise CallError(f"{run.id} was trained in full and has no adapter", hint="--to merged exports the whole model")
    _check_writable(job, to)
    check_allowed(run, options.certified, f"export to {to}: {folder}")
    written = _WRITERS[to](job, folder)
    _record(job, to, folder)
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    return ExportFacts(to, folder, files, written.details, written.notes)


def _record(job: _Job, to: Target, folder: Path) -> None:
    """The run's lineage says what was exported, where to and when, and the hash of each file."""
    written = read_manifest(folder)
    entry = {
        "to": to,
        "folder": str(folder.resolve()),
        "time": utc_now().isoformat(timespec="seconds"),
        "certificate": written.facts["certificate"],
        "files": {name: facts["sha256"] for name, facts in written.files.items()},
    }
    write_lineage(job.run, {"exports": [*job.run.lineage.get("exports", []), entry]})


def _check_writable(job: _Job, to: Target) -> None:
    """What the format cannot hold is said before anything is merged."""
    if to not in QUANTISED:
        return
    import_extra("gguf", "gguf")
    folder = find_resolved(str(job.run.folder)).folder
    settings = read_settings(read_config(folder))
    vocabulary = read_vocabulary(folder, settings.number("vocab_size"), chat_template=job.template)
    if to == "ollama":
        build_modelfile(vocabulary, "model.gguf")


# -- the whole model -------------------------------------------------------------------------------------------------


@contextmanager
def _whole_model(job: _Job, beside: Path) -> Iterator[tuple[Path, bool]]:
    """The folder of the model with its adapters merged in, and whether its files may be taken away.

    A run's own merged model is what its certificate speaks of; without one, it is merged beside the export.
    """
    if not job.is_adapter:
        yield job.final, False
        return
    merged = job.run.folder / MERGED_MODEL
    if merged.is_dir():
        try:
            check_manifest(merged)
        except CheckpointError as error:
            raise ModelError(f"{merged}: damaged: {error.message}", hint="remove it: the export merges anew") from None
        yield merged, False
        return
    resolved = find_resolved(str(job.run.folder), with_weights=True)
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".merge-", dir=beside) as place:
        whole = Path(place) / MERGED_MODEL
        adapters = [each.path for each in resolved.adapters]
        merge_adapter(resolved.folder, adapters, whole, should_stop=job.options.should_stop)
        if job.options.certified is not None:
            check_merged(whole, Start(resolved.folder, tuple(adapters)))
        yield whole, True


def _write_merged(job: _Job, out: Path) -> _Written:
    with _whole_model(job, out.parent) as (folder, is_ours):

        def write(draft: Path) -> None:
            _take(folder, draft, moves=is_ours)
            if job.template is not None:
                shutil.copyfile(job.template, draft / _TEMPLATE)

        _seal(job, out, write, "merged")
    return _Written({"base": job.run.spec.model.base})


def _write_gguf(job: _Job, out: Path) -> _Written:
    found: list[_Written] = []
    with _whole_model(job, out.parent) as (folder, _):

        def write(draft: Path) -> None:
            facts = write_gguf(
                folder,
                draft / "model.gguf",
                job.options.quantise,
                chat_template=job.template,
                name=job.run.id,
                should_stop=job.options.should_stop,
            )
            found.append(
                _Written({"kind": facts.kind, "types": facts.types, "largest_error": facts.largest_error}, facts.notes)
            )

        _seal(job, out, write, "gguf")
    return found[0]


def _write_ollama(job: _Job, out: Path) -> _Written:
    found: list[_Written] = []
    with _whole_model(job, out.parent) as (folder, _):

        def write(draft: Path) -> None:
            size = int(read_settings(read_config(folder)).number("vocab_size"))
            vocabulary = read_vocabulary(folder, size, chat_template=job.template)
            modelfile = build_modelfile(vocabulary, "model.gguf")
            (draft / MODELFILE).write_text(modelfile.text, "utf-8")
            facts = write_gguf(
                folder,
                draft / "model.gguf",
                job.options.quantise,
                chat_template=job.template,
                name=job.run.id,
                should_stop=job.options.should_stop,
            )
            details = {
                "kind": facts.kind,
                "types": facts.types,
                "largest_error": facts.largest_error,
                "stops": list(modelfile.stops),
            }
            found.append(_Written(details, (*facts.notes, *modelfile.notes)))

        _seal(job, out, write, "ollama")
    return found[0]


# -- the adapter -----------------------------------------------------------------------------------------------------


def _write_peft(job: _Job, out: Path) -> _Written:
    _seal(job, out, lambda draft: _take(job.final, draft, moves=False), "peft")
    config, tensors = read_adapter(out)
    notes = _stacking_note(job)
    return _Written({"base": config.base, "rank": config.rank, "tensors": len(tensors)}, notes)


def _write_mlx(job: _Job, out: Path) -> _Written:
    """The adapter for mlx_lm; a model trained in full is read by mlx_lm as it stands."""
    if not job.is_adapter:
        return _write_merged(job, out)
    config, tensors = read_adapter(job.final)
    layers = read_model_shape(find_resolved(str(job.run.folder), with_weights=True).folder).layers

    def write(draft: Path) -> None:
        write_mlx_adapter(draft, config, tensors, layers=layers)
        _check_mlx(draft, config, tensors)

    _seal(job, out, write, "mlx")
    details = {"base": config.base, "rank": config.rank, "tensors": len(tensors)}
    return _Written(details, _stacking_note(job))


def _check_mlx(folder: Path, config: AdapterConfig, tensors: Mapping[str, Any]) -> None:
    """Read the adapter back under our own names: the same numbers, and the same scale."""
    back, found = read_mlx_adapter(folder)
    is_same = found.keys() == tensors.keys() and all(np.array_equal(found[name], tensors[name]) for name in found)
    if not is_same or not math.isclose(back.scale, config.scale, rel_tol=1e-6):
        raise ProofError(
            "the adapter for mlx_lm does not hold what was written into it",
            hint="the disk or the memory may be faulty: export again, elsewhere",
            where=str(folder),
        )


def _stacking_note(job: _Job) -> tuple[str, ...]:
    parents = job.run.lineage.get("parents", [])
    if not parents:
        return ()
    return (f"this adapter was trained over {parents[0]}: it belongs to that run's merged model, not to the base",)


_WRITERS: Mapping[Target, Callable[[_Job, Path], _Written]] = {
    "peft": _write_peft,
    "merged": _write_merged,
    "mlx": _write_mlx,
    "gguf": _write_gguf,
    "ollama": _write_ollama,
}


# -- files -----------------------------------------------------------------------------------------------------------


def _seal(job: _Job, out: Path, write: Callable[[Path], None], kind: str) -> None:
    ground = _describe_ground(job.run, job.options.certified)
    seal(out, write, {"kind": f"export_{kind}", "run": job.run.id, "model": job.run.model_id, "certificate": ground})


def _take(folder: Path, draft: Path, *, moves: bool) -> None:
    """A sealed folder's files without its manifest, which is of that folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST]
    if not moves:
        reserve_check(draft, sum(path.stat().st_size for path in paths))
    for path in paths:
        target = draft / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if moves:
            path.replace(target)
        else:
            shutil.copyfile(path, target)
