"""Which Tinker service, by which key, and whether it answers; all of it told before the SDK is imported.

The SDK keeps silent for minutes where a server cannot be reached, so its health is asked first, with a limit.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from luthier.errors import CallError, ServerError, ServerGoneError
from luthier.runs.env_file import first_variable, read_env_file

URL_NAMES = ("TINKER_BASE_URL", "TINKER_API_BASE")
KEY_NAME = "TINKER_API_KEY"
KEY_PREFIX = "tml-"
PROBE_SECONDS = 5.0
_API = "/api/v1"
_REFUSED = (401, 403)


@dataclass(frozen=True)
class Service:
    """A service and a key."""

    url: str
    key: str

    def __repr__(self) -> str:
        return f"Service({self.url!r})"  # the key has no place in a log


def find_service(environment: Mapping[str, str] | None = None, folder: Path | None = None) -> Service:
    """The service that the environment names, or the `.env` of the working directory; CallError where no key does."""
    known = dict(os.environ if environment is None else environment)
    file = (folder or Path()) / ".env"
    if file.is_file() and not (known.get(KEY_NAME) and first_variable(known, URL_NAMES)):
        known = {**read_env_file(file), **{name: value for name, value in known.items() if value}}
    key = known.get(KEY_NAME)
    if not key:
        raise CallError(
            f"{KEY_NAME} is not set, and a Tinker service wants a key",
            hint=f"export {KEY_NAME}=tml-... (or write it into .env); of a server of ours: `luthier keys create`",
        )
    if not key.startswith(KEY_PREFIX):
        raise CallError(
            f"the key in {KEY_NAME} does not begin with `{KEY_PREFIX}`, as the SDK wants it",
            hint=f"of a server of ours, put `{KEY_PREFIX}` before the key: export {KEY_NAME}={KEY_PREFIX}ftk_...",
        )
    url = first_variable(known, URL_NAMES)
    return Service(_checked(url) if url else _default_url(), key)


def _default_url() -> str:
    """Where the SDK itself goes."""
    from luthier.extras import import_extra

    found: str = import_extra("tinker.lib.base_url", "tinker").resolve_base_url()
    return found


def _checked(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise CallError(f"{URL_NAMES[0]}: {url!r} is no address of a service", hint="such as http://127.0.0.1:8440")
    return url.rstrip("/").removesuffix(_API)


def check_service(service: Service, *, timeout: float = PROBE_SECONDS) -> None:
    """Raise within seconds where the service does not answer, or refuses the key."""
    ask(service, "GET", "healthz", timeout=timeout)
    ask(service, "GET", "get_server_capabilities", timeout=timeout)


def answers(service: Service, *, timeout: float = PROBE_SECONDS) -> bool:
    """Whether the service is there at this moment."""
    try:
        ask(service, "GET", "healthz", timeout=timeout)
    except ServerGoneError:
        return False
    except ServerError:
        return True
    return True


def ask(
    service: Service,
    verb: str,
    path: str,
    body: Mapping[str, Any] | None = None,
    *,
    timeout: float = PROBE_SECONDS,
) -> Any:
    """One plain call without retries; ServerGoneError or ServerError tells what went wrong."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"X-API-Key": service.key, "Content-Type": "application/json", "Accept": "application/json"}
    request = urllib.request.Request(f"{service.url}{_API}/{path}", data=data, headers=headers, method=verb)  # noqa: S310 (checked)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:  # noqa: S310
            content = answer.read()
    except urllib.error.HTTPError as error:
        raise refusal(service, error.code, _told(error)) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ServerGoneError(
            f"{service.url} does not answer: {reason}",
            hint=f"check {URL_NAMES[0]} and the network; of a server of ours: is `luthier serve` running?",
        ) from None
    try:
        return json.loads(content) if content else None
    except ValueError:
        raise ServerError(
            f"{service.url} answered {path} with something else than JSON: is it a Tinker service?",
            hint=f"check {URL_NAMES[0]}; `luthier tinker inspect` shows what a service supports",
        ) from None


def refusal(service: Service, status: int, told: str) -> ServerError:
    """The error of a service that answered with a status that is no success."""
    if status in _REFUSED:
        error = ServerError(
            f"{service.url} refused the key in {KEY_NAME} ({status})" + (f": {told}" if told else ""),
            hint="make a key in the service's console; of a server of ours: `luthier keys create`",
        )
    else:
        error = ServerError(
            f"{service.url} refused ({status})" + (f": {told}" if told else ""),
            hint="`luthier tinker inspect` shows what the service supports",
        )
    error.status = status
    return error


def _told(error: urllib.error.HTTPError) -> str:
    """What the body of a refusal says."""
    try:
        with error:
            content = error.read(65_536)
    except OSError:
        return ""
    return told_by(content.decode("utf-8", "replace"))


def told_by(text: str) -> str:
    """The words of an error body: its `message`, `detail` or `error`, else its first line."""
    try:
        found: Any = json.loads(text)
    except ValueError:
        return (text.strip().splitlines() or [""])[0][:300]
    for name in ("error", "detail", "message"):
        while isinstance(found, dict) and name in found:
            found = found[name]
    return str(found)[:600] if not isinstance(found, dict) else ""
