"""What lies on a service under `tinker://` paths, told in the run folder, and final weights in PEFT's format."""

from __future__ import annotations

import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import orjson

from luthier.engines.tinker.address import KEY_NAME, Service
from luthier.engines.tinker.connection import Connection
from luthier.errors import CheckpointError, LuthierError, ModelError, ServerError
from luthier.runs import events
from luthier.weights.peft import CONFIG, WEIGHTS, AdapterConfig, read_adapter, write_adapter

FILE = "tinker.json"
STATE, SAMPLER, EXTERNAL = "weights", "sampler_weights", "external_weights"
"""The kinds of checkpoints, as they stand in their paths."""
_FETCH_SECONDS = 60.0
_BLOCK = 1 << 20
_MOST_FILES = 64


@dataclass(frozen=True)
class Place:
    """Where a checkpoint lies: the service, its base model, and the path of each kind; why it is nowhere else."""

    service: str
    base: str
    name: str
    paths: Mapping[str, str]
    not_fetched: str = ""

    def write(self, folder: Path) -> None:
        """Write it as a file of the folder."""
        facts = {"service": self.service, "base": self.base, "name": self.name, "paths": dict(self.paths)}
        if self.not_fetched:
            facts["not_fetched"] = self.not_fetched
        (folder / FILE).write_bytes(orjson.dumps(facts, option=orjson.OPT_INDENT_2) + b"\n")


def find_place(folder: Path) -> Place | None:
    """Where the checkpoint of a folder lies on a service; None for one of another engine."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        found = orjson.loads(path.read_bytes())
        paths = {str(kind): str(value) for kind, value in found["paths"].items()}
        return Place(found["service"], found["base"], found["name"], paths, str(found.get("not_fetched", "")))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: cannot be read", where=str(path)) from None


def read_state_path(folder: Path) -> str:
    """The path of the full state that a checkpoint's folder names."""
    place = find_place(folder)
    if place is None or STATE not in place.paths:
        raise CheckpointError(f"{folder}: names no state on a Tinker service", where=str(folder))
    return place.paths[STATE]


@dataclass
class Saving:
    """A checkpoint on its way: asked for in the order of training, written down when the service has it."""

    connection: Connection
    base: str
    name: str
    futures: Mapping[str, Any]
    is_live: bool = False
    _place: Place | None = field(default=None, init=False)

    @property
    def place(self) -> Place:
        """Its paths, once the service has saved them all."""
        if self._place is None:
            paths = {
                kind: str(self.connection.wait(future, f"saving {self.name} ({kind})").path)
                for kind, future in self.futures.items()
            }
            self._place = Place(self.connection.service.url, self.base, self.name, paths)
            if self.connection.watch:
                self.connection.watch(events.SavedOnService(self.name, paths))
        return self._place

    def write(self, folder: Path) -> None:
        """The paths, as a file."""
        self.place.write(folder)


