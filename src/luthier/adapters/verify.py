"""Certify the result of a run, and merge it into a whole model that appears only once it is certified."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from luthier.adapters.certificate import CERTIFICATE, Certificate, check_certificate, write_certificate
from luthier.adapters.claims import Order, claim_merge
from luthier.adapters.export import Certified, check_allowed, find_final
from luthier.adapters.fresh import certify_in_fresh_process
from luthier.adapters.merge import MergeFacts, merge_adapter
from luthier.adapters.start import open_start
from luthier.data.prompts import read_prompts
from luthier.engines.registry import choose_kind
from luthier.engines.surroundings import release_memory
from luthier.errors import CallError, ProofError
from luthier.machine import find_machine
from luthier.runs.layout import CONFIG, FINAL_MODEL, MERGED_MODEL
from luthier.runs.manifest import find_facts
from luthier.runs.models import find_live_adapter
from luthier.runs.resolve import ADAPTER_CONFIG, ResolvedModel, find_resolved
from luthier.runs.run import Run
from luthier.weights.tensors import find_mlx_bits, read_config

Stop = Callable[[], bool]


@dataclass(frozen=True)
class MergeOptions:
    """How a run's adapter is merged.

    `certified` raises where the run has no valid certificate. With None nothing is certified, neither before nor after,
    and the lineage says so.
    """

    certified: Certified | None = check_certificate
    dtype: str | None = None
    """fp32, bf16, fp16, or the base's own."""
    nf4: bool = False
    """Onto the 4-bit values that QLoRA trained against, in place of the base's own."""
    should_stop: Stop | None = None


@dataclass(frozen=True)
class Merged:
    """A merged model: where it lies, what the merge did, and what was found of it."""

    folder: Path
    facts: MergeFacts
    certificate: Certificate | None


def verify_run(run: Run, *, prompts: Path | None = None, should_stop: Stop | None = None) -> Certificate:
    """Hold what lies in the run folder against what the live model said, and write the certificate, valid or not.

    The model merged in the run folder is certified with it. Raises Stopped when asked to stop on the way.
    """
    if run.final_weights is None:
        find_final(run)  # which says what to do
    if prompts:
        read_prompts(prompts, drop_answers=True)  # so that what is wrong with them is said at once
    merged = run.folder / MERGED_MODEL
    order = Order(_absolute(run.folder), prompts=_absolute(prompts) if prompts else None)
    if merged.is_dir():
        order = replace(order, merged=_absolute(merged), nf4=bool(find_facts(merged).get("nf4")))
    release_memory()
    certificate = certify_in_fresh_process(order, should_stop)
    write_certificate(run.folder / CERTIFICATE, certificate)
    return certificate


def verify_outside(model: str, *, should_stop: Stop | None = None) -> tuple[Certificate, Path]:
    """What can be said of an adapter that no run of ours trained, such as one of the live service, and where it lies.

    The certificate is written beside the folder, since a sealed folder takes no further file.
    """
    folder = find_live_adapter(model) or Path(model)
    release_memory()
    certificate = certify_in_fresh_process(Order(_absolute(folder), is_outside=True), should_stop)
    path = folder.with_name(f"{folder.name}.{CERTIFICATE}")
    write_certificate(path, certificate)
    return certificate, path


