"""What can be had of a job: its artefacts by the names of its manifests, its report, its events page by page."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from luthier.jobs.job import JobEvent, NewEvent, Outcome
from luthier.jobs.keys import check_key
from luthier.runs.manifest import seal
from luthier.server import stream
from luthier.server.artefacts import list_artefacts
from tests.service.here import Here

HOSTILE_PAGE = "<script>alert(1)</script>"


@pytest.fixture
def job(own: Here) -> str:
    """A job that succeeded, with a run folder."""
    made: str = own.submit()["id"]
    own.work(made, Outcome("succeeded", model=f"ft:practice:{made}"), events=250)
    run = own.service.home / "runs" / made
    run.mkdir(parents=True)
    (run / "events.jsonl").write_text('{"kind": "run_started"}\n')
    (run / "finetune_report.html").write_text(HOSTILE_PAGE)
    (run / "run.lock").write_text("")
    (run / "notes.txt").write_text("not for others")

    def write(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"weights" * 1000)
        (folder / "inner").mkdir()
        (folder / "inner" / "card.json").write_text("{}")

    seal(run / "final_lora_weights", write, {"step": 1})
    seal(run / "checkpoint_step_2", write, {"step": 2})
    seal(run / "something_else", write, {"step": 3})
    return made


def test_artefacts_are_what_the_manifests_name(own: Here, job: str) -> None:
    listed = own.ask("GET", f"/luthier/v1/jobs/{job}/artefacts").json()["artefacts"]
    assert [each["path"] for each in listed] == [
        "events.jsonl",
        "finetune_report.html",
        "checkpoint_step_2/adapter_model.safetensors",
        "checkpoint_step_2/inner/card.json",
        "checkpoint_step_2/manifest.json",
        "final_lora_weights/adapter_model.safetensors",
        "final_lora_weights/inner/card.json",
        "final_lora_weights/manifest.json",
    ]
    for each in listed:
        got = own.ask("GET", f"/luthier/v1/jobs/{job}/artefacts/{each['path']}")
        assert got.status_code == 200
        assert len(got.content) == each["bytes"]
        assert each["sha256"] in (None, hashlib.sha256(got.content).hexdigest())
        assert got.headers["content-disposition"].startswith("attachment; filename=")
        assert got.headers["content-type"] == "application/octet-stream"
        assert got.headers["x-content-type-options"] == "nosniff"
    rest = own.ask("GET", f"/luthier/v1/jobs/{job}/artefacts/{listed[2]['path']}", headers={"range": "bytes=6990-"})
    assert (rest.status_code, rest.content) == (206, b"ghtsweights"[-10:])
    assert rest.headers["content-range"] == "bytes 6990-6999/7000"


@pytest.mark.parametrize(
    "path",
    [
        "notes.txt",
        "run.lock",
        "something_else/adapter_model.safetensors",
        "../../luthier.db",
        "..%2f..%2fluthier.db",
        "%2e%2e/%2e%2e/luthier.db",
        "final_lora_weights/../run.lock",
        "final_lora_weights/../../../luthier.db",
        "final_lora_weights//adapter_model.safetensors",
        "final_lora_weights",
        "/etc/passwd",
        "final_lora_weights\\adapter_model.safetensors",
        "events.jsonl/",
    ],
)
def test_nothing_else_of_the_disk_is_given(own: Here, job: str, path: str) -> None:
    assert own.ask("GET", f"/luthier/v1/jobs/{job}/artefacts/{path}").status_code == 404


def test_no_link_is_followed(own: Here, job: str) -> None:
    run = own.service.home / "runs" / job
    weights = run / "final_lora_weights" / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(own.service.home / "luthier.db")
    assert own.ask("GET", f"/luthier/v1/jobs/{job}/artefacts/final_lora_weights/{weights.name}").status_code == 404
    moved = run / "final_lora_weights" / "inner"
    moved.rename(run / "elsewhere")
    moved.symlink_to(run / "elsewhere")
    assert own.ask("GET", f"/luthier/v1/jobs/{job}/artefacts/final_lora_weights/inner/card.json").status_code == 404
    (run / "events.jsonl").unlink()
    (run / "events.jsonl").symlink_to(own.service.home / "luthier.db")
    (run / "checkpoint_step_9").symlink_to(run / "checkpoint_step_2")
    names = {each.path for each in list_artefacts(run)}
    assert "events.jsonl" not in names
    assert not any(name.startswith("checkpoint_step_9") for name in names)
    os.mkfifo(run / "ledger.jsonl")
    assert own.ask("GET", f"/luthier/v1/jobs/{job}/artefacts/ledger.jsonl").status_code == 404


def test_the_report_is_a_page_that_can_do_nothing(own: Here, job: str) -> None:
    page = own.ask("GET", f"/luthier/v1/jobs/{job}/report")
    assert page.text == HOSTILE_PAGE
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "sandbox" in policy
    assert "default-src 'none'" in policy
    assert "script" not in policy


def test_a_hostile_text_comes_back_as_json_and_never_as_a_page(own: Here) -> None:
    text = "<img src=x onerror=alert(1)>"
    spec = {"model": {"base": text}, "data": {"train": text}}
    done = own.ask("POST", "/luthier/v1/jobs", json={"spec": spec, "metadata": {text: text}})
    assert done.status_code == 400
    assert done.headers["content-type"] == "application/json"
    assert done.headers["content-security-policy"].startswith("default-src 'none'")


def test_events_come_page_by_page_and_from_a_number_on(own: Here, job: str) -> None:
    seen: list[int] = []
    more = True
    while more:
        page = own.ask("GET", f"/luthier/v1/jobs/{job}/events?limit=100&after_seq={seen[-1] if seen else 0}").json()
        seen += [event["seq"] for event in page["events"]]
        more = page["has_more"]
    assert seen == list(range(1, len(seen) + 1))
    assert len(seen) > 250


def test_a_stream_of_a_job_that_is_over_ends_and_starts_where_it_is_asked_to(own: Here, job: str) -> None:
    headers = {"accept": "text/event-stream", "last-event-id": "200"}
    lines = own.ask("GET", f"/luthier/v1/jobs/{job}/events", headers=headers).text.splitlines()
    ids = [int(line.removeprefix("id: ")) for line in lines if line.startswith("id: ")]
    assert ids == list(range(201, ids[-1] + 1))
    assert lines[-3:] == ["event: end", 'data: {"state":"succeeded"}', ""] or lines[-2:] == [
        "event: end",
        'data: {"state":"succeeded"}',
    ]
    for bad in ("x", "-1", "9" * 30):
        headers = {"accept": "text/event-stream", "last-event-id": bad}
        assert own.ask("GET", f"/luthier/v1/jobs/{job}/events", headers=headers).status_code in (200, 400)


@pytest.mark.parametrize("what", ["the server ends", "an event comes"])
def test_what_happens_while_the_database_is_asked_is_not_slept_through(
    own: Here, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    job = own.submit()["id"]
    claim = own.work(job)
    feeds, key = own.service.feeds, check_key(own.service.database, own.keys["read"])
    read = stream._read
    seen: list[int] = []

    async def read_then(*asked: Any) -> Any:
        found = await read(*asked)
        if found is not None and not found[1] and what == "the server ends":
            feeds.close()
        elif found is not None and not found[1]:
            own.service.queue.report(claim, [NewEvent("note", "late")])
            page = own.service.jobs.list_events("default", job, after_seq=asked[-1])
            feeds._feeds[job].newest = asked[-1]
            feeds._feeds[job].add(list(page.items))  # its waking finds nobody who waits
            monkeypatch.setattr(stream, "_read", read)
        return found

    async def follow() -> None:
        def render(event: JobEvent) -> bytes:
            seen.append(event.seq)
            if event.message == "late":
                feeds.close()
            return b""

        async for _ in stream._follow(own.service, key, job, 0, render, None):
            pass

    monkeypatch.setattr(stream, "_read", read_then)
    monkeypatch.setattr(stream, "LOOK_SECONDS", 60.0)
    asyncio.run(asyncio.wait_for(follow(), 5))
    assert seen == list(range(1, len(seen) + 1))


def test_what_is_deleted_is_gone_from_the_disk(own: Here, job: str) -> None:
    run = own.service.home / "runs" / job
    model = f"ft:practice:{job}"
    assert [each["id"] for each in own.ask("GET", "/luthier/v1/models").json()["models"]] == [model]
    assert own.ask("DELETE", f"/luthier/v1/models/{model}").status_code == 200
    assert not (run / "final_lora_weights").exists()
    assert not (run / "checkpoint_step_2").exists()
    assert own.ask("DELETE", f"/luthier/v1/models/{model}").status_code == 404
    file = own.ask("GET", f"/luthier/v1/jobs/{job}").json()["training_file"]
    content = own.service.files.path(own.service.files.find("default", file))
    assert content.exists()
    assert own.ask("DELETE", f"/luthier/v1/jobs/{job}").status_code == 200
    assert not run.exists()
    assert own.ask("DELETE", f"/luthier/v1/files/{file}").status_code == 200
    assert not content.exists()


def test_a_job_is_paused_resumed_cancelled_and_submitted_again(own: Here) -> None:
    first = own.submit()["id"]
    own.work(first)
    for act, state in (("pause", "pausing"), ("cancel", "cancelling"), ("cancel", "cancelling")):
        assert own.ask("POST", f"/luthier/v1/jobs/{first}/{act}").json()["state"] == state
    assert own.ask("DELETE", f"/luthier/v1/jobs/{first}").status_code == 409
    assert own.ask("POST", f"/luthier/v1/jobs/{first}/resume").status_code == 409
    again = own.ask("POST", f"/luthier/v1/jobs/{first}/resubmit")
    assert again.status_code == 201
    assert again.json()["id"] != first
    assert again.json()["spec"] == own.ask("GET", f"/luthier/v1/jobs/{first}").json()["spec"]


def test_the_same_request_makes_one_job(own: Here) -> None:
    spec = {"model": {"base": "practice"}, "data": {"train": own.send()}}
    body, headers = {"spec": spec}, {"idempotency-key": "k1"}
    first = own.ask("POST", "/luthier/v1/jobs", json=body, headers=headers)
    again = own.ask("POST", "/luthier/v1/jobs", json=body, headers=headers)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"]
    other = own.ask("POST", "/luthier/v1/jobs", json={**body, "priority": 1}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_mismatch")
    retried = own.ask("POST", "/luthier/v1/jobs", json=body, headers={"x-stainless-retry-count": "1"})
    assert retried.json()["id"] == first.json()["id"]
    fresh = own.ask("POST", "/luthier/v1/jobs", json=body)
    assert (fresh.status_code, fresh.json()["id"] != first.json()["id"]) == (201, True)
