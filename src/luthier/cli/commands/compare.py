"""`luthier compare`: a model beside what it started from, on the same prompts with the same seeds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from luthier.cli.output import Command, paint, print_json, print_table, progress_bar, say

if TYPE_CHECKING:
    from luthier.evals.compare import Compared, Wanted

_COLOURS = {"better": "32", "worse": "31"}
_SHOWN = 3
_MOST = 240
_ALONE = "answers.json"


def _wanted(asked: dict[str, Any]) -> Wanted:
    """What is compared, by the options that were given."""
    from luthier.engines.verbs import SampleParams
    from luthier.evals.compare import Wanted

    paths = {key: Path(asked[key]).expanduser() if asked[key] else None for key in ("prompts", "general")}
    return Wanted(
        SampleParams(asked["max_tokens"], asked["temperature"], seed=asked["seed"]),
        prompts=paths["prompts"],
        data=asked["data"],
        rows=asked["rows"],
        base=asked["base"],
        with_base=asked["with_base"],
        chat_template=asked["chat_template"],
        general=paths["general"],
        checks=_checks(asked["regex"], asked["json_schema"]),
        judge=_judge(asked["judge"], asked["judge_model"]),
        on_service=asked["on_service"],
    )


@click.command("compare", cls=Command)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--base", metavar="MODEL", help="Compare with this model, instead of what each started from.")
@click.option("--compare-base/--no-compare-base", "with_base", default=True, help="Ask the base too, or not.")
@click.option("--on-service", is_flag=True, help="Let the Tinker service that trained a run answer for it.")
@click.option("--prompts", metavar="FILE", help="Prompts to ask: a JSON list, JSON lines, or lines of text.")
@click.option("--data", metavar="SOURCE", help="Rows with answers to ask; a run has its own, the rows it held out.")
@click.option("-n", "rows", type=click.IntRange(1), metavar="N", help="Ask the first N only; of rows, 100 are asked.")
@click.option("--max-tokens", type=click.IntRange(1), default=150, show_default=True, help="Cut answers off here.")
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.7, show_default=True, help="0 takes the likeliest token."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the draws.")
@click.option("--regex", metavar="PATTERN", help="A good answer holds this regular expression.")
@click.option("--json-schema", metavar="FILE", help="A good answer is JSON that is valid by this schema.")
@click.option("--general", metavar="FILE", help="Plain text by which forgetting is measured, instead of the sample.")
@click.option("--judge", metavar="URL", help="Let a model behind an OpenAI-compatible endpoint judge the answers.")
@click.option("--judge-model", metavar="NAME", help="The name of that model; its key is read from LUTHIER_JUDGE_KEY.")
@click.option("--chat-template", metavar="FILE", help="Chat template to ask by, instead of the models' own.")
@click.option("-o", "--output", metavar="FILE", help="Write there, instead of comparison.json in the run's folder.")
def command(models: tuple[str, ...], output: str | None, as_json: bool, **asked: Any) -> None:
    """Compare each MODEL with what it started from: same prompts, same seeds, intervals, and a verdict.

    MODEL is a run, an adapter folder, a model folder, a pattern of those, or an ft: id. What was answered is
    remembered, so that a comparison that was stopped goes on where it was.
    """
    from luthier.engines.registry import import_in_background
    from luthier.engines.surroundings import prepare_process
    from luthier.evals.compare import compare_model, list_named
    from luthier.runs.home import luthier_home

    wanted = _wanted(asked)
    names = list_named(models)
    prepare_process()
    import_in_background()
    with progress_bar("answering", quiet=as_json) as progress:

        def tick(done: int, count: int) -> None:
            if progress and done < count:
                progress(done, done, count)

        found = [compare_model(name, wanted, luthier_home(), tick) for name in names]
    paths = _write(found, output, wanted)
    if as_json:
        print_json(found[0].facts if len(found) == 1 else {"models": [each.facts for each in found]})
        return
    for each in found:
        _print_one(each.facts)
    for path in paths:
        say(f"{'report ' if path.suffix == '.html' else 'written'}  {path}")


def _checks(pattern: str | None, schema: str | None) -> Any:
    from luthier.errors import CallError
    from luthier.evals.metrics import Checks
    from luthier.evals.schema import read_schema

    try:
        compiled = re.compile(pattern) if pattern is not None else None
    except re.error as error:
        raise CallError(f"--regex: no regular expression: {error}") from None
    return Checks(compiled, read_schema(Path(schema).expanduser()) if schema is not None else None)


def _judge(url: str | None, model: str | None) -> Any:
    from luthier.errors import CallError
    from luthier.evals.judge import build_judge

    if bool(url) != bool(model):
        raise CallError("--judge and --judge-model belong together", hint="give both, or neither")
    return build_judge(url, model) if url and model else None


def _write(found: list[Compared], output: str | None, wanted: Wanted) -> list[Path]:
    """Each into its run's folder, whose report is written again; or all into one file."""
    from luthier.evals.compare import write_facts
    from luthier.reports.evidence import COMPARISON
    from luthier.reports.write import write_report

    name = COMPARISON if wanted.with_base else _ALONE
    apart = [each for each in found if each.run is None or output is not None]
    paths = []
    for each in found:
        if each.run is not None and output is None:
            each.write(each.run.folder / name)
            paths.append(each.run.folder / name)
            if wanted.with_base:
                paths.append(write_report(each.run).page)
    if apart:
        path = Path(output).expanduser() if output else Path(name)
        write_facts(path, apart[0].facts if len(apart) == 1 else {"models": [each.facts for each in apart]})
        paths.append(path)
    return paths


