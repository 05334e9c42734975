"""The REST side of the Tinker dialect: sessions, runs, checkpoints and downloads, and what other projects see of it."""

from __future__ import annotations

import io
import re
import tarfile
from typing import Any

import pytest

from luthier.errors import NotFoundError
from luthier.live.retention import IN_USE_SECONDS, MODEL_SECONDS, SAMPLER_SECONDS, sweep
from luthier.live.rows import Sampler
from luthier.live.store import LiveStore
from luthier.server.guard import _PROTOBUF
from luthier.server.routes.tinker import downloads
from tests.service.here import Here
from tests.service.tinker.left_behind import LeftBehind

API = "/api/v1"
VERBS = {"get", "head", "post", "put", "patch", "delete"}
_PARAMETER = re.compile(r"\{[^}]+\}")


def left_in(here: Here, project: str = "default") -> LeftBehind:
    return LeftBehind(LiveStore(here.service.database, here.service.home), project)


def ask(here: Here, verb: str, path: str, status: int = 200, **more: Any) -> Any:
    done = here.ask(verb, f"{API}/{path}", **more)
    assert done.status_code == status, f"{verb} {path}: {done.status_code} {done.text}"
    return done.json()


def begin(here: Here, **more: Any) -> str:
    body = {"tags": [], "user_metadata": None, "sdk_version": "0.38.0", "type": "create_session", "new_key": 1, **more}
    return str(ask(here, "POST", "create_session", json=body)["session_id"])


def one(path: str) -> str:
    """The REST path of a checkpoint."""
    run, kind, name = path.removeprefix("tinker://").split("/")
    return f"training_runs/{run}/checkpoints/{kind}/{name}"


def test_no_path_of_tinker_is_also_one_of_another_dialect(here: Here) -> None:
    """Even where a parameter of the others took slashes."""
    mine, others = set(), set()
    for path, item in here.client.get("/luthier/v1/openapi.json").json()["paths"].items():
        for verb in VERBS & item.keys():
            is_mine = item[verb].get("tags", [""])[0].startswith("Tinker")
            (mine if is_mine else others).add((verb, path))
    assert len(mine) >= 28
    assert len(others) > 100
    for verb, path in mine:
        concrete = _PARAMETER.sub("x", path)
        clashes = [each for each in others if each[0] == verb and re.fullmatch(_PARAMETER.sub(".+", each[1]), concrete)]
        assert not clashes, f"{verb} {path}"


def test_settings_of_clients_and_models_of_the_server(here: Here) -> None:
    config = ask(here, "POST", "client/config", json={"sdk_version": "0.38.0"})
    assert config["pjwt_auth_enabled"] is False
    assert ask(here, "POST", "client/dynamic_config", json={})["sample_cancel_enabled"] is True
    models = ask(here, "GET", "get_server_capabilities")["supported_models"]
    practice = next(each for each in models if each["model_name"] == "practice")
    assert practice["trainable"] is practice["sampleable"] is True
    assert practice["max_context_length"] >= 64
    assert ask(here, "GET", "healthz") == {"status": "ok"}
    assert ask(here, "POST", "telemetry", json={"events": [{}], "platform": "x"}) == {"status": "accepted"}
    me = ask(here, "GET", "auth/apikey/me")
    assert isinstance(me["key_id"], int)
    assert me["details"]["org_details"]["name"] == "default"


def test_a_session_lives_until_it_is_finished(here: Here) -> None:
    session = begin(here, project_id="mine", display_name="one", user_metadata={"n": 1, "who": "me"})
    assert ask(here, "POST", "session_heartbeat", json={"session_id": session}) == {"type": "session_heartbeat"}
    model = left_in(here).a_model(session)
    shown = ask(here, "GET", f"sessions/{session}?access_scope=owned")
    assert shown == {
        "training_run_ids": [model.id],
        "sampler_ids": [],
        "user_metadata": {"n": "1", "who": "me"},
        "display_name": "one",
    }
    assert session in ask(here, "GET", "sessions?limit=50")["sessions"]
    ask(here, "POST", f"sessions/{session}/finish", json={"reason": {"type": "errored"}, "detail": "why"})
    gone = ask(here, "POST", "session_heartbeat", 410, json={"session_id": session})
    assert gone["code"] == "session_finished"
    ask(here, "POST", f"sessions/{session}/finish", json={"reason": {"type": "success"}})
    assert ask(here, "GET", f"sessions/{session}/trace_export")["status"] == "failed"


