"""What a job's spec says in the words of other dialects, whichever dialect made the job."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from luthier.jobs.job import Job, State
from luthier.spec.dialects.openai import AUTO, default_rate

PAIRS = ("dpo", "simpo", "orpo")
# RunSpec's own defaults, for tables that leave them out.
_EPOCHS, _BATCH, _BETA = 1.0, 16, 0.1


def part(job: Job, name: str) -> Mapping[str, Any]:
    """A table of the spec; an empty one where it has none."""
    found = job.spec.get(name)
    return found if isinstance(found, Mapping) else {}


def objective(job: Job) -> str:
    """The kind of the objective."""
    return str(part(job, "objective").get("kind", "sft"))


def method(job: Job) -> str:
    """The kind of the method."""
    return str(part(job, "method").get("kind", AUTO))


def epochs(job: Job) -> int | float:
    """Passes over the rows; a whole number where it is one."""
    given = float(part(job, "optim").get("epochs") or _EPOCHS)
    return int(given) if given.is_integer() else given


def batch(job: Job) -> int:
    """Examples in one step."""
    return int(part(job, "optim").get("batch") or _BATCH)


def rate_multiplier(job: Job) -> float | str:
    """The learning rate as a multiple of its method's default; `auto` where the plan decides."""
    rate = part(job, "optim").get("learning_rate")
    return AUTO if rate is None else round(float(rate) / default_rate(method(job), objective(job)), 6)


def beta(job: Job) -> float:
    """How strongly pairs hold the model to its reference."""
    return float(part(job, "objective").get("beta") or _BETA)


def seed(job: Job) -> int:
    """The seed."""
    return int(job.spec.get("seed") or 0)


def training_file(job: Job) -> str:
    """The stored file, or the name of a source that is none."""
    return job.training_file or str(part(job, "data").get("train") or "")


def estimated_finish(job: Job) -> int | None:
    """When the job should be done, if it goes on as it has."""
    if job.state is not State.RUNNING or not job.step or not job.steps or not job.started_at:
        return None
    return int(job.started_at + (time.time() - job.started_at) * job.steps / job.step)


def epoch_at(job: Job, step: int | None) -> float | None:
    """How many passes are done at a step."""
    return round(step / job.steps * epochs(job), 4) if step is not None and job.steps else None


def shown_model(job: Job) -> str | None:
    """The result, once there is one and while it is there."""
    return job.model if job.state is State.SUCCEEDED and job.model_deleted_at is None else None
