"""`luthier verify`: whether the result of a run is what was trained, found out by another process."""

from __future__ import annotations

from pathlib import Path

import click

from luthier.cli.output import Command, heartbeat, print_json, say


@click.command("verify", cls=Command)
@click.argument("run")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Ask about these too: a line of text each, or a .json or .jsonl file as `luthier compare` takes it.",
)
def command(run: str, prompts: Path | None, as_json: bool) -> int:
    """Hold the result of RUN against what the live model said, and write its certificate.

    A process of its own reads what lies on disk: the final weights, and the model merged from them in the run folder.
    RUN may also be the folder of an adapter that no run trained, or the `ft:` id of one that a client of this
    machine's server trained step by step: then its seal, its base and its tensors are checked.
    """
    from luthier.adapters.certificate import CERTIFICATE
    from luthier.adapters.verify import is_outside, verify_outside, verify_run
    from luthier.cli.ending import describe_certificate, print_claims
    from luthier.runs.run import open_run

    if is_outside(run):
        with heartbeat(f"certifying {run}", quiet=as_json):
            certificate, path = verify_outside(run)
        if as_json:
            print_json({"model": run, "path": str(path), **certificate.as_dict()})
        else:
            print_claims(certificate)
            first = "" if certificate.is_valid else f": {certificate.broken[0].claim}"
            say(f"certificate {'valid' if certificate.is_valid else 'NOT VALID'}{first}")
            say("how the adapter was trained is not known here; no probe of the live model lies beside it")
            say(f"written: {path}")
        return 0 if certificate.is_valid else 1
    opened = open_run(run)
    with heartbeat(f"certifying {opened.id}", quiet=as_json):
        certificate = verify_run(opened, prompts=prompts)
    path = opened.folder / CERTIFICATE
    if as_json:
        print_json({"run": opened.id, "path": str(path), **certificate.as_dict()})
    else:
        print_claims(certificate)
        say(describe_certificate(certificate))
        say(f"written: {path}")
    return 0 if certificate.is_valid else 1
