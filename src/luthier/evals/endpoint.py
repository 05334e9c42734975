"""Any OpenAI-compatible chat endpoint that a person named: asked again while it is busy, and its key never told."""

from __future__ import annotations

import http.client
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import orjson

from luthier.errors import CallError
from luthier.runs.events import redact

_PATH = "/chat/completions"
_MOST_BYTES = 4 << 20
_TRIES = 4
_FIRST_WAIT_SECONDS = 0.5
_TIMEOUT_SECONDS = 120.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class NoReplyError(Exception):
    """Why an endpoint gave no reply, in words that show no key."""


def find_key(url: str, variable: str, *, what: str) -> str:
    """The key of the environment for an address, or none; CallError where it is no address, or would show the key."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise CallError(f"{url!r} is no address of a {what}", hint="such as http://localhost:8000/v1")
    key = os.environ.get(variable, "")
    if key and parts.scheme == "http" and parts.hostname not in _LOOPBACK:
        raise CallError(
            f"the key in {variable} would travel unencrypted to {parts.hostname}",
            hint="use https, or unset the key",
        )
    return key


@dataclass(frozen=True)
class ChatEndpoint:
    """An endpoint, and the key it asks for."""

    url: str
    key: str = ""
    pause: Callable[[float], None] = time.sleep

    @property
    def place(self) -> str:
        """The endpoint without what somebody may have put into its address."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"

    def ask(self, question: Mapping[str, Any]) -> bytes:
        """What it answers; tried again when it is busy. Raises NoReplyError."""
        body, failed = orjson.dumps(question), ""
        for number in range(_TRIES):
            if number:
                self.pause(_FIRST_WAIT_SECONDS * 2**number)
            try:
                status, content = self._post(body)
            except (OSError, http.client.HTTPException) as error:
                failed = str(error) or type(error).__name__
                continue
            if status == 200:
                return content
            failed = f"it answered {status}: {content[:200].decode(errors='replace')}"
            if status != 429 and status < 500:
                break
        raise NoReplyError(self._hidden(failed))

    def _hidden(self, text: str) -> str:
        shown = text.replace(self.key, "...") if self.key else text
        return " ".join(str(redact(shown)).split())

    def _post(self, body: bytes) -> tuple[int, bytes]:
        """One request; a redirection is not followed, since it would take the key somewhere else."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        link = kind(parts.hostname or "", parts.port, timeout=_TIMEOUT_SECONDS)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        path = parts.path.rstrip("/")
        try:
            link.request("POST", path if path.endswith(_PATH) else path + _PATH, body, headers)
            reply = link.getresponse()
            return reply.status, reply.read(_MOST_BYTES)
        finally:
            link.close()
