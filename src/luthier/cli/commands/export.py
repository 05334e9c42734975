"""`luthier export`: the result of a run as other programs take it."""

from __future__ import annotations

from pathlib import Path

import click

from luthier.cli.output import Command, print_json, print_table, say, warn

# As the code that writes them has them; the command line starts without importing it.
_TARGETS = ("peft", "merged", "mlx", "gguf", "ollama")
_KINDS = ("own", "f32", "f16", "bf16", "q8_0")


@click.command("export", cls=Command)
@click.argument("run")
@click.option("--to", required=True, type=click.Choice(_TARGETS), help="What to write.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A folder that does not exist yet; `exports` in the run folder when absent.",
)
@click.option(
    "--quantise",
    "--quantize",
    default="own",
    type=click.Choice(_KINDS),
    help="Numbers of a gguf or ollama export; the model's own type when absent.",
)
@click.option(
    "--without-certificate",
    is_flag=True,
    help="Export what no certificate vouches for; the run's lineage says so.",
)
def command(run: str, to: str, output: Path | None, quantise: str, without_certificate: bool, as_json: bool) -> None:
    """Write the result of RUN as a PEFT adapter, a merged model, for mlx_lm, as GGUF, or for Ollama."""
    from luthier.adapters.certificate import check_certificate
    from luthier.adapters.export import ExportOptions, Target, export_run
    from luthier.runs.run import open_run

    target: Target = to  # type: ignore[assignment]
    certified = None if without_certificate else check_certificate
    facts = export_run(open_run(run), target, output, ExportOptions(certified, quantise=quantise))
    if as_json:
        print_json(
            {
                "run": run,
                "to": facts.to,
                "folder": str(facts.folder),
                "files": facts.files,
                **facts.details,
                "notes": facts.notes,
            }
        )
        return
    for note in facts.notes:
        warn(note)
    print_table([(name, f"{size:,} bytes") for name, size in facts.files.items()], right=(1,))
    if "largest_error" in facts.details:
        kind, error = facts.details["kind"], facts.details["largest_error"]
        say(f"read back: every number is the model's within the rounding of {kind} (largest error {error:.2g})")
    say(f"{facts.to}: {facts.folder}")
    if facts.to == "ollama":
        say(f"next: ollama create NAME -f {facts.folder}/Modelfile")
