"""Which server, and by which key: from flags, else the environment, else a `.env` file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from luthier.errors import CallError
from luthier.runs.env_file import first_variable as _first
from luthier.runs.env_file import read_env_file

SERVER_NAMES = ("LUTHIER_SERVER", "BACKEND_BASE_URL")
KEY_NAMES = ("LUTHIER_API_KEY", "SYNTH_API_KEY")
"""Under which names a server and a key are looked for, the first one found; the last are those of Synth's clients."""
_LOOPBACK = ("localhost", "127.0.0.1", "::1")

Choose = Callable[[Sequence[Path]], Path]


@dataclass(frozen=True)
class Address:
    """A server and a key."""

    url: str
    key: str

    @property
    def travels_openly(self) -> bool:
        """Whether the key goes over a network unencrypted."""
        parts = urlsplit(self.url)
        return parts.scheme == "http" and parts.hostname not in _LOOPBACK

    @property
    def root(self) -> str:
        """The server without the `/api` that Synth's clients are given with it."""
        return self.url.removesuffix("/api")


def find_address(
    server: str | None,
    key: str | None,
    *,
    env_file: Path | None = None,
    choose: Choose | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Address:
    """The server and the key of a call; `choose`, where a person is there, picks one of several `.env` files.

    Raises CallError that says where was looked.
    """
    known = dict(os.environ if environment is None else environment)
    url, secret = server or _first(known, SERVER_NAMES), key or _first(known, KEY_NAMES)
    if not (url and secret):
        named = read_env_file(env_file) if env_file else _find_env(folder or Path(), choose)
        url, secret = url or _first(named, SERVER_NAMES), secret or _first(named, KEY_NAMES)
    if not url:
        raise CallError(
            "no server is named", hint=f"give --server URL, or set {SERVER_NAMES[0]} (in the environment or in .env)"
        )
    if not secret:
        raise CallError(
            f"no key for {url}",
            hint=f"set {KEY_NAMES[0]} (in the environment or in .env); `luthier keys create` on the server makes one",
        )
    return Address(_checked(url), secret)


def list_env_files(folder: Path) -> list[Path]:
    """Files here that name a server or a key: `.env` first."""
    candidates = sorted({*folder.glob(".env"), *folder.glob(".env.*"), *folder.glob("*.env")})
    wanted = {*SERVER_NAMES, *KEY_NAMES}
    return [path for path in candidates if path.is_file() and wanted & set(_read_quietly(path))]


def _read_quietly(path: Path) -> dict[str, str]:
    try:
        return read_env_file(path)
    except (CallError, OSError):
        return {}


def _find_env(folder: Path, choose: Choose | None) -> dict[str, str]:
    found = list_env_files(folder)
    if not found:
        return {}
    if len(found) == 1 or (choose is None and found[0].name == ".env"):
        return read_env_file(found[0])
    if choose is None:
        names = ", ".join(path.name for path in found)
        raise CallError(f"several files might be meant: {names}", hint="name one: --env-file FILE")
    return read_env_file(choose(found))


def _checked(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise CallError(f"{url!r} is no address of a server", hint="such as http://127.0.0.1:8440")
    return url.rstrip("/")