@dataclass
class Final:
    """The last checkpoint, and its weights as files where the service gives them."""

    saving: Saving
    external: Callable[[], Any]
    config: AdapterConfig
    is_live: bool = False

    def write(self, folder: Path) -> None:
        """The adapter in PEFT's format beside its paths, or the reason why it is on the service alone."""
        place, connection = self.saving.place, self.saving.connection
        try:
            path = str(connection.wait(self.external(), "exporting the weights").path)
            place = replace(place, paths={**place.paths, EXTERNAL: path})
            if connection.watch:
                connection.watch(events.SavedOnService(place.name, {EXTERNAL: path}))
            fetch = lambda target: _fetch_external(connection, path, target)  # noqa: E731
        except (ServerError, AttributeError) as error:
            exported = getattr(error, "message", str(error))
            fetch = lambda target: _fetch_archive(connection.service, place.paths[SAMPLER], target, exported)  # noqa: E731
        try:
            self._fetch(fetch, folder)
        except LuthierError as error:
            place = replace(place, not_fetched=error.message)
            if connection.watch:
                told = f"the weights stay on the service: {error.message}"
                connection.watch(events.Warned("weights_not_fetched", told))
        place.write(folder)

    def _fetch(self, fetch: Callable[[Path], None], folder: Path) -> None:
        draft = folder / "fetched"
        draft.mkdir()
        try:
            fetch(draft)
            found, tensors = read_adapter(draft)
            if (found.rank, found.scale) != (self.config.rank, self.config.scale):
                raise ModelError(
                    f"the fetched adapter has rank {found.rank} and scale {found.scale:g}, and not rank "
                    f"{self.config.rank} and scale {self.config.scale:g} as it was trained"
                )
            modules = sorted({name.rpartition(".")[0] for name in tensors})
            targets = tuple(sorted({module.rpartition(".")[2] for module in modules}))
            write_adapter(folder, replace(self.config, targets=targets), tensors)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _fetch_external(connection: Connection, path: str, folder: Path) -> None:
    """The files of an export, each by its own signed address."""
    found = connection.wait(connection.rest().get_external_weights_urls(path), "asking where the export lies")
    urls = dict(found.urls)
    if CONFIG not in urls or WEIGHTS not in urls:
        listed = ", ".join(sorted(urls)[:6]) or "nothing"
        raise ModelError(f"the export is no adapter in PEFT's format (it has {listed})")
    for name in (CONFIG, WEIGHTS):
        with _open(urls[name]) as source, (folder / name).open("wb") as file:
            shutil.copyfileobj(source, file, _BLOCK)


def _fetch_archive(service: Service, path: str, folder: Path, exported: str) -> None:
    """The archive of sampler weights, as services had it before exports."""
    run, _, name = path.removeprefix("tinker://").partition("/")
    url = f"{service.url}/api/v1/training_runs/{run}/checkpoints/{name}/archive"
    packed = folder / "archive"
    try:
        with _open(url, {"X-API-Key": service.key}) as source, packed.open("wb") as file:
            answered = source.headers.get_content_type() == "application/json"
            if not answered:
                shutil.copyfileobj(source, file, _BLOCK)
            else:
                url = str(orjson.loads(source.read())["url"])
        if answered:
            with _open(url) as source, packed.open("wb") as file:
                shutil.copyfileobj(source, file, _BLOCK)
        _unpack(packed, folder)
    except (ServerError, tarfile.TarError, ValueError, KeyError, TypeError) as error:
        told = getattr(error, "message", str(error))
        raise ModelError(f"the service neither exports them ({exported}) nor gives an archive ({told})") from None
    finally:
        packed.unlink(missing_ok=True)


def _unpack(packed: Path, folder: Path) -> None:
    """The two files of an adapter, wherever in the archive they lie."""
    with tarfile.open(packed) as archive:
        for _ in range(_MOST_FILES):
            member = archive.next()
            if member is None:
                break
            name = Path(member.name).name
            source = archive.extractfile(member) if member.isfile() and name in (CONFIG, WEIGHTS) else None
            if source is not None:
                with source, (folder / name).open("wb") as file:
                    shutil.copyfileobj(source, file, _BLOCK)


class _KeepsNoKey(urllib.request.HTTPRedirectHandler):
    """Goes where it is sent, and leaves the key at home."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        is_plain = newurl.startswith(("http://", "https://"))
        return urllib.request.Request(newurl, method="GET") if is_plain else None  # noqa: S310 (checked)


def _open(url: str, headers: Mapping[str, str] | None = None) -> Any:
    if not url.startswith(("http://", "https://")):
        raise ServerError(f"the service named an address that is none: {url[:60]!r}")
    opener = urllib.request.build_opener(_KeepsNoKey())
    try:
        return opener.open(urllib.request.Request(url, headers=dict(headers or {})), timeout=_FETCH_SECONDS)  # noqa: S310
    except urllib.error.HTTPError as error:
        error.close()
        hint = f"the address expired, or {KEY_NAME} does not reach it"
        raise ServerError(f"fetching the weights was refused ({error.code})", hint=hint) from None
    except OSError as error:
        raise ServerError(f"fetching the weights failed: {getattr(error, 'reason', error)}") from None
