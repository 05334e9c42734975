"""Synth's protocol, request by request as its clients send them, and what they read of jobs of any dialect."""

from __future__ import annotations

import json
from typing import Any

import pytest

from luthier.jobs.checking import FileReport
from luthier.jobs.job import NewEvent, State
from tests.service.here import ROW
from tests.unit.server.conftest import Desk, synth_body

JOBS = "/api/learning/jobs"


def statuses(desk: Desk, job: str) -> list[str]:
    """The phases that the timeline shows."""
    return [each["phase"] for each in desk.ask("GET", f"{JOBS}/{job}/timeline")["events"]]


@pytest.fixture
def is_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks find files good or bad by their first letter, in place of a process."""
    problem = {"file": "rows.jsonl", "line": 1, "reason": "not_json", "message": "rows.jsonl:1: the line is not JSON"}
    bad = FileReport(False, "invalid_training_file", "1 of 1 rows is malformed", problems=(problem,))
    monkeypatch.setattr(
        "luthier.server.checks.check_file",
        lambda path, **_: FileReport(True, rows=1) if path.read_bytes().startswith(b"{") else bad,
    )


def send(desk: Desk, content: str = ROW, *, path: str = "/api/learning/files", status: int = 200) -> Any:
    """A file as `requests` sends it: the field first, then the file with its type."""
    form = {"purpose": (None, "fine-tune"), "file": ("train.jsonl", content.encode(), "application/jsonl")}
    return desk.ask("POST", path, files=form, status=status)


@pytest.mark.usefixtures("is_good")
def test_the_whole_flow_of_the_client(desk: Desk) -> None:
    file = send(desk)
    assert file["status"] == "ready"
    assert desk.ask("GET", f"/api/learning/files/{file['id']}")["status"] == "ready"
    made = desk.ask("POST", JOBS, json=synth_body(file["id"]))
    assert list(made)[:3] == ["job_id", "id", "status"]
    job = made["job_id"]
    for _ in range(2):
        assert desk.ask("POST", f"{JOBS}/{job}/start", json={})["status"] == "validating_files"
    model = desk.finish(job)
    ended = desk.ask("GET", f"{JOBS}/{job}")
    assert (ended["status"], ended["fine_tuned_model"]) == ("succeeded", model)
    assert ended["result"] == {"model_id": model}
    assert f'"fine_tuned_model": "ft:practice:{job}"' in json.dumps(ended, indent=2)[:600]
    assert statuses(desk, job) == ["validating_files", "queued", "running", "succeeded"]


@pytest.mark.usefixtures("is_good")
def test_a_bad_file_is_refused_while_it_is_sent(desk: Desk) -> None:
    before = desk.ask("GET", "/api/learning/files")["data"]
    error = send(desk, "not json\n", status=400)
    assert error["code"] == "invalid_training_file"
    assert "train.jsonl: 1 of 1 rows is malformed" in error["detail"]
    assert "the line is not JSON" in error["detail"]
    assert desk.ask("GET", "/api/learning/files")["data"] == before


def test_a_job_without_gpu_type_is_refused_by_its_code(desk: Desk) -> None:
    body = synth_body(desk.file)
    del body["metadata"]["effective_config"]["compute"]["gpu_type"]
    error = desk.ask("POST", JOBS, json=body, status=400)
    assert (error["code"], error["error"]["code"]) == ("missing_gpu_type", "missing_gpu_type")
    assert error["error"]["param"] == "metadata.effective_config.compute.gpu_type"
    assert "gpu_type" in error["message"] == error["detail"]
    assert desk.ask("POST", "/api/sft/jobs", json=body)["status"] == "validating_files"


@pytest.mark.parametrize(
    ("compute", "said"),
    [
        ({"gpu_type": "B300"}, ("'B300'", "H100")),
        ({"gpu_type": "H100", "nodes": 3}, ("3 nodes", "runs on 1")),
        ({"gpu_type": "H100", "gpu_count": 64}, ("64 processors", "4 are there")),
    ],
)
def test_what_the_server_does_not_have_is_refused_with_the_numbers(
    desk: Desk, compute: dict[str, Any], said: tuple[str, ...]
) -> None:
    body = synth_body(desk.file)
    body["metadata"]["effective_config"]["compute"] = compute
    body["hyperparameters"]["batch_size"] = 64
    error = desk.ask("POST", JOBS, json=body, status=400)
    assert error["code"] == "plan_does_not_fit"
    for part in said:
        assert part in error["message"]


def test_a_job_keeps_what_was_asked(desk: Desk) -> None:
    body = synth_body(desk.file)
    body["metadata"]["team"] = "crafter"
    made = desk.ask("POST", JOBS, json=body)
    assert made["hyperparameters"] == body["hyperparameters"]
    assert made["metadata"] == {"team": "crafter", **body["metadata"]}
    assert made["training_file_id"] == desk.file
    shown = desk.ask("GET", f"{JOBS}/{made['id']}/config")
    assert shown["spec"]["method"] == {"kind": "qlora"}
    assert shown["metadata"]["effective_config"] == body["metadata"]["effective_config"]


def test_notes_of_the_translation_are_events(desk: Desk) -> None:
    body = synth_body(desk.file)
    body["hyperparameters"]["parallelism"] = {"overlap_comm": True}
    job = desk.ask("POST", JOBS, json=body)["id"]
    noted = [event for event in desk.ask("GET", f"{JOBS}/{job}/events")["events"] if event["type"] == "sft.noted"]
    assert any("overlap_comm" in event["message"] for event in noted)


def test_each_state_moves_the_time_that_clients_tell_states_by(desk: Desk) -> None:
    job = desk.synth_job()["id"]
    seen = [desk.ask("GET", f"{JOBS}/{job}")["updated_at"]]
    claim = desk.begin(job)
    seen.append(desk.ask("GET", f"{JOBS}/{job}")["updated_at"])
    desk.succeed(claim)
    seen.append(desk.ask("GET", f"{JOBS}/{job}")["updated_at"])
    assert sorted(set(seen)) == seen


def test_events_in_order_and_the_end_only_once_the_job_has_ended(desk: Desk) -> None:
    job = desk.synth_job()["id"]
    claim = desk.begin(job)
    desk.train(claim)
    types = [event["type"] for event in desk.ask("GET", f"{JOBS}/{job}/events")["events"]]
    assert types[0] == "sft.created"
    assert {"sft.training.started", "sft.progress", "sft.validation.summary", "sft.training.finished"} <= set(types)
    assert not [each for each in types if each.endswith(("completed", "failed"))]
    model = desk.succeed(claim)
    events = desk.ask("GET", f"{JOBS}/{job}/events")["events"]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["type"] == "workflow.completed"
    assert events[-1]["data"]["fine_tuned_model"] == model
    rest = desk.ask("GET", f"{JOBS}/{job}/events?since_seq=3&limit=2")
    assert ([event["seq"] for event in rest["events"]], rest["has_more"]) == ([4, 5], True)
    assert {"seq", "type", "message", "data", "level", "created_at", "event_id", "timestamp"} <= set(events[0])


def test_a_job_that_failed_ends_with_the_word_that_every_client_knows(desk: Desk) -> None:
    job = desk.synth_job()["id"]
    desk.fail(desk.begin(job), "out_of_memory", "memory ran out")
    shown = desk.ask("GET", f"{JOBS}/{job}")
    assert (shown["status"], shown["error"], shown["error_code"]) == ("failed", "memory ran out", "out_of_memory")
    assert desk.ask("GET", f"{JOBS}/{job}/events")["events"][-1]["type"] == "workflow.failed"
    assert statuses(desk, job)[-1] == "failed"


def test_the_stream_of_events_ends_with_the_job(desk: Desk) -> None:
    job = desk.synth_job()["id"]
    desk.finish(job)
    path = f"/api/learning/jobs/{job}/events?since_seq=0"
    done = desk.here.ask("GET", path, headers={"accept": "text/event-stream"})
    assert done.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in done.text.splitlines() if line.startswith("data: ")]
    assert events == desk.ask("GET", path)["events"]


def test_metrics_by_name_and_step(desk: Desk) -> None:
    job = desk.synth_job()["id"]
    desk.train(desk.begin(job))
    every = desk.ask("GET", f"{JOBS}/{job}/metrics")["points"]
    assert {point["name"] for point in every} >= {"train.loss", "train.learning_rate", "val.loss"}
    loss = desk.ask("GET", f"{JOBS}/{job}/metrics?name=train.loss")["points"]
    assert [(point["step"], point["value"]) for point in loss] == [(1, 2.0), (2, 1.0), (3, 2 / 3), (4, 0.5)]
    assert [point["epoch"] for point in loss] == [0.25, 0.5, 0.75, 1.0]
    held = desk.ask("GET", f"{JOBS}/{job}/metrics?name=val.loss")["points"]
    assert [(point["step"], point["phase"]) for point in held] == [(2, "val"), (4, "val")]
    assert desk.ask("GET", f"{JOBS}/{job}/metrics?name=nonsense")["points"] == []


def test_a_step_is_never_cut_in_two_pages(desk: Desk) -> None:
    job = desk.synth_job()["id"]
    desk.train(desk.begin(job))
    every = desk.ask("GET", f"{JOBS}/{job}/metrics")["points"]
    seen: list[Any] = []
    after = -1
    while page := desk.ask("GET", f"{JOBS}/{job}/metrics?after_step={after}&limit=4")["points"]:
        seen += page
        after = page[-1]["step"]
    assert seen == every


def test_cancel_pause_and_resume(desk: Desk) -> None:
    job = desk.synth_job()["id"]
    assert desk.ask("POST", f"{JOBS}/{job}/cancel")["status"] == "cancelled"
    assert desk.ask("POST", f"{JOBS}/{job}/resume", status=409)["code"] == "conflict"
    job = desk.synth_job()["id"]
    desk.begin(job)
    assert desk.ask("POST", f"{JOBS}/{job}/pause")["status"] == "running"
    assert desk.here.service.jobs.find("default", job).state is State.PAUSING


@pytest.mark.parametrize("prefix", ["/api", "/api/v1"])
def test_every_alias_answers_the_same(desk: Desk, prefix: str) -> None:
    job = desk.synth_job()["id"]
    model = desk.finish(job)
    for names, rest in (
        (("learning/jobs", "sft/jobs", "jobs"), f"/{job}"),
        (("learning/jobs", "sft/jobs", "jobs"), f"/{job}/events"),
        (("learning/jobs", "sft/jobs"), f"/{job}/checkpoints"),
        (("learning/jobs", "jobs"), f"/{job}/metrics"),
        (("learning/jobs", "jobs"), f"/{job}/timeline"),
        (("learning/jobs", "jobs"), f"/{job}/status"),
        (("learning/jobs", "jobs"), f"/{job}/config"),
        (("learning/jobs", "jobs"), f"/{job}/runs"),
        (("learning/jobs", "sft/jobs", "jobs"), "?status=succeeded"),
        (("learning/files", "files"), f"/{desk.file}"),
        (("learning/files", "files"), f"/{desk.file}/jobs"),
        (("learning/models", "models"), f"/{model}"),
        (("learning/models", "models"), ""),
    ):
        found = [desk.ask("GET", f"{prefix}/{name}{rest}") for name in names]
        assert all(each == found[0] for each in found), rest
        assert found[0]


def test_lists_are_filtered(desk: Desk) -> None:
    other = desk.keep_file()
    first, second = desk.synth_job()["id"], desk.ask("POST", JOBS, json=synth_body(other))["id"]
    model = desk.finish(first)

    def listed(query: str) -> list[str]:
        return [job["id"] for job in desk.ask("GET", f"{JOBS}?{query}")["jobs"]]

    assert listed("") == [second, first]
    assert listed("status=succeeded,failed") == [first]
    assert listed(f"file_id={other}") == [second]
    assert listed(f"model={model}") == [first]
    assert listed("created_after=9999999999") == []
    assert listed(f"after={second}") == [first]
    assert desk.ask("GET", f"{JOBS}?status=sleeping", status=400)["error"]["param"] == "status"
    assert [job["id"] for job in desk.ask("GET", f"/api/models/{model}/jobs")["data"]] == [first]


def test_models_are_listed_shown_and_deleted(desk: Desk) -> None:
    model = desk.finish(desk.synth_job()["id"])
    [listed] = desk.ask("GET", "/api/learning/models")["data"]
    assert listed == desk.ask("GET", f"/api/learning/models/{model}")
    assert (listed["base_model"], listed["status"]) == ("practice", "ready")
    assert isinstance(listed["created_at"], int)
    assert desk.ask("GET", "/api/learning/models?base_model=other")["data"] == []
    assert desk.ask("GET", "/api/learning/models/rl")["data"] == []
    assert desk.ask("DELETE", f"/api/models/{model}")["deleted"]
    assert desk.ask("GET", f"/api/models/{model}", status=404)["code"] == "not_found"


def test_jobs_of_every_dialect_are_seen_here(desk: Desk) -> None:
    own = desk.own_job(optim={"epochs": 2.0, "batch": 3, "learning_rate": 4e-5}, method={"kind": "lora"})
    openai = desk.openai_job(compute={"gpu_type": "H100"})
    shown = {job["id"]: job for job in desk.ask("GET", JOBS)["jobs"]}
    hyperparameters = shown[own["id"]]["hyperparameters"]
    assert hyperparameters["n_epochs"] == 2
    assert (hyperparameters["batch_size"], hyperparameters["learning_rate"]) == (3, 4e-5)
    assert hyperparameters["train_kind"] == "lora"
    config = shown[openai["id"]]["metadata"]["effective_config"]
    assert config["compute"] == {"gpu_type": "H100"}
    assert config["training"]["use_qlora"] is True


def test_a_file_that_a_dry_run_did_not_send_is_ready(desk: Desk) -> None:
    assert desk.ask("GET", "/api/learning/files/dry-run-train")["status"] == "ready"


def test_attempts_are_runs(desk: Desk) -> None:
    job = desk.synth_job()["id"]
    claim = desk.begin(job)
    desk.here.service.queue.report(claim, [NewEvent("warned", "slow")])
    assert [run["status"] for run in desk.ask("GET", f"/api/jobs/{job}/runs")["runs"]] == ["validated", "running"]


@pytest.mark.parametrize("path", ["/api/nothing", "/api/learning/jobs/ftjob-none", "/api/learning/jobs?limit=0"])
def test_errors_can_be_read_by_every_client(desk: Desk, path: str) -> None:
    done = desk.here.ask("GET", path)
    assert done.status_code in (404, 422)
    body = done.json()
    assert set(body) == {"error", "detail", "code", "message"}
    assert body["detail"] == body["message"] == body["error"]["message"]


def test_another_project_sees_nothing(desk: Desk) -> None:
    job = desk.synth_job()["id"]
    for path in (f"{JOBS}/{job}", f"{JOBS}/{job}/events", f"{JOBS}/{job}/metrics", f"/api/learning/files/{desk.file}"):
        assert desk.here.ask("GET", path, other=True).status_code == 404
    assert desk.here.ask("GET", JOBS, other=True).json()["jobs"] == []
