"""The results file of a job: its figures step by step as CSV, made from the run's log whenever it is asked for.

It is kept nowhere, so it is gone with its job; its id follows from the job's.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from luthier.errors import NotFoundError
from luthier.jobs.attempt import run_folder
from luthier.jobs.ids import is_id
from luthier.jobs.job import Job, State
from luthier.runs.layout import TRAINING_LOG

if TYPE_CHECKING:
    from luthier.server.service import Service

PURPOSE = "fine-tune-results"
COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
_FILE, _JOB = "file-", "ftjob-"


def results_id(job: Job) -> str:
    """The id of a job's results file."""
    return _FILE + job.id.removeprefix(_JOB)


def results_name(job: Job) -> str:
    """The name that its file is given."""
    return f"{job.id}_results.csv"


def find_results(service: Service, project: str, file: str) -> Job | None:
    """The job of the project whose results file this is."""
    if not file.startswith(_FILE) or not is_id(file):
        return None
    try:
        job = service.jobs.find(project, _JOB + file.removeprefix(_FILE))
    except NotFoundError:
        return None
    return job if job.state is State.SUCCEEDED else None


def render_results(home: Path, job: Job) -> bytes:
    """The figures of every step; a column that the run did not measure is empty."""
    path = run_folder(home, job.id) / TRAINING_LOG
    log: list[dict[str, Any]] = orjson.loads(path.read_bytes()) if path.is_file() else []
    out = io.StringIO(newline="")
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(COLUMNS)
    for entry in log:
        held_out = entry.get("eval") or {}
        figures = (
            entry.get("loss"),
            entry.get("reward_accuracy"),
            held_out.get("loss"),
            held_out.get("token_accuracy"),
        )
        lines.writerow([entry["step"], *("" if figure is None else figure for figure in figures)])
    return out.getvalue().encode()