def merge_run(run: Run, out: Path | None, options: MergeOptions) -> Merged:
    """Merge the run's adapters into their base at `out`, the run's own `merged_model` when absent.

    A model that is not base + adapter never appears: the ProofError holds the claims that failed. Raises Stopped when
    asked to stop on the way.
    """
    own = run.folder / MERGED_MODEL
    folder = out or own
    resolved = _check_mergeable(run, folder, options)
    if find_mlx_bits(read_config(resolved.folder)) is not None:
        options = replace(options, nf4=True)  # there are no other values than those that training saw
    check_allowed(run, options.certified, f"merge: {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    release_memory()
    made: list[Certificate] = []

    def finish(draft: Path) -> None:
        if template := run.spec.model.chat_template:
            shutil.copyfile(template, draft / "chat_template.jinja")
        if options.certified is None:
            return
        made.append(_certify_draft(run, draft, options))
        if folder != own:
            write_certificate(draft / CERTIFICATE, _standing_alone(made[0], folder.name))

    facts = _merge(resolved, folder, options, run.spec.compute.precision, finish)
    if made and folder == own:
        write_certificate(run.folder / CERTIFICATE, made[0])
    return Merged(folder, facts, made[0] if made else None)


def merge_outside(model: str, out: Path | None, options: MergeOptions) -> Merged:
    """Merge an adapter that no run of ours trained, of PEFT's or of mlx_lm's, into the base that its own file names.

    Its certificate says that the model at `out` is base + adapter, and nothing of how the adapter was trained.
    """
    if out is None:
        raise CallError(f"{model}: an adapter of no run: say where its merged model goes", hint="-o DIR")
    if out.exists():
        raise CallError(f"{out}: already there", hint="name a folder that does not exist yet: -o DIR")
    resolved = find_resolved(model, with_weights=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    made: list[Certificate] = []

    def finish(draft: Path) -> None:
        if options.certified is None:
            return
        certificate = claim_merge(resolved, draft, out.name)
        if not certificate.is_valid:
            first = certificate.broken[0]
            raise ProofError(
                f"the merged model is not base + adapter: {first.claim}: found {first.found}, allowed {first.allowed}",
                hint="--dtype fp32 keeps what a coarser type rounds away",
                details=certificate.as_dict(),
            )
        made.append(certificate)
        write_certificate(draft / CERTIFICATE, certificate)

    precision = find_machine(engine=choose_kind(resolved)).precision
    facts = _merge(resolved, out, replace(options, nf4=True), precision, finish)
    return Merged(out, facts, made[0] if made else None)


def _merge(
    resolved: ResolvedModel, out: Path, options: MergeOptions, precision: str, finish: Callable[[Path], None]
) -> MergeFacts:
    """Merge into a draft of `out`, which `finish` looks at before it appears."""
    should_stop = options.should_stop
    with open_start(
        resolved, nf4=options.nf4, precision=precision, beside=out.parent, should_stop=should_stop
    ) as start:
        return merge_adapter(
            start.folder,
            start.adapters,
            out,
            dtype=options.dtype or start.dtype,
            should_stop=should_stop,
            dequantise=start.dequantise,
            finish=finish,
        )


def is_outside(model: str) -> bool:
    """Whether a name is that of an adapter that lies in no run of ours: its folder, or an `ft:` id of the service."""
    folder = find_live_adapter(model) or Path(model)
    return (folder / ADAPTER_CONFIG).is_file() and not (folder.resolve().parent / CONFIG).is_file()


def _check_mergeable(run: Run, folder: Path, options: MergeOptions) -> ResolvedModel:
    final = find_final(run)
    if final.name == FINAL_MODEL:
        raise CallError(
            f"{run.id} was trained in full: {final} is a whole model already",
            hint=f"`luthier export {run.folder} --to merged` copies it",
        )
    if folder.exists():
        raise CallError(f"{folder}: already there", hint="name a folder that does not exist yet: -o DIR")
    resolved = find_resolved(str(run.folder), with_weights=True)
    if options.nf4 and not any(ref.quantised for ref in resolved.adapters):
        raise CallError(f"{run.id} was not trained over 4-bit values", hint="leave --nf4 out: it is of QLoRA runs")
    return resolved


def _certify_draft(run: Run, draft: Path, options: MergeOptions) -> Certificate:
    order = Order(_absolute(run.folder), _absolute(draft), nf4=options.nf4, is_sealed=False)
    certificate = certify_in_fresh_process(order, options.should_stop)
    if certificate.is_valid:
        return certificate
    assert run.final_weights is not None
    own = certificate.of(run.final_weights.name)
    write_certificate(run.folder / CERTIFICATE, own)
    broken = [each for each in certificate.broken if own.is_valid is (each.artefact == MERGED_MODEL)]
    what, first = f"the adapter of {run.id} is not what was trained", broken[0]
    if own.is_valid:
        what = "the merged model is not base + adapter"
    raise ProofError(
        f"{what}: {first.claim}: found {first.found}, allowed {first.allowed}",
        hint="--dtype fp32 keeps what a coarser type rounds away" if own.is_valid else f"luthier verify {run.folder}",
        details=certificate.as_dict(),
    )


def _standing_alone(certificate: Certificate, name: str) -> Certificate:
    """The same for a folder that will lie anywhere: its own files under their own names."""
    files = certificate.of(MERGED_MODEL).files
    own = {file.removeprefix(f"{MERGED_MODEL}/"): digest for file, digest in files.items()}
    return replace(certificate, artefact=name, files=own)


def _absolute(path: Path) -> str:
    return str(path.resolve())
