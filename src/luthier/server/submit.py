"""The one way a job is made, whatever dialect asked: checked whole, then written once."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import orjson
from pydantic import ValidationError

from luthier.engines.registry import LOCAL
from luthier.errors import DataError, DiskFullError, NotFoundError, SpecError
from luthier.jobs.capacity import Needs, check_asked, read_capacity, read_needs
from luthier.jobs.job import Idempotency, Job, NewJob, Quota
from luthier.runs.layout import PRACTICE
from luthier.runs.model_folder import check_model_folder, check_name, find_in_models
from luthier.server.problems import problem
from luthier.server.service import Service
from luthier.spec.problems import Problem, list_problems, raise_problems
from luthier.spec.run import RunSpec, find_contradictions

if TYPE_CHECKING:
    from luthier.jobs.keys import Key

MOST_METADATA, MOST_METADATA_KEY, MOST_METADATA_VALUE = 16, 64, 512
_SUFFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_REVISION = re.compile(r"[A-Za-z0-9][\w.-]{0,99}(?:/[\w.-]{1,99}){0,3}", re.ASCII)
_MOST_HEADER = 255
_MOST_PRIORITY = 100


def submit(service: Service, key: Key, new: NewJob, *, headers: Mapping[str, str]) -> tuple[Job, bool]:
    """Check what was asked and write the job; True where the same request had made it before."""
    spec = check_spec(new.spec)
    named = replace(
        new,
        project=key.project,
        key=key.id,
        training_file=spec.data.train,
        validation_file=spec.data.valid if isinstance(spec.data.valid, str) else None,
    )
    _check_labels(named)
    _check_base(service, key, spec)
    _check_files(service, named)
    check_disk(service)
    needs = _needs_of(spec, named)
    capacities = [read_capacity(worker.capacity) for worker in service.list_workers()]
    check_asked(read_needs(needs), capacities, service.settings.offers)
    quota = Quota(unfinished=service.settings.limits.queued_jobs)
    return service.jobs.create(
        replace(named, needs=needs), idempotency=read_idempotency(key, named, headers), quota=quota
    )


def _needs_of(spec: RunSpec, new: NewJob) -> dict[str, Any]:
    """What is known before the rows are: the machines that the spec asks for, and what its dialect asked besides."""
    compute = spec.compute
    asked = Needs(
        processors=compute.processes, gpu_type=compute.gpu_type, gpu_count=compute.gpu_count, nodes=compute.nodes
    )
    return {**asked.as_dict(), **new.needs}


def check_spec(tables: Mapping[str, Any], name: str = "the request") -> RunSpec:
    """The spec, strictly; raises one SpecError with every problem, those of a server among them."""
    raw = dict(tables)
    try:
        spec = RunSpec.model_validate(raw)
    except ValidationError as error:
        raise_problems(list_problems(error, raw, lambda path: name), name)
        raise
    found = [*find_contradictions(spec), *_not_for_servers(spec)]
    raise_problems([Problem(path, f"`{path}` {text}", name) for path, text in found], name)
    return spec


def _not_for_servers(spec: RunSpec) -> list[tuple[str, str]]:
    """A request names files by their ids and models by their names, never a path of the server."""
    found = []
    if spec.model.chat_template is not None:
        found.append(("model.chat_template", "names a file; a server uses the template of the model itself"))
    if spec.model.revision is not None and not _REVISION.fullmatch(spec.model.revision):
        found.append(("model.revision", "is not a branch, tag or commit"))
    for key in ("dir", "model_id_file"):
        if getattr(spec.output, key) is not None:
            found.append((f"output.{key}", "names a place on the server's disk; download the result instead"))
    if spec.data.train is None:
        found.append(("data.train", "is missing: it is the id of a file that was sent before"))
    if spec.engine.kind not in LOCAL:
        found.append(("engine.kind", f'is "{spec.engine.kind}"; this server trains with {", ".join(LOCAL)}'))
    return found


def _check_labels(new: NewJob) -> None:
    if new.suffix is not None and not _SUFFIX.fullmatch(new.suffix):
        raise _at("suffix", "up to 64 letters, digits, `_`, `.` and `-`, and the first a letter or a digit", new.suffix)
    if abs(new.priority) > _MOST_PRIORITY:
        raise _at("priority", f"-{_MOST_PRIORITY} to {_MOST_PRIORITY}", new.priority)
    if len(new.metadata) > MOST_METADATA:
        raise _at("metadata", f"at most {MOST_METADATA} pairs", len(new.metadata))
    for name, value in new.metadata.items():
        if len(name) > MOST_METADATA_KEY or len(value) > MOST_METADATA_VALUE:
            raise _at(
                "metadata", f"keys up to {MOST_METADATA_KEY} and values up to {MOST_METADATA_VALUE} characters", name
            )


def _at(param: str, expected: str, found: object) -> SpecError:
    error = SpecError(f"`{param}`: expected {expected}, found {str(found)[:100]!r}")
    vars(error)["param"] = param
    return error


def _check_base(service: Service, key: Key, spec: RunSpec) -> None:
    """The base is one that this server gives, or a result of the project's own that starts from one."""
    base = spec.model.base
    folders = service.settings.folders
    if base.startswith("/") and base in folders:
        named = next(name for name, each in folders.items() if each == folders[base] and name != base)
        raise _no_model(base, f"jobs call this model `{named}`; its path is for clients that train it live")
    if base.startswith("ft:"):
        service.find_weights(key.project, base)
        live = service.find_live(key.project, base)
        base = live.base if live else _first_base(base)
    if base not in folders:
        check_name(base)
    if not service.settings.allows(base):
        patterns = ", ".join(service.settings.allowed_models) or f"`org/name` and `{PRACTICE}`"
        raise _no_model(base, f"this server gives: {patterns}")
    models = service.settings.models
    if folder := find_in_models(base, models):
        check_model_folder(folder, within=models)  # code in it, or pickled weights: refused before any job


