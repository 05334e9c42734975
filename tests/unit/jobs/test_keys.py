"""API keys: told once, kept as a hash, checked in constant time, over when revoked or expired."""

from __future__ import annotations

import hmac
import re
from pathlib import Path

import pytest
from sqlalchemy import select, text

from luthier.errors import AuthError, CallError, DatabaseError, NotFoundError
from luthier.jobs import keys as module
from luthier.jobs.database import Database
from luthier.jobs.keys import SCOPES, check_key, create_key, list_keys, revoke_key
from luthier.jobs.tables import keys
from tests.unit.jobs.conftest import Clock


def test_a_key_opens_what_it_was_made_for(database: Database) -> None:
    row, secret = create_key(database, "anna", ["submit", "read"], name="laptop")
    assert re.fullmatch(r"tml-ftk_[0-9A-Za-z]{12}_[0-9A-Za-z]{43}", secret)
    for spelled in (secret, secret.removeprefix("tml-")):
        key = check_key(database, spelled)
        assert (key.id, key.project, key.scopes) == (row.id, "anna", {"read", "submit"})


@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_holds_those_before_it(database: Database, scope: str) -> None:
    _, secret = create_key(database, "anna", [scope])
    reached = [each for each in SCOPES if check_key(database, secret).reaches(each)]
    assert reached == list(SCOPES[: SCOPES.index(scope) + 1])


def test_the_database_has_no_key(home: Path) -> None:
    database = Database.at_home(home)
    database.migrate()
    secrets = [create_key(database, "anna", ["admin"])[1] for _ in range(3)]
    for secret in secrets:
        check_key(database, secret)
    with database.read() as connection:
        rows = str(connection.execute(select(keys)).all())
    database.close()
    raw = b"".join(path.read_bytes() for path in home.iterdir())
    for secret in secrets:
        assert secret.encode() not in raw
        assert secret.rpartition("_")[2].encode() not in raw
        assert secret.rpartition("_")[2] not in rows


def spoiled(secret: str) -> list[str]:
    head, _, tail = secret.rpartition("_")
    other = "A" if tail[-1] != "A" else "B"
    cut = [secret[:-1], secret + "A", head, tail, "", "ftk_", f"Bearer {secret}", f"{secret}\n", f"tml-tml-{secret}"]
    return [
        *cut,
        f"{head}_{tail[:-1]}{other}",
        f"ftk_{'0' * 12}_{tail}",
        secret.upper(),
        "\x00",
        "\ud800",
        "x" * 10_000,
    ]


def test_what_is_not_the_key_is_refused_in_the_same_words(database: Database) -> None:
    _, secret = create_key(database, "anna", ["read"])
    messages = set()
    for wrong in spoiled(secret):
        with pytest.raises(AuthError) as caught:
            check_key(database, wrong)
        messages.add((caught.value.message, caught.value.hint))
    assert len(messages) == 1
    assert caught.value.code == "unauthorized"


def test_hashes_are_compared_in_constant_time_also_for_ids_that_are_not_there(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, secret = create_key(database, "anna", ["read"])
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def count(one: str, other: str) -> bool:
        compared.append((len(one), len(other)))
        return compare(one, other)

    monkeypatch.setattr(module.hmac, "compare_digest", count)
    for wrong in (*spoiled(secret)[:2], "garbage"):
        with pytest.raises(AuthError):
            check_key(database, wrong)
    assert compared == [(64, 64)] * 3


def test_a_revoked_key_opens_nothing(database: Database) -> None:
    row, secret = create_key(database, "anna", ["read"])
    other = create_key(database, "anna", ["read"])[1]
    revoked = revoke_key(database, "anna", row.id)
    assert revoked.revoked_at is not None
    assert revoke_key(database, None, row.id) == revoked
    with pytest.raises(AuthError):
        check_key(database, secret)
    check_key(database, other)


def test_a_key_of_another_project_cannot_be_revoked(database: Database) -> None:
    row, secret = create_key(database, "anna", ["read"])
    for project, key in (("ben", row.id), ("anna", "none"), (None, "none")):
        with pytest.raises(NotFoundError):
            revoke_key(database, project, key)
    check_key(database, secret)


def test_a_key_expires(database: Database, now: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "time", now)
    _, secret = create_key(database, "anna", ["read"], expires_at=now.time + 60)
    check_key(database, secret)
    now.time += 60
    with pytest.raises(AuthError):
        check_key(database, secret)


def test_its_use_is_noted_once_a_minute(database: Database, now: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "time", now)
    _, secret = create_key(database, "anna", ["read"])
    start = now.time
    noted = []
    for _ in range(5):
        check_key(database, secret)
        noted.append(list_keys(database)[0].last_used_at)
        now.time += 25
    assert noted == [start, start, start, start + 75, start + 75]


def test_that_use_cannot_be_noted_keeps_nobody_out(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    _, secret = create_key(database, "anna", ["read"])

    def refuse() -> None:
        raise DatabaseError("read-only")

    monkeypatch.setattr(database, "write", refuse)
    assert check_key(database, secret).project == "anna"


def test_keys_are_listed_without_their_secrets(database: Database) -> None:
    made = [create_key(database, project, ["read"], name=f"of {project}")[0] for project in ("anna", "ben", "anna")]
    assert list(list_keys(database)) == made
    assert [row.id for row in list_keys(database, "anna")] == [made[0].id, made[2].id]
    assert not {"sha256", "secret"} & set(vars(made[0]))


@pytest.mark.parametrize(
    ("project", "scopes"),
    [
        ("anna", []),
        ("anna", ["root"]),
        ("anna", ["read", "x"]),
        ("", ["read"]),
        ("a/b", ["read"]),
        ("a" * 65, ["read"]),
    ],
)
def test_what_makes_no_key(database: Database, project: str, scopes: list[str]) -> None:
    with pytest.raises(CallError):
        create_key(database, project, scopes)
    with database.read() as connection:
        assert connection.scalar(text("SELECT count(*) FROM keys")) == 0
