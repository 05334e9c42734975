"""Who asks, and whether they may: every route but health says which scope it wants."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from fastapi import Request, Security
from fastapi.concurrency import run_in_threadpool
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes

from luthier.errors import AuthError, ScopeError
from luthier.jobs.keys import SCOPES, Key, check_key

if TYPE_CHECKING:
    from luthier.jobs.database import Database
    from luthier.server.service import Service

REMEMBERED_SECONDS = 1.0
"""How long a key that was found good is not looked up again: how late a revocation may take effect."""
_MOST_REMEMBERED = 4096
_LONGEST_KEY = 256

_BEARER = HTTPBearer(auto_error=False, scheme_name="bearer", description="`Authorization: Bearer KEY`")
_HEADER = APIKeyHeader(name="X-API-Key", auto_error=False, scheme_name="header")


class _Found(NamedTuple):
    key: Key
    until: float


class Keyring:
    """Checks keys, and remembers those that were good for a moment."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._found: dict[bytes, _Found] = {}

    def find(self, text: str) -> Key | None:
        """The key, if it was found good a moment ago."""
        found = self._found.get(_digest(text))
        return found.key if found and found.until > time.monotonic() else None

    def check(self, text: str) -> Key:
        """The key; raises AuthError for one that is unknown, revoked or expired."""
        key = check_key(self._database, text)
        if len(self._found) >= _MOST_REMEMBERED:
            self._found.clear()
        self._found[_digest(text)] = _Found(key, time.monotonic() + REMEMBERED_SECONDS)
        return key

    def forget(self) -> None:
        """A key was revoked here: look each up again."""
        self._found.clear()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


async def _authenticate(
    request: Request,
    wanted: SecurityScopes,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)],
    header: Annotated[str | None, Security(_HEADER)],
) -> Key:
    text = bearer.credentials if bearer else header
    if not text:
        raise AuthError(
            "no key: send `Authorization: Bearer KEY` or `X-API-Key: KEY`",
            hint="`luthier keys create` on the server's machine makes one",
        )
    if len(text) > _LONGEST_KEY:
        raise AuthError("this is not a key of this server", hint="`luthier keys list` shows those there are")
    service: Service = request.app.state.service
    key = service.keyring.find(text)
    if key is None:
        key = await run_in_threadpool(service.keyring.check, text)
    request.scope["luthier.key"] = key.id
    service.traffic.admit(key)
    for scope in wanted.scopes:
        check_scope(key, scope)
    return key


def check_scope(key: Key, scope: str) -> None:
    """Raise ScopeError unless the key has the scope, or one that includes it."""
    if not key.reaches(scope):
        raise ScopeError(
            f"this key may {' and '.join(sorted(key.scopes)) or 'nothing'}, and this needs the scope `{scope}`",
            hint=f"`luthier keys create --scope {scope}` makes one that may",
        )


def require(scope: str) -> Any:
    """The dependency of a route: a key with this scope. `key: Annotated[Key, require("submit")]`."""
    assert scope in SCOPES, scope
    return Security(_authenticate, scopes=[scope])


Reader = Annotated[Key, require("read")]
Submitter = Annotated[Key, require("submit")]
Admin = Annotated[Key, require("admin")]
