"""What Luthier does, step by step, as the command line and the server call it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.data.prepare import Progress, prepare
from luthier.data.prepared import Prepared
from luthier.data.reasons import list_counts
from luthier.data.rows import ReadOptions
from luthier.data.source import Source
from luthier.errors import DataError
from luthier.runs.home import luthier_home
from luthier.runs.resolve import resolve_model
from luthier.spec.run import RunSpec


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
    done = prepare(options, seed=spec.seed, home=luthier_home(), split=split, progress=progress, opened=opened)
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
