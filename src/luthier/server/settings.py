"""What an administrator decides of a server, as plain values that one process can hand to another."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import orjson

from luthier.errors import CallError, ModelError
from luthier.jobs.job import Timings
from luthier.runs.model_folder import check_name

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """The most that one key, one request or one file may take."""

    file_bytes: int = 512 * MEBIBYTE
    """A file sent in one request."""
    upload_bytes: int = 8192 * MEBIBYTE
    """A file sent in parts."""
    part_bytes: int = 64 * MEBIBYTE
    """One of those parts."""
    json_bytes: int = 4 * MEBIBYTE
    """The body of any other request."""
    live_bytes: int = 64 * MEBIBYTE
    """The body of a request that brings data to a model which a client trains step by step."""
    live_models: int = 256
    """Such models of one project, in sessions that go on."""
    live_waiting: int = 4096
    """Commands to such models of one project that wait."""
    live_samples: int = 8192
    """Sampling requests of one project that wait."""
    live_open: int = 64
    """Such models in the memory of one base model's process; others wait on the disk for their turn."""
    live_snapshot_seconds: float = 20.0
    """Work on such a model that a crash may have to repeat."""
    live_settle_seconds: float = 10.0
    """How long such a model is idle before its state is put on the disk."""
    live_idle_seconds: float = 300.0
    """How long it is idle before it leaves the memory."""
    requests_per_second: float = 500.0
    """Requests of one key, on average."""
    requests_at_once: int = 2000
    """Requests of one key before the average counts."""
    uploads: int = 8
    """Files that one key may be sending at a time."""
    streams: int = 1000
    """Event streams that one key may have open."""
    queued_jobs: int = 1000
    """Jobs of one project that are not finished."""
    reserve_bytes: int = 1024 * MEBIBYTE
    """What stays free on the server's disk; below it nothing is accepted."""
    drain_seconds: int = 30
    """How long requests may take to finish once the server was asked to end."""


@dataclass(frozen=True)
class Settings:
    """One server: its folder, its database, the models it gives, and its limits."""

    home: Path
    database: str
    host: str = "127.0.0.1"
    port: int = 8440
    models: Path | None = None
    """A folder laid out `org/name` in which names of models are looked up first."""
    allowed_models: tuple[str, ...] = ()
    """Patterns of the base models that jobs may name (`Qwen/*`); none: every name `org/name`."""
    folders: Mapping[str, str] = field(default_factory=dict)
    """Names of models that lie in folders of their own: `org/name`, and the folder's own path, to which they lead."""
    offers: Mapping[str, str] = field(default_factory=dict)
    """Kinds of accelerator that clients ask for, and what they get instead (`H100` to `cpu`)."""
    allowed_hosts: tuple[str, ...] = ()
    """Names besides its own by which clients may call the server."""
    workers: int = 1
    """Worker processes that this server starts."""
    processes: int = 1
    """Server processes; more than one needs PostgreSQL."""
    hosts: int = 2
    """Base models kept in memory at a time, to chat with."""
    host_idle_seconds: float = 600.0
    """How long one that nobody asks is kept."""
    precision: str = "auto"
    """The number format that those compute in: `fp32`, `bf16`, or `auto`, what the machine computes best in."""
    limits: Limits = Limits()
    timings: Timings = field(default_factory=Timings)
    log_requests: bool = False

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    def allows(self, base: str) -> bool:
        """Whether jobs may start from this base model; a result of an earlier job is checked by its own base."""
        if base in self.folders:
            return True
        if base.startswith("ft:") or not _is_name(base):
            return False
        return not self.allowed_models or any(fnmatch.fnmatchcase(base, each) for each in self.allowed_models)

    def as_json(self) -> str:
        """The settings as text, for another process."""
        tables = {**asdict(self), "home": str(self.home), "models": str(self.models) if self.models else None}
        return orjson.dumps(tables).decode()


def _is_name(base: str) -> bool:
    try:
        check_name(base)
    except ModelError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether an address names this machine alone."""
    return host in ("localhost", "::1") or host.startswith("127.")


def read_settings(text: str) -> Settings:
    """The settings that `as_json` wrote."""
    tables: dict[str, Any] = orjson.loads(text)
    tables["home"] = Path(tables["home"])
    tables["models"] = Path(tables["models"]) if tables["models"] else None
    tables["limits"] = Limits(**tables["limits"])
    tables["timings"] = Timings(**tables["timings"])
    for name in ("allowed_models", "allowed_hosts"):
        tables[name] = tuple(tables[name])
    return Settings(**tables)


def read_limits(given: tuple[str, ...]) -> Limits:
    """Limits changed by `NAME=VALUE`."""
    known = {each.name: each.type for each in fields(Limits)}
    limits = Limits()
    for text in given:
        name, _, value = text.partition("=")
        if name not in known:
            raise CallError(f"no limit `{name}`", hint="the limits are: " + ", ".join(known))
        try:
            number: Any = float(value) if known[name] == "float" else int(value)
        except ValueError:
            raise CallError(f"--limit {text}: expected a number, found {value!r}") from None
        if not 0 <= number < 2**53:
            raise CallError(f"--limit {text}: out of range")
        limits = replace(limits, **{name: number})
    return limits


def read_offers(given: tuple[str, ...]) -> dict[str, str]:
    """Offers written `H100=cpu`."""
    offers = {}
    for text in given:
        asked, equals, has = text.partition("=")
        if not asked or not equals or not has:
            raise CallError(f"--offer {text}: expected KIND=KIND, such as H100=cpu")
        offers[asked] = has
    return offers
