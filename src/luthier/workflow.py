"""What Luthier does, step by step, as the command line and the server call it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.data.prepare import Progress, prepare
from luthier.data.prepared import Prepared
from luthier.data.reasons import list_counts
from luthier.data.rows import ReadOptions
from luthier.data.source import Source, open_source
from luthier.errors import DataError, DiskFullError
from luthier.runs.home import luthier_home, token_home
from luthier.runs.resolve import ResolvedModel, find_resolved, resolve_model, resolve_start
from luthier.runs.run import Run, create_run
from luthier.spec.data import Data
from luthier.spec.plan import RunPlan
from luthier.spec.run import RunSpec

if TYPE_CHECKING:
    from luthier.adapters.certificate import Certificate
    from luthier.evals.exact_match import ExactMatch
    from luthier.evals.heldout import Place
    from luthier.evals.perplexity import Perplexity
    from luthier.evals.scores import Scores
    from luthier.reports.verdict import Verdict
    from luthier.reports.write import ReportPaths
    from luthier.training.passes import Watch
    from luthier.training.session import Trained
    from luthier.training.signals import StopFlag


def read_options(spec: RunSpec, *, with_model: bool = True, any_kind: bool = False) -> ReadOptions:
    """How the spec's rows are read: without a model only as far as text goes; `any_kind` whatever the objective."""
    template = spec.model.chat_template
    return ReadOptions(
        data=spec.data,
        objective=None if any_kind else spec.objective.kind,
        model_folder=resolve_model(spec.model.base, revision=spec.model.revision) if with_model else None,
        chat_template=Path(template) if template else None,
    )


def prepare_data(
    spec: RunSpec,
    *,
    with_model: bool = True,
    any_kind: bool = False,
    split: str | None = None,
    progress: Progress | None = None,
    opened: Source | None = None,
    may_be_empty: bool = False,
) -> Prepared:
    """The spec's rows, checked, split and tokenised into the token cache; found there when nothing changed."""
    options = read_options(spec, with_model=with_model, any_kind=any_kind)
    done = prepare(options, seed=spec.seed, home=token_home(), split=split, progress=progress, opened=opened)
    if done.summary["train"] == 0 and not may_be_empty:
        raise nothing_left(done.summary)
    return done


def nothing_left(summary: dict[str, Any]) -> DataError:
    """The error of a run that would train no row at all, with the reasons why."""
    reasons = list_counts(summary["reasons"]) or "all are held out"
    return DataError(
        f"nothing is left to train: of {summary['rows']:,} rows {summary['dropped']:,} were dropped ({reasons})",
        hint="`luthier data check` lists them; data.max_length and data.valid decide most of it",
        details=summary,
    )


@dataclass(frozen=True)
class Ready:
    """A run with everything decided: what will be trained, on which rows, from which model."""

    plan: RunPlan
    prepared: Prepared
    resolved: ResolvedModel


def plan_run(spec: RunSpec, prepared: Prepared) -> RunPlan:
    """The spec with nothing left to decide, and what the run takes; no model is loaded or fetched."""
    from luthier.reports.sinks import check_sinks
    from luthier.training.planner import plan_run as plan

    check_sinks(spec.output.sinks)
    return plan(spec, prepared, resolve_model(spec.model.base, revision=spec.model.revision), luthier_home())


def make_ready(spec: RunSpec, prepared: Prepared) -> Ready:
    """The plan, and the model's weights on this machine where they are trained here, for an engine that is there."""
    from luthier.engines.registry import REMOTE, check_engine

    check_engine(spec.engine.kind)
    plan = plan_run(spec, prepared)
    is_here = spec.engine.kind not in REMOTE
    return Ready(plan, prepared, find_resolved(spec.model.base, spec.model.revision, with_weights=is_here))


def start_run(ready: Ready) -> Run:
    """A new run folder for it."""
    parent = Path(ready.plan.spec.output.dir or "runs")
    return create_run(parent, ready.plan, ready.prepared, ready.resolved)


def warm_up(spec: RunSpec) -> None:
    """Import what the engine needs while the data is being read; raises where a package that was named is missing.

    A service elsewhere is asked whether it is there, and takes the key.
    """
    from luthier.engines.registry import REMOTE, check_engine, check_service, import_in_background
    from luthier.engines.surroundings import prepare_process
    from luthier.reports.sinks import check_sinks

    check_sinks(spec.output.sinks)
    prepare_process(spec.compute.processes)
    if spec.engine.kind in REMOTE:
        check_engine(spec.engine.kind)
        check_service(spec.engine.kind)
    if spec.engine.kind in ("torch", "trl") and spec.compute.processes == 1:
        import_in_background()


