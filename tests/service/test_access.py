"""Who may call what: keys, scopes, tenants, and where a call may come from; over every route that there is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from luthier.jobs.job import Outcome
from luthier.live.rows import Sampler
from luthier.live.store import LiveStore
from tests.service.here import SCOPES, Here
from tests.service.tinker.left_behind import LeftBehind

PUBLIC = {"/luthier/v1/health", "/luthier/v1/ready", "/api/v1/downloads/{token}"}
"""Those that need no key; what is downloaded is named by an address that the server signed."""
BODIES = {
    "complete": {"part_ids": ["part_x"]},
    "ttl": {"ttl_seconds": 60},
    "finish": {"reason": {"type": "success"}},
    "project": {"project_id": "x"},
}
"""What a request needs to be looked at, by the last step of its path."""
VERBS = ("get", "head", "post", "put", "patch", "delete")
_PARAMETER = re.compile(r"\{[^}]+\}")


def operations(here: Here) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every verb of every path in the OpenAPI document."""
    for path, item in here.client.get("/luthier/v1/openapi.json").json()["paths"].items():
        for verb in VERBS:
            if verb in item:
                yield verb.upper(), path, item[verb]


def filled(path: str, value: str = "none") -> str:
    """The path with something in place of each of its parameters."""
    return _PARAMETER.sub(value, path)


def wanted_scope(operation: dict[str, Any]) -> str:
    """The scope that the document names."""
    [scope] = {scope for each in operation["security"] for scopes in each.values() for scope in scopes}
    return str(scope)


def test_every_route_but_health_wants_a_key(here: Here) -> None:
    found = list(operations(here))
    assert len(found) > 120
    open_to_all = {path for _, path, operation in found if not operation.get("security")}
    assert open_to_all == PUBLIC
    for verb, path, _ in found:
        if path not in PUBLIC:
            done = here.client.request(verb, filled(path))
            assert done.status_code == 401, f"{verb} {path}: {done.status_code}"
            assert done.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_opens_what_it_includes_and_nothing_else(here: Here, scope: str) -> None:
    checked = 0
    for verb, path, operation in operations(here):
        if path in PUBLIC:
            continue
        wanted = wanted_scope(operation)
        done = here.ask(verb, filled(path), scope=scope)
        is_refused = done.status_code == 403
        assert is_refused is (SCOPES.index(scope) < SCOPES.index(wanted)), f"{verb} {path}: {done.status_code}"
        assert done.status_code < 500, f"{verb} {path}: {done.text}"
        checked += 1
    assert checked > 120


@pytest.mark.parametrize(
    "key",
    ["", "x", "ftk_", "ftk_abcdefghijkl_" + "a" * 43, "ftk_" + "a" * 300, "Bearer", "null", "' OR 1=1 --", "\u00e9"],
)
def test_what_is_no_key_opens_nothing(here: Here, key: str) -> None:
    for name, value in (("authorization", f"Bearer {key}"), ("x-api-key", key), ("authorization", key)):
        done = here.client.get("/luthier/v1/whoami", headers={name: value.encode("latin-1")})
        assert done.status_code == 401
        assert done.json()["error"]["code"] == "unauthorized"


def test_a_key_is_taken_in_each_header_and_with_the_prefix_that_tinker_wants(here: Here) -> None:
    key = here.keys["read"]
    for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}, {"x-api-key": key.removeprefix("tml-")}):
        done = here.client.get("/luthier/v1/whoami", headers=headers)
        assert done.json() == {"project": "default", "scopes": ["read"]}


def test_a_revoked_key_opens_nothing(own: Here) -> None:
    made = own.ask("POST", "/luthier/v1/keys", json={"scopes": ["read"], "name": "short"})
    assert made.status_code == 201
    headers = {"x-api-key": made.json()["key"]}
    assert own.client.get("/luthier/v1/whoami", headers=headers).status_code == 200
    assert own.ask("DELETE", f"/luthier/v1/keys/{made.json()['id']}").status_code == 200
    assert own.client.get("/luthier/v1/whoami", headers=headers).status_code == 401
    listed = own.ask("GET", "/luthier/v1/keys").text
    assert made.json()["id"] in listed
    assert made.json()["key"] not in listed
    assert made.json()["key"].rpartition("_")[2].encode() not in (own.service.home / "luthier.db").read_bytes()


def live_ids(here: Here) -> dict[str, str]:
    """A session, a model, a sampler and weights of the live service."""
    left = LeftBehind(LiveStore(here.service.database, here.service.home))
    model = left.a_model()
    left.a_checkpoint(model)
    now = left.store.now()
    at = Sampler("s:sample:0", "default", model.session, 0, "practice", None, None, None, "snapshot", now, now)
    sampler = left.store.create_sampler(at)
    run = {"session": model.session, "run": model.id, "sampler": sampler.id}
    return {**run, "kind": "sampler_weights", "name": "final", "token": "none"}


