"""What a person is told when a run has ended: where the result is, whether it is certified, and what it came to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from luthier.cli.output import paint, print_json, print_table, say, warn
from luthier.errors import LuthierError

if TYPE_CHECKING:
    from luthier.adapters.certificate import Certificate
    from luthier.runs.run import Run
    from luthier.training.session import Trained


def print_end(run: Run, trained: Trained, *, as_json: bool) -> None:
    """How the run ended; with its certificate, its report and the report's verdict where it is done."""
    from luthier.reports.sinks import list_commands

    progress, outcome = trained.progress, trained.outcome
    if as_json:
        facts = {
            "run": run.id,
            "folder": str(run.folder),
            "model": run.model_id,
            "state": outcome.reason,
            "step": outcome.step,
            "loss": progress.last_loss,
            "valid": progress.last_scores,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "final": str(trained.final) if trained.final else None,
            "merged": str(trained.merged) if trained.merged else None,
        }
        if paths := list_service_paths(run):
            facts["service_paths"] = paths
        print_json(facts | (write_evidence(run) if outcome.is_done else {}))
        return
    if not outcome.is_done:
        saved = "the state is saved" if outcome.step else "there is nothing to save yet"
        say(f"stopped by {outcome.reason} after step {outcome.step}; {saved}")
        say(f"go on:  luthier resume {run.folder}")
        return
    why = "" if outcome.reason == "finished" else " (stopped early: the held-out part no longer got better)"
    speed = progress.tokens / progress.seconds if progress.seconds else 0.0
    say(f"{paint('done', '32')} after {outcome.step} steps{why}")
    say(f"  weights  {trained.final}")
    if trained.merged:
        say(f"  merged   {trained.merged}")
    say(f"  model    {run.model_id}")
    for command in list_commands(run):
        say(f"  curves   {command}")
    say(f"  cost     {span(progress.seconds)} of training, {progress.tokens:,} tokens, {speed:,.0f} tokens/s")
    print_evidence(run)


def list_service_paths(run: Run) -> list[str]:
    """Every checkpoint that the run has on a service, in the order in which they were saved."""
    saved = (event for event in run.read_events() if event["kind"] == "saved_on_service")
    return list(dict.fromkeys(path for event in saved for path in event["paths"].values()))


def write_evidence(run: Run) -> dict[str, Any]:
    """The report, written; where it lies, what it says in one sentence, and what the certificate says."""
    from luthier.adapters.certificate import CERTIFICATE, find_certificate
    from luthier.workflow import write_report

    certificate = find_certificate(run)
    found: dict[str, Any] = {"certificate": None, "report": None, "verdict": None, "next": None}
    if certificate is not None:
        found["certificate"] = {"valid": certificate.is_valid, "path": str(run.folder / CERTIFICATE)}
    try:
        paths, verdict = write_report(run)
    except LuthierError as error:
        warn(f"no report: {error.message}")
        return found
    return found | {"report": str(paths.page), "verdict": verdict.sentence, "next": verdict.command or None}


def print_evidence(run: Run) -> None:
    """The same as lines, and how to go on: with what was not done yet, or with what the report would do next."""
    from luthier.adapters.certificate import find_certificate, find_uncertifiable
    from luthier.reports.words import visible
    from luthier.workflow import is_complete, needs_merge

    certificate, is_done = find_certificate(run), is_complete(run)
    for path in list_service_paths(run):
        say(f"  on the service  {path}")
    if certificate is None and is_done:
        say(f"  proof    none: {visible(find_uncertifiable(run))}")
    elif certificate is not None and is_done:
        say(f"  proof    {describe_certificate(certificate)}")
    else:
        say(f"  not {'merged' if needs_merge(run) else 'certified'} yet; the weights themselves are final")
    found = write_evidence(run)
    if found["report"]:
        say(f"  report   {found['report']}")
        say(visible(found["verdict"]))
    if not is_done:
        say(f"go on:  luthier resume {run.folder}")
    else:
        say(f"next:  {found['next'] or f'luthier evaluate {run.folder} --data FILE'}")


def describe_certificate(certificate: Certificate) -> str:
    """The certificate in one line."""
    count = len(certificate.claims)
    if certificate.is_valid:
        return (
            f"certificate {paint('valid', '32')}: {certificate.artefact} is what was trained, all {count} claims hold"
        )
    first = certificate.broken[0].claim if certificate.broken else "it claims nothing"
    return f"certificate {paint('NOT VALID', '31')}: {len(certificate.broken)} of {count} claims do not hold: {first}"


def print_claims(certificate: Certificate) -> None:
    """Every claim with what was found and what is allowed."""
    for artefact in dict.fromkeys(each.artefact for each in certificate.claims):
        say(artefact)
        own = [each for each in certificate.claims if each.artefact == artefact]
        marks = {True: paint("holds", "32"), False: paint("FAILS", "31")}
        print_table([(marks[each.holds], each.claim, each.found, f"allowed: {each.allowed}") for each in own])


def exit_code(run: Run) -> int:
    """1 for a run whose certificate says that its result is not what was trained."""
    from luthier.adapters.certificate import find_certificate

    certificate = find_certificate(run)
    return 1 if certificate is not None and not certificate.is_valid else 0


def span(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
