"""Put the result of a run on the Hugging Face hub, in one commit and with a card of where it comes from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from luthier.adapters.export import Certified, check_allowed, find_final
from luthier.errors import CallError, CheckpointError, HubError, ModelError
from luthier.extras import import_extra
from luthier.runs.layout import FINAL_MODEL, MERGED_MODEL
from luthier.runs.lineage import list_versions
from luthier.runs.manifest import MANIFEST, check_manifest
from luthier.runs.run import Run
from luthier.weights.card import CARD, CardFacts, render_card
from luthier.weights.peft import CONFIG, read_adapter

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOKEN = "HF_TOKEN"  # noqa: S105 (the name of a variable)
_HINTS = {
    401: f"make a token that may write on the hub's settings page, and put it into {_TOKEN}",
    403: f"the token in {_TOKEN} may not write there: name a place of your own, or make another token",
    404: "is the name of the organisation right?",
    409: "somebody else changed the place at the same time: push again",
    413: "the hub takes no file as large as this",
}


@dataclass(frozen=True)
class PushOptions:
    """How a result is put on the hub; `certified` is as for an export."""

    certified: Certified | None
    private: bool = False
    merged: bool = False
    """The merged model in place of the adapter."""
    evidence: Mapping[str, str] = field(default_factory=dict)
    """What the run's report says was proved and compared, for the card."""


@dataclass(frozen=True)
class PushFacts:
    """What was pushed: where it now is, the commit, its files with their bytes, and what to know of it."""

    repo: str
    url: str
    commit: str
    files: dict[str, int]
    notes: tuple[str, ...]


def push_run(run: Run, repo: str, options: PushOptions) -> PushFacts:
    """Put the run's final weights, or its merged model, into `repo` on the hub, which is made where it is not there.

    The token comes from the environment alone, and so may the hub's address (HF_ENDPOINT).
    """
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise CallError(f"no name of a place on the hub: {repo}", hint="it is called as `org/name`")
    token = os.environ.get(_TOKEN, "")
    if not token:
        raise CallError(f"no token for the hub in {_TOKEN}", hint=f"make one that may write, then: export {_TOKEN}=...")
    folder = _find_folder(run, merged=options.merged)
    is_adapter = folder.name not in (FINAL_MODEL, MERGED_MODEL)
    hub = import_extra("huggingface_hub", "torch")
    check_allowed(run, options.certified, f"push to {repo}")
    card = render_card(replace(build_card(run, is_adapter=is_adapter), evidence=options.evidence)).encode()
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    contents: dict[str, Path | bytes] = {**paths, CARD: card}
    contents.pop(MANIFEST, None)
    api = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)
    with _hub_errors(repo, token):
        url = str(api.create_repo(repo, private=options.private or None, exist_ok=True))
        if options.private and not api.repo_info(repo).private:
            raise HubError(
                f"{repo} is there already, and anybody can read it",
                hint="make it private on the hub first, or push to another name",
            )
        operations = [
            hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=each if isinstance(each, bytes) else str(each))
            for name, each in contents.items()
        ]
        done = api.create_commit(repo, operations, commit_message=f"{run.id}, trained with Luthier")
    sizes = {name: len(each) if isinstance(each, bytes) else each.stat().st_size for name, each in contents.items()}
    return PushFacts(repo, url, str(done.oid), sizes, _notes(folder, is_adapter=is_adapter))


def _find_folder(run: Run, *, merged: bool) -> Path:
    if not merged:
        return find_final(run)
    folder = run.folder / MERGED_MODEL
    if not folder.is_dir():
        raise ModelError(f"{run.id} has no merged model", hint=f"`luthier merge {run.id}` makes it")
    try:
        check_manifest(folder)
    except CheckpointError as error:
        raise ModelError(f"{folder}: damaged: {error.message}", hint="remove it and merge again") from None
    return folder


def build_card(run: Run, *, is_adapter: bool) -> CardFacts:
    """What the card of a run's result says, all of it from the run's plan and lineage."""
    spec, lineage = run.spec, run.lineage
    base: Mapping[str, Any] = lineage.get("base", {})
    settings = {
        "learning_rate": spec.optim.learning_rate,
        "steps": lineage.get("steps"),
        "batch": spec.optim.batch,
        "rank": getattr(spec.method, "rank", None),
        "alpha": getattr(spec.method, "alpha", None),
        "rows": (lineage.get("data", {}).get("rows") or {}).get("train"),
    }
    metrics = {
        name: float(value)
        for name, value in lineage.get("metrics", {}).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return CardFacts(
        name=run.id,
        base=str(base.get("name") or spec.model.base),
        method=spec.method.kind,
        objective=spec.objective.kind,
        revision=base.get("revision"),
        is_adapter=is_adapter,
        parents=lineage.get("parents", []),
        settings={key: value for key, value in settings.items() if value is not None},
        metrics=metrics,
        data_hash=lineage.get("data", {}).get("hash", ""),
        plan_hash=lineage.get("plan", {}).get("hash", ""),
        versions=lineage.get("versions") or list_versions(),
    )


def _notes(folder: Path, *, is_adapter: bool) -> tuple[str, ...]:
    base = read_adapter(folder)[0].base if is_adapter else ""
    if not base or _REPO.fullmatch(base):
        return ()
    return (f"{CONFIG} names `{base}` as the base, which nobody else can load: say in the card which model that is",)


@contextmanager
def _hub_errors(repo: str, token: str) -> Iterator[None]:
    """Turn what the hub's client says into our errors; the token is in none of them."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:  # the client has errors of its own, of its network library and of Python
        status, cause = _find_answer(error)
        said = " ".join(str(cause).split()).replace(token, "...")[:300] or type(cause).__name__
        told = f"the hub refused {repo} ({status})" if status else f"the hub could not be reached for {repo}"
        hint = _HINTS.get(status or 0, "check the network and HF_ENDPOINT" if status is None else "push again later")
        raise HubError(f"{told}: {said}", hint=hint) from None


def _find_answer(error: BaseException) -> tuple[int | None, BaseException]:
    """The hub's status and the error that came of it, behind what the client wrapped around them."""
    found: BaseException | None = error
    while found is not None:
        status = getattr(getattr(found, "response", None), "status_code", None)
        if isinstance(status, int):
            return status, found
        last, found = found, found.__cause__
    return None, last