def train_run(
    run: Run, ready: Ready, *, watch: Watch, stop: StopFlag, resume: bool = False, allow_changed: bool = False
) -> Trained:
    """Train a run in this process, alone or as one of several; merge at the end where the spec asks for it."""
    from luthier.training.session import Work, train

    share = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    with stop:
        with _told_elsewhere(run, watch) as told:
            work = Work(run, ready.plan, ready.prepared, ready.resolved, luthier_home(), told, stop, share)
            trained = train(work, resume=resume, allow_changed=allow_changed)
        if trained.final is None:
            return trained
        return replace(trained, merged=complete_run(run, watch=watch, stop=stop))


@contextmanager
def _told_elsewhere(run: Run, watch: Watch) -> Iterator[Watch]:
    """The watch, and the sinks that the spec names; they are opened with the first event, when the run is ours."""
    from luthier.reports.sinks import Sinks, open_sinks
    from luthier.runs import events

    def drop(name: str, why: str) -> None:
        warned = events.Warned("sink_dropped", f"{name} hears no more of this run, which goes on: {why}")
        run.events.append(warned)
        watch(warned)

    with ExitStack() as stack:
        opened: list[Sinks] = []

        def tell(event: events.Event) -> None:
            watch(event)
            if isinstance(event, events.RunStarted) and run.spec.output.sinks:
                opened.append(stack.enter_context(closing(open_sinks(run.spec.output.sinks, run, drop))))
            for sinks in opened:
                sinks.log(event)

        yield tell


def complete_run(run: Run, *, watch: Watch, stop: StopFlag) -> Path | None:
    """What comes after training: the adapter merged where the spec asks for it, and the result certified.

    Returns the merged model that this made. What could not be certified is warned of: nothing trained is lost by it.
    """
    from luthier.adapters.certificate import is_certified_whole
    from luthier.errors import ProofError
    from luthier.runs import events

    merged = merge_run(run, watch=watch, stop=stop) if needs_merge(run) else None
    if why := _note_uncertifiable(run):
        watch(events.Warned("not_certified", f"not certified: {why}"))
    elif not stop and not is_certified_whole(run):
        try:
            certify_run(run, watch=watch, stop=stop)
        except ProofError as error:
            watch(events.Warned(error.code, error.message))
    return merged


def is_complete(run: Run) -> bool:
    """Whether nothing is left to do of a run: trained, its adapter merged where that was asked, and certified.

    One that nothing here can certify is complete without, and says why.
    """
    from luthier.adapters.certificate import find_uncertifiable, is_certified_whole

    is_done = run.state == "finished" and not needs_merge(run)
    return is_done and (is_certified_whole(run) or bool(find_uncertifiable(run)))


def _note_uncertifiable(run: Run) -> str:
    """Why a run that a service trained cannot be certified here, noted in its lineage; empty where it can be."""
    from luthier.adapters.certificate import UNCERTIFIED, find_uncertifiable
    from luthier.engines.registry import REMOTE
    from luthier.runs.lineage import write_lineage
    from luthier.weights.tensors import has_weights

    if run.spec.engine.kind not in REMOTE:
        return ""
    if why := find_uncertifiable(run):
        return why
    if has_weights(resolve_model(run.spec.model.base, revision=run.spec.model.revision)):
        return ""
    absent = f"the weights of {run.spec.model.base} are not on this machine"
    why = f"{absent}; `luthier verify {run.folder}` certifies it once they are"
    write_lineage(run, {UNCERTIFIED: why})
    return why


def needs_merge(run: Run) -> bool:
    """Whether the spec asks for a merged model that is not there."""
    from luthier.runs.layout import MERGED_MODEL

    return run.spec.output.merge and run.spec.method.kind != "full" and not (run.folder / MERGED_MODEL).exists()


def reopen(run: Run) -> Ready:
    """What a run needs to go on, from its own plan."""
    return make_ready(run.spec, prepare_data(run.spec))