def test_another_tenant_sees_nothing_of_what_is_not_its_own(own: Here) -> None:
    file = own.send()
    job = own.submit(file)["id"]
    own.work(job, Outcome("succeeded", model=f"ft:practice:{job}"), events=3)
    upload = own.ask(
        "POST",
        "/v1/uploads",
        json={"bytes": 5, "filename": "x.jsonl", "mime_type": "application/jsonl", "purpose": "fine-tune"},
    ).json()["id"]
    key = own.ask("GET", "/luthier/v1/keys").json()["keys"][0]["id"]
    ids = {
        "job": job,
        "job_id": job,
        "file": file,
        "file_id": file,
        "sha256": own.ask("GET", f"/luthier/v1/files/{file}").json()["sha256"],
        "model": f"ft:practice:{job}",
        "upload_id": upload,
        "id": key,
        "path": "events.jsonl",
        **live_ids(own),
    }
    checked = 0
    for verb, path, _ in operations(own):
        names = [name[1:-1] for name in _PARAMETER.findall(path)]
        if not names:
            continue
        address = path
        for name in names:
            address = address.replace(f"{{{name}}}", ids[name])
        done = own.ask(verb, address, other=True, json=BODIES.get(path.rpartition("/")[2]))
        assert done.status_code in (404, 415), f"{verb} {path}: {done.status_code} {done.text[:200]}"
        checked += 1
    assert checked > 80
    assert own.ask("GET", f"/luthier/v1/jobs/{job}").json()["state"] == "succeeded"
    for path in ("/luthier/v1/jobs", "/luthier/v1/files", "/luthier/v1/models", "/v1/files", "/api/learning/jobs"):
        shown = own.ask("GET", path, other=True).text
        assert job not in shown
        assert file not in shown


def test_another_tenants_file_trains_nothing(own: Here) -> None:
    spec = {"model": {"base": "practice"}, "data": {"train": own.send()}}
    done = own.ask("POST", "/luthier/v1/jobs", other=True, json={"spec": spec})
    assert done.status_code == 400
    assert "no file" in done.json()["error"]["message"]


FOREIGN = [
    {"host": "evil.example"},
    {"host": "127.0.0.1.evil.example"},
    {"host": "localhost.evil.example:8440"},
    {"host": ""},
    {"origin": "http://evil.example"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1:9999"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
]

WHOLE = [FOREIGN[0], FOREIGN[4]]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_a_page_of_another_site_gets_nothing_by_any_path_and_verb(here: Here, headers: dict[str, str]) -> None:
    paths = {filled(path) for _, path, _ in operations(here)} | {"/", "/none", "/luthier/v1/openapi.json"}
    assert len(paths) > 80
    if headers not in WHOLE:  # one name and one origin go everywhere; the guard asks for the others before any route
        paths = {"/", "/luthier/v1/health", "/v1/files", "/api/v1/learning/jobs/none/events"}
    for path in sorted(paths):
        for verb in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"):
            done = here.ask(verb, path, headers=headers)
            assert done.status_code in (403, 421), f"{verb} {path}: {done.status_code}"
            assert "access-control-allow-origin" not in done.headers


def test_ones_own_page_is_served(here: Here) -> None:
    same = {"origin": "http://127.0.0.1:8440", "sec-fetch-site": "same-origin"}
    assert here.ask("GET", "/luthier/v1/whoami", headers=same).status_code == 200
    for host in ("localhost:1", "127.0.0.1", "[::1]:8440", "LOCALHOST"):
        assert here.ask("GET", "/luthier/v1/whoami", headers={"host": host}).status_code == 200


def test_every_answer_carries_the_headers_of_the_house(here: Here) -> None:
    answers = [
        here.client.get("/luthier/v1/health"),
        here.client.get("/none"),
        here.client.get("/v1/files"),
        here.ask("GET", "/luthier/v1/jobs"),
        here.ask("PUT", "/luthier/v1/jobs"),
        here.ask("GET", "/luthier/v1/whoami", headers={"host": "evil.example"}),
    ]
    assert [each.status_code for each in answers] == [200, 404, 401, 200, 405, 421]
    ids = set()
    for each in answers:
        assert each.headers["x-content-type-options"] == "nosniff"
        assert each.headers["content-security-policy"].startswith("default-src 'none'")
        assert each.headers["cache-control"] == "no-store"
        assert "server" not in each.headers
        ids.add(each.headers["x-request-id"])
    assert len(ids) == len(answers)


def test_every_failure_has_the_shape_of_its_dialect(here: Here) -> None:
    for verb, path in (("GET", "/none"), ("PUT", "/luthier/v1/jobs"), ("GET", "/luthier/v1/jobs?limit=0")):
        inner = here.ask(verb, path).json()
        assert set(inner) == {"error"}
        assert {"code", "message", "hint", "where"} <= set(inner["error"])
    for verb, path in (("GET", "/v1/none"), ("PUT", "/v1/files"), ("GET", "/v1/fine_tuning/jobs?limit=0")):
        shown = here.ask(verb, path).json()
        assert set(shown) == {"error"}
        assert set(shown["error"]) == {"message", "type", "param", "code"}
    for verb, path in (("GET", "/api/none"), ("PUT", "/api/learning/files"), ("POST", "/api/learning/jobs")):
        shown = here.ask(verb, path).json()
        assert {"error", "detail", "code", "message"} == set(shown)
        assert shown["detail"] == shown["message"] == shown["error"]["message"]