def _first_base(name: str) -> str:
    """The base model at the root of an `ft:` id, whose own parts follow it after colons."""
    while name.startswith("ft:"):
        name = name.removeprefix("ft:")
    return name.partition(":")[0]


def _no_model(base: str, hint: str) -> SpecError:
    error = SpecError(f"no base model `{base[:200]}` here", hint=hint)
    vars(error)["param"] = "model"
    return error


def _check_files(service: Service, new: NewJob) -> None:
    for param, name in (("training_file", new.training_file), ("validation_file", new.validation_file)):
        if name is None:
            continue
        try:
            file = service.files.find(new.project, name)
        except NotFoundError:
            raise _bad_file(
                param, f"no file `{name[:100]}` in this project", "send it first, then name it by its id"
            ) from None
        if file.status == "error":
            why = str((file.report or {}).get("message") or "its report says why")
            raise _bad_file(param, f"`{file.id}` cannot be trained on: {why}", "mend the file and send it again")


def _bad_file(param: str, message: str, hint: str) -> DataError:
    error = DataError(message, hint=hint)
    vars(error)["param"] = param
    return error


def check_disk(service: Service) -> None:
    """Accept nothing while the disk has no room left for what is running."""
    if not has_room(service):
        raise DiskFullError(
            "the server's disk is full, and it takes no jobs and no files until there is room",
            hint="delete files and jobs that are not needed, or ask who runs the server",
        )


def has_room(service: Service) -> bool:
    """Whether more than the reserve is free."""
    import shutil

    return shutil.disk_usage(service.home).free > service.settings.limits.reserve_bytes


def read_idempotency(key: Key, new: NewJob, headers: Mapping[str, str]) -> Idempotency | None:
    """What tells a retry from a second wish: the header, or that the SDK of OpenAI counts its own retries."""
    header = headers.get("idempotency-key")
    if header is not None and not 0 < len(header) <= _MOST_HEADER:
        raise problem(400, f"`Idempotency-Key` has more than {_MOST_HEADER} characters, or none")
    count = headers.get("x-stainless-retry-count", "0")
    asked = orjson.dumps(
        [new.dialect, dict(new.request) or dict(new.spec)], option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS
    )
    return Idempotency(
        key=key.id,
        header=header,
        body_hash=hashlib.sha256(asked).hexdigest(),
        is_retry=count.isascii() and count.isdigit() and int(count[:6]) > 0,
    )
