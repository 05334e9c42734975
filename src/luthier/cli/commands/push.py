"""`luthier push`: the result of a run on the Hugging Face hub."""

from __future__ import annotations

import click

from luthier.cli.output import Command, print_json, print_table, say, warn


@click.command("push", cls=Command)
@click.argument("run")
@click.argument("repo", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Only you and your organisation can read it.")
@click.option("--merged", is_flag=True, help="Push the merged model in place of the adapter.")
@click.option(
    "--without-certificate",
    is_flag=True,
    help="Push what no certificate vouches for; the run's lineage says so.",
)
def command(run: str, repo: str, private: bool, merged: bool, without_certificate: bool, as_json: bool) -> None:
    """Put the result of RUN on the hub as ORG/NAME, with a card; the token comes from HF_TOKEN."""
    from dataclasses import asdict

    from luthier.adapters.certificate import check_certificate
    from luthier.adapters.push import PushOptions, push_run
    from luthier.reports.findings import list_evidence
    from luthier.reports.model import read_report
    from luthier.runs.run import open_run

    certified = None if without_certificate else check_certificate
    opened = open_run(run)
    options = PushOptions(certified, private=private, merged=merged, evidence=list_evidence(read_report(opened)))
    facts = push_run(opened, repo, options)
    if as_json:
        print_json(asdict(facts))
        return
    for note in facts.notes:
        warn(note)
    print_table([(name, f"{size:,} bytes") for name, size in facts.files.items()], right=(1,))
    say(f"pushed: {facts.url}")