def test_sessions_are_searched_page_by_page(own: Here) -> None:
    made = [begin(own, display_name=f"night {n}", project_id="a" if n % 2 else None) for n in range(5)]
    ask(own, "POST", f"sessions/{made[0]}/finish", json={"reason": {"type": "success"}})
    found: list[str] = []
    cursor = None
    while True:
        page = ask(own, "POST", "sessions/search", json={"display_name": "night", "limit": 2, "cursor": cursor})
        found += [each["session_id"] for each in page["sessions"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert found == made[::-1]
    by_label = ask(own, "POST", "sessions/search", json={"project_ids": ["a"]})["sessions"]
    assert {each["session_id"] for each in by_label} == {made[1], made[3]}
    over = ask(own, "POST", "sessions/search", json={"statuses": [{"type": "client_finished", "reasons": ["success"]}]})
    assert [each["session_id"] for each in over["sessions"]] == [made[0]]
    ask(own, "PUT", f"sessions/{made[0]}/project", json={"project_id": "b"})
    assert len(ask(own, "POST", "sessions/search", json={"project_ids": ["b"]})["sessions"]) == 1


def test_runs_come_in_pages_with_their_newest_checkpoints(own: Here) -> None:
    left = left_in(own)
    models = [left.a_model(user_metadata={"n": n}, label="x" if n else None) for n in range(3)]
    left.a_checkpoint(models[2], "weights", "a")
    newest = left.a_checkpoint(models[2], "weights", "b", user_metadata={"k": "v"})
    page = ask(own, "GET", "training_runs?limit=2&offset=0&access_scope=owned")
    assert [each["training_run_id"] for each in page["training_runs"]] == [models[2].id, models[1].id]
    assert page["cursor"] == {"offset": 0, "limit": 2, "total_count": 3}
    run = ask(own, "GET", f"training_runs/{models[2].id}")
    assert run == page["training_runs"][0]
    assert run["last_checkpoint"]["tinker_path"] == newest
    assert run["last_checkpoint"]["user_metadata"] == {"k": "v"}
    assert run["last_sampler_checkpoint"] is None
    assert (run["base_model"], run["is_lora"], run["lora_rank"]) == ("practice", True, 8)
    assert ask(own, "GET", "training_runs?project_id=x")["cursor"]["total_count"] == 2
    info = ask(own, "POST", "weights_info", json={"tinker_path": newest})
    assert info["lora_rank"] == 8
    assert info["train_mlp"] is True


def test_checkpoints_are_listed_limited_and_deleted(own: Here) -> None:
    left = left_in(own)
    model = left.a_model()
    state = left.a_checkpoint(model, "weights", "000001")
    sampler = left.a_checkpoint(model, "sampler_weights", "000001")
    shown = ask(own, "GET", f"training_runs/{model.id}/checkpoints")["checkpoints"]
    assert [(each["checkpoint_id"], each["checkpoint_type"]) for each in shown] == [
        ("sampler_weights/000001", "sampler"),
        ("weights/000001", "training"),
    ]
    assert ask(own, "GET", "checkpoints?limit=1")["cursor"] == {"offset": 0, "limit": 1, "total_count": 2}
    ask(own, "PUT", f"{one(state)}/ttl", json={"ttl_seconds": 3600})
    assert left.find(state).expires_at is not None
    ask(own, "PUT", f"{one(state)}/ttl", json={"ttl_seconds": None})
    assert left.find(state).expires_at is None
    ask(own, "PUT", f"{one(state)}/ttl", 422, json={"ttl_seconds": 0})
    usage = ask(own, "GET", "billing/usage/checkpoints/current")["data"][0]
    assert (usage["checkpoint_count"], usage["size_bytes"]) == (2, sum(each["size_bytes"] for each in shown))
    ask(own, "DELETE", one(sampler))
    ask(own, "DELETE", one(sampler), 404)
    assert len(ask(own, "GET", "checkpoints")["checkpoints"]) == 1


def test_other_projects_see_nothing_and_hear_the_same_words(here: Here) -> None:
    left = left_in(here)
    session = begin(here)
    model = left.a_model(session)
    path = left.a_checkpoint(model)
    unknown = path.replace(session, "session-none")
    asked: list[tuple[str, str, Any]] = [
        ("GET", "sessions/{session}", None),
        ("POST", "session_heartbeat", {"session_id": "{session}"}),
        ("POST", "sessions/{session}/finish", {}),
        ("PUT", "sessions/{session}/project", {"project_id": "x"}),
        ("GET", "sessions/{session}/trace_export", None),
        ("GET", "training_runs/{session}:train:0", None),
        ("GET", "training_runs/{session}:train:0?access_scope=accessible", None),
        ("GET", "training_runs/{session}:train:0/checkpoints", None),
        ("POST", "weights_info", {"tinker_path": "tinker://{session}:train:0/sampler_weights/final"}),
    ]
    for end in ("", "/publish", "/ttl", "/external_weights_urls", "/archive"):
        verb = {"": "DELETE", "/publish": "POST", "/ttl": "PUT"}.get(end, "GET")
        body = {"ttl_seconds": 60} if end == "/ttl" else None
        asked.append((verb, one(path).replace(session, "{session}") + end, body))
    asked.append(("DELETE", f"{asked[-4][1].removesuffix('/ttl')}", None))
    for verb, at, body in asked:
        answers = []
        for name in (session, "session-none"):
            said = None if body is None else {key: str(value).replace("{session}", name) for key, value in body.items()}
            if body and "ttl_seconds" in body:
                said = body
            done = here.ask(verb, f"{API}/{at.replace('{session}', name)}", other=True, json=said)
            answers.append((done.status_code, done.text.replace(name, "NAME")))
        assert answers[0] == answers[1], f"{verb} {at}"
        assert answers[0][0] == 404, f"{verb} {at}: {answers[0]}"
    assert ask(here, "GET", "training_runs", other=True)["training_runs"] == []
    assert ask(here, "GET", "checkpoints", other=True)["checkpoints"] == []
    assert session not in ask(here, "GET", "sessions?limit=1000", other=True)["sessions"]
    assert left.find(path).path != unknown


def test_a_published_checkpoint_is_there_for_everyone(here: Here) -> None:
    left = left_in(here)
    path = left.a_checkpoint(left.a_model(user_metadata={"secret": "x"}))
    ask(here, "POST", f"{one(path)}/publish")
    ask(here, "POST", f"{one(path)}/publish", 409)
    assert ask(here, "POST", "weights_info", other=True, json={"tinker_path": path})["base_model"] == "practice"
    run = path.split("/")[2]
    left.a_checkpoint(left.store.find_model("default", run), "weights", "private")
    shown = ask(here, "GET", f"training_runs/{run}?access_scope=accessible", other=True)
    assert shown["last_sampler_checkpoint"]["tinker_path"] == path
    assert shown["last_checkpoint"] is shown["user_metadata"] is None
    ask(here, "GET", f"training_runs/{run}", 404, other=True)
    listed = ask(here, "GET", f"training_runs/{run}/checkpoints", other=True)["checkpoints"]
    assert [each["tinker_path"] for each in listed] == [path]
    ask(here, "DELETE", one(path), 404, other=True)
    ask(here, "DELETE", f"{one(path)}/publish", 404, other=True)
    ask(here, "DELETE", f"{one(path)}/publish")
    ask(here, "DELETE", f"{one(path)}/publish", 409)
    ask(here, "POST", "weights_info", 404, other=True, json={"tinker_path": path})


def test_weights_are_downloaded_file_by_file_without_a_key(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    left = left_in(here)
    path = left.a_checkpoint(left.a_model(), "external_weights", "out")
    told = ask(here, "GET", f"{one(path)}/external_weights_urls")
    assert set(told["urls"]) == {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    folder = here.service.home / left.find(path).folder
    for name, url in told["urls"].items():
        done = here.client.get(url)
        assert done.status_code == 200
        assert done.content == (folder / name).read_bytes()
        assert int(done.headers["content-length"]) == len(done.content)
        half = here.client.get(url, headers={"range": "bytes=7-"})
        assert (half.status_code, half.content) == (206, done.content[7:])
    url = told["urls"]["adapter_config.json"]
    named = {"project": "default", "path": path, "file": "no.json", "expires": 1e12}
    assert (here.service.home / "downloads.key").stat().st_mode & 0o777 == 0o600
    for unsaid in ({}, {"file": None}, {"expires": None}):
        token = downloads._write_token(here.service.home, {**named, **unsaid})
        assert here.client.get(f"{API}/downloads/{token}").status_code == 404
    for wrong in (
        url[:-2] + ("AA" if not url.endswith("AA") else "BB"),
        url.rpartition(".")[0],
        url + "x",
        f"{API}/downloads/é.x",
    ):
        assert here.client.get(wrong).status_code == 404, wrong
    monkeypatch.setattr("luthier.server.routes.tinker.downloads.time.time", lambda: 1e11)
    assert here.client.get(url).status_code == 404
    monkeypatch.undo()
    ask(here, "DELETE", one(path))
    assert here.client.get(url).status_code == 404


def test_old_clients_get_one_archive(here: Here) -> None:
    left = left_in(here)
    path = left.a_checkpoint(left.a_model())
    done = here.client.get(ask(here, "GET", f"{one(path)}/archive")["url"])
    with tarfile.open(fileobj=io.BytesIO(done.content)) as archive:
        found = {each.name: archive.extractfile(each).read() for each in archive}  # type: ignore[union-attr]
    folder = here.service.home / left.find(path).folder
    assert found == {each.name: each.read_bytes() for each in folder.iterdir()}


def test_what_is_not_done_here_is_said(here: Here) -> None:
    for verb, path in (("GET", "audit"), ("POST", "copy_weights")):
        told = ask(here, verb, path, 404)
        assert told["code"] == "unsupported"
    assert ask(here, "GET", "billing/usage/events")["data"] == []


def test_protobuf_is_taken_where_data_are_sent_and_nowhere_else(here: Here) -> None:
    headers = {"content-type": _PROTOBUF}
    assert here.ask("POST", f"{API}/create_session", content=b"x", headers=headers).status_code == 415
    limit = here.service.settings.limits.live_bytes
    claimed = {**headers, "content-length": str(limit + 1)}
    assert here.ask("POST", f"{API}/forward_backward", content=b"x", headers=claimed).status_code == 413
    claimed = {"content-type": "application/json", "content-length": str(limit)}
    assert here.ask("POST", f"{API}/create_session", content=b"x", headers=claimed).status_code == 413


def test_what_expired_or_was_left_over_is_swept(own: Here) -> None:
    left = left_in(own)
    model = left.a_model()
    now = left.store.now()
    kept = left.find(left.a_checkpoint(model, "weights", "kept")).folder
    gone = left.find(left.a_checkpoint(model, "weights", "gone", expires_at=now + 60)).folder
    dropped = left.a_checkpoint(model, "sampler_weights", "dropped")
    dropped_folder = left.find(dropped).folder
    left.store.delete_checkpoint("default", dropped)
    place = left.store.folder_of(model.id)
    samplers = {name: place / f"sampler_{n}" for n, name in enumerate(("used", "unused"))}
    for n, (name, folder) in enumerate(samplers.items()):
        folder.mkdir()
        used_at = now + 2 * SAMPLER_SECONDS if name == "used" else now
        relative = left.store.relative(folder)
        left.store.create_sampler(
            Sampler(
                f"s:{n}", "default", model.session, n, "practice", model.id, None, relative, "snapshot", now, used_at
            )
        )
    (place / "state_7").mkdir()
    later = LiveStore(left.store.database, left.store.home, now=lambda: now + SAMPLER_SECONDS + 60)
    assert sweep(LiveStore(left.store.database, left.store.home)) == []
    removed = {later.relative(each) for each in sweep(later)}
    assert removed == {gone, dropped_folder, later.relative(samplers["unused"])}
    assert (left.store.home / kept).is_dir()
    assert (place / "state_7").is_dir()
    assert samplers["used"].is_dir()


def test_weights_of_a_sampler_go_with_their_checkpoint_and_models_with_their_client(own: Here) -> None:
    left = left_in(own)
    now = left.store.now()
    saved, unsaved = left.a_model(), left.a_model()
    path = left.a_checkpoint(saved, name="kept")
    dropped = left.a_checkpoint(saved, name="dropped")
    folder = left.find(dropped).folder
    left.store.create_sampler(
        Sampler("s:1", "default", saved.session, 1, "practice", saved.id, dropped, folder, "snapshot", now, now)
    )
    left.store.delete_checkpoint("default", dropped)
    for model in (saved, unsaved):
        (left.store.folder_of(model.id) / "state_7").mkdir(parents=True)
    (left.store.folder_of(saved.id) / "weights_3.made.tmp-0a").mkdir()

    def sweep_after(seconds: float) -> set[str]:
        later = LiveStore(left.store.database, left.store.home, now=lambda: now + seconds)
        return {each.name for each in sweep(later)}

    assert sweep_after(0) == set()
    assert sweep_after(IN_USE_SECONDS + 60) == {folder.rpartition("/")[2], "weights_3.made.tmp-0a"}
    assert sweep_after(MODEL_SECONDS + 60) == {"state_7"}
    assert left.find(path).model == saved.id
    assert "not heard of" in (left.store.find_model("default", saved.id).corrupted or "")
    with pytest.raises(NotFoundError):
        left.store.find_model("default", unsaved.id)
    assert sweep_after(MODEL_SECONDS + 60) == set()
