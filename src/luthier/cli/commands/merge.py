"""`luthier merge`: a run's adapter in its base, as one model that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from luthier.cli.output import Command, heartbeat, print_json, say, warn

if TYPE_CHECKING:
    from luthier.adapters.verify import Merged, MergeOptions
    from luthier.runs.run import Run

# As the code that merges has them; the command line starts without importing it.
_DTYPES = ("fp32", "bf16", "fp16")
_LOST = 0.3


@click.command("merge", cls=Command)
@click.argument("run")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A folder that does not exist yet; `merged_model` in the run folder when absent.",
)
@click.option("--dtype", type=click.Choice(_DTYPES), help="Precision of the weights; the base's own when absent.")
@click.option("--nf4", is_flag=True, help="Merge onto the quantised values that QLoRA trained against.")
@click.option(
    "--quantise",
    "--quantize",
    type=click.Choice(["4", "8"]),
    help="Then quantise the merged model to so many bits for MLX; refused where what was learned does not survive.",
)
@click.option(
    "--without-certificate",
    is_flag=True,
    help="Merge what no certificate vouches for, and make none; the run's lineage says so.",
)
def command(
    run: str,
    output: Path | None,
    dtype: str | None,
    nf4: bool,
    quantise: str | None,
    without_certificate: bool,
    as_json: bool,
) -> int:
    """Merge the adapter of RUN into its base, with tokenizer, template and stop tokens.

    The model appears only once another process has found that it is base + adapter; what it found is shown as a table.
    RUN may also be the folder of an adapter from elsewhere, of PEFT's or of mlx_lm's; then -o names the new folder.
    """
    from luthier.adapters.certificate import check_certificate
    from luthier.adapters.merge import Stopped
    from luthier.adapters.verify import MergeOptions, is_outside, merge_outside, merge_run
    from luthier.errors import CallError
    from luthier.runs.run import open_run
    from luthier.training.signals import EXIT_CODES, StopFlag

    stop, outside = StopFlag(), is_outside(run)
    certified = None if without_certificate else check_certificate
    options = MergeOptions(certified, dtype, nf4, should_stop=lambda: bool(stop))
    if quantise and (outside or dtype or without_certificate):
        raise CallError("--quantise goes with a run and its certificate alone", hint="merge first, then convert it")
    try:
        if outside:
            with heartbeat(f"merging {run} and certifying the result", quiet=as_json), stop:
                merged = merge_outside(run, output, options)
            _tell(merged, Path(run).name, as_json=as_json, outside=True)
            return 0
        opened = open_run(run)
        with opened.lock(), heartbeat(f"merging {opened.id} and certifying the result", quiet=as_json), stop:
            if quantise:
                return _quantise(opened, output, int(quantise), options, as_json=as_json)
            merged = merge_run(opened, output, options)
    except Stopped:
        if not as_json:
            say("stopped while merging; nothing was left behind")
        return EXIT_CODES[stop.reason or "SIGTERM"]
    _tell(merged, opened.id, as_json=as_json)
    return 0


def _tell(merged: Merged, name: str, *, as_json: bool, outside: bool = False) -> None:
    if as_json:
        print_json({"run": name, **_as_dict(merged)})
    else:
        _print(merged, outside=outside)


def _quantise(run: Run, output: Path | None, bits: int, options: MergeOptions, *, as_json: bool) -> int:
    from luthier.adapters.requantise import quantise_run
    from luthier.cli.ending import print_claims

    made = quantise_run(run, output, bits, options)
    if as_json:
        print_json({"run": run.id, "folder": str(made.folder), "certificate": made.certificate.as_dict()})
    else:
        print_claims(made.certificate)
        say(f"quantised to {bits} bits: {made.folder}")
    return 0


def _as_dict(merged: Merged) -> dict[str, Any]:
    from dataclasses import asdict

    certificate = merged.certificate.as_dict() if merged.certificate else None
    return {"folder": str(merged.folder), **asdict(merged.facts), "certificate": certificate}


def _print(merged: Merged, *, outside: bool) -> None:
    from luthier.cli.ending import describe_certificate, print_claims

    facts = merged.facts
    if merged.certificate:
        print_claims(merged.certificate)
        told = "base + adapter; how the adapter was trained is not known here"
        say(f"certificate valid: {told}" if outside else describe_certificate(merged.certificate))
    else:
        warn("no certificate: nothing was checked, and the run's lineage says so")
    if facts.lost_share > _LOST:
        warn(f"rounding took {facts.lost_share:.0%} of the update away; --dtype fp32 keeps it")
    what = f"{facts.adapted} tensors changed" + (f", {facts.replaced} replaced" if facts.replaced else "")
    say(f"merged: {merged.folder} ({facts.tensors} tensors, {what}, {facts.size_bytes / 1e9:.2f} GB)")