def merge_run(run: Run, *, watch: Watch, stop: StopFlag) -> Path | None:
    """The final adapter merged into its base, in the run folder; None when asked to stop on the way.

    Adapter and merged model are certified together before the model appears.
    """
    from luthier.adapters.merge import Stopped
    from luthier.adapters.verify import MergeOptions
    from luthier.adapters.verify import merge_run as merge
    from luthier.runs import events

    watch(events.Working("merging the adapter into its base", 0, 1))
    try:
        merged = merge(run, None, MergeOptions(certified=lambda _: None, should_stop=lambda: bool(stop)))
    except Stopped:
        return None
    except DiskFullError as error:
        error.hint = f"the adapter is final; free some space, then: luthier resume {run.folder}"
        raise
    watch(events.Working("merging the adapter into its base", 1, 1))
    return merged.folder


def certify_run(run: Run, *, watch: Watch, stop: StopFlag) -> Certificate | None:
    """The certificate of the run's result, valid or not; None when asked to stop on the way."""
    from luthier.adapters.merge import Stopped
    from luthier.adapters.verify import verify_run
    from luthier.runs import events

    watch(events.Working("making the certificate in a fresh process", 0, 1))
    try:
        certificate = verify_run(run, should_stop=lambda: bool(stop))
    except Stopped:
        return None
    watch(events.Working("making the certificate in a fresh process", 1, 1))
    return certificate


def write_report(run: Run) -> tuple[ReportPaths, Verdict]:
    """The report of a run in its own folder, and what it says in one sentence."""
    from luthier.reports.model import read_report
    from luthier.reports.verdict import find_verdict
    from luthier.reports.write import write_reports

    report = read_report(run)
    return write_reports([report], run.folder), find_verdict(report)


@dataclass(frozen=True)
class Evaluation:
    """What a model is asked: rows of a source, or the rows its run held out where none is named."""

    data: str | None = None
    rows: int | None = None
    max_tokens: int | None = None
    chat_template: str | None = None


@dataclass(frozen=True)
class Evaluated:
    """What came of it: exact match on rows that end with an answer, their scores too, perplexity on plain texts."""

    model: str
    exact: ExactMatch | None
    perplexity: Perplexity | None
    left_out: dict[str, int]
    scores: Scores | None = None


def evaluate_models(
    model: str,
    wanted: Evaluation,
    *,
    base_too: bool = False,
    against: str | None = None,
    progress: Progress | None = None,
) -> list[Evaluated]:
    """A model measured on held-out rows, and behind it what it started from or another model on the same rows."""
    from luthier.engines.registry import import_in_background
    from luthier.engines.surroundings import prepare_process
    from luthier.evals.heldout import find_rows, find_template

    prepare_process()
    import_in_background()
    tuned = find_resolved(model, with_weights=True)
    source, only = find_rows(tuned, wanted.data)
    asked = [(tuned, find_template(tuned, wanted.chat_template))]
    if base_too:
        asked.append((resolve_start(tuned), asked[0][1]))
    elif against:
        other = find_resolved(against, with_weights=True)
        asked.append((other, find_template(other, wanted.chat_template)))
    with open_source(source) as opened:
        return [_evaluate(each, template, wanted, (opened, only), progress) for each, template in asked]


def _evaluate(
    resolved: ResolvedModel,
    template: Path | None,
    wanted: Evaluation,
    rows: tuple[Source, set[Place] | None],
    progress: Progress | None,
) -> Evaluated:
    from luthier.engines.registry import load_sampler
    from luthier.evals.exact_match import measure_exact_match
    from luthier.evals.heldout import read_held_out
    from luthier.evals.perplexity import measure_perplexity
    from luthier.evals.scores import find_scores

    source, only = rows
    options = ReadOptions(
        Data(train=wanted.data),
        model_folder=resolved.folder,
        chat_template=template,
        learn_shapes=False,
        fast_tokenizer=False,
    )
    held_out = read_held_out(options, source, limit=wanted.rows, only=only)

    def tick(done: int, count: int) -> None:
        if progress and done < count:
            progress(done, done, count)

    sampler = load_sampler(resolved, luthier_home())
    exact = perplexity = scores = None
    if held_out.questions:
        exact = measure_exact_match(sampler, held_out, max_tokens=wanted.max_tokens, tick=tick)
        scores = find_scores(exact, held_out.marks)
    if held_out.texts:
        perplexity = measure_perplexity(sampler, held_out)
    return Evaluated(resolved.name, exact, perplexity, held_out.left_out, scores)