def _print_one(facts: dict[str, Any]) -> None:
    from luthier.reports.evidence import build_comparison
    from luthier.reports.findings import list_findings

    say(_visible(facts["model"]))
    say(f"  {facts['asked']['prompts']:,} prompts, from {_visible(facts['asked']['from'])}")
    if facts["metrics"]:
        _print_metrics(facts)
    for name, value in facts.get("measured", {}).items():
        say(f"  {name}  {value:.4g}")
    for finding in list_findings(build_comparison(facts)):
        if finding.mark != "good":
            say(f"  {finding.label}: {_visible(finding.sentence)}")
    for note in facts["notes"]:
        say(f"  note: {_visible(note)}")
    _print_answers(facts)
    say(_visible(facts["verdict"]))


def _print_metrics(facts: dict[str, Any]) -> None:
    head = ("metric", "base", "tuned", "95 % interval", "won", "even", "lost", "")
    lines = [
        (
            name,
            f"{entry['base']:.4g}",
            f"{entry['tuned']:.4g}",
            f"{entry['low']:+.3g} to {entry['high']:+.3g}",
            *(f"{entry[key]:,}" for key in ("wins", "ties", "losses")),
            entry["verdict"],
        )
        for name, entry in facts["metrics"].items()
    ]
    print_table([head, *lines], right=(1, 2, 3, 4, 5, 6))


def _print_answers(facts: dict[str, Any]) -> None:
    for result in facts["results"][:_SHOWN]:
        asked = result["prompt"][-1]["content"] if result["prompt"] else ""
        said = [("asked", asked), ("expected", result["reference"])]
        said += [("base", result.get("base_response")), ("tuned", result["lora_response"])]
        say()
        for name, text in said:
            if text is not None:
                say(f"  {paint(f'{name:<8}', '36')}  {_short(text) or 'nothing'}")
    if facts["results"]:
        say()


def _short(text: str) -> str:
    line = _visible(text.strip())
    return line if len(line) <= _MOST else line[:_MOST] + "..."


def _visible(text: str) -> str:
    """Line breaks made visible; nothing of a model's answer may move the cursor of a terminal."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in str(text))
