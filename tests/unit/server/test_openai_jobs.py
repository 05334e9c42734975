"""OpenAI's fine-tuning jobs over our store: every shape is one that the SDK's own types take."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

from luthier.jobs.job import NewEvent, State
from tests.unit.server.conftest import STEPS, Desk

JOBS = "/v1/fine_tuning/jobs"


def show(desk: Desk, job: str) -> FineTuningJob:
    """The job as the SDK reads it."""
    return FineTuningJob.model_validate(desk.ask("GET", f"{JOBS}/{job}"), strict=True)


def supervised(**hyperparameters: Any) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


def test_a_new_job_says_what_was_asked(desk: Desk) -> None:
    given = {"n_epochs": 2, "batch_size": 8, "learning_rate_multiplier": 0.5}
    held = desk.keep_file()
    made = desk.openai_job(
        method=supervised(**given), seed=7, suffix="my bot", metadata={"team": "a"}, validation_file=held
    )
    job = show(desk, made["id"])
    assert job.to_dict() | {"estimated_finish": None} == made
    assert (job.status, job.model, job.organization_id) == ("validating_files", "practice", "default")
    assert (job.training_file, job.validation_file, job.seed) == (desk.file, held, 7)
    assert job.metadata == {"team": "a"}
    assert job.hyperparameters.to_dict() == given
    assert job.method is not None
    assert job.method.to_dict() == {"type": "supervised", "supervised": {"hyperparameters": given}}
    assert (job.fine_tuned_model, job.finished_at, job.trained_tokens, job.error) == (None, None, None, None)
    assert job.result_files == []


def test_auto_is_shown_as_what_it_became_and_told_in_the_events(desk: Desk) -> None:
    made = desk.openai_job()
    job = show(desk, made["id"])
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (3, 1)
    assert job.hyperparameters.learning_rate_multiplier == "auto"
    told = [event["message"] for event in desk.ask("GET", f"{JOBS}/{job.id}/events")["data"]]
    assert "`n_epochs` is 3 for 40 rows" in told


def test_dpo(desk: Desk) -> None:
    given = {"n_epochs": 1, "batch_size": 4, "learning_rate_multiplier": 2.0, "beta": 0.3}
    made = desk.openai_job(method={"type": "dpo", "dpo": {"hyperparameters": given}})
    job = show(desk, made["id"])
    assert job.method is not None
    assert job.method.to_dict() == {"type": "dpo", "dpo": {"hyperparameters": given}}
    spec = desk.ask("GET", f"/luthier/v1/jobs/{job.id}")["spec"]
    assert spec["objective"] == {"kind": "dpo", "beta": 0.3}
    assert spec["data"] == {"train": desk.file, "valid": 0}


def test_a_job_goes_through_its_states(desk: Desk) -> None:
    job = desk.openai_job(suffix="bot")["id"]
    claim = desk.begin(job)
    assert show(desk, job).status == "running"
    desk.here.service.queue.report(claim, [], step=1, steps=STEPS)
    assert show(desk, job).estimated_finish is not None
    desk.train(claim)
    model = desk.succeed(claim)
    ended = show(desk, job)
    assert (ended.status, ended.fine_tuned_model, ended.trained_tokens) == ("succeeded", model, 640)
    assert model == f"ft:practice:bot:{job}"
    assert ended.finished_at is not None
    assert ended.estimated_finish is None


@pytest.mark.parametrize(
    ("act", "status", "state"),
    [("pause", "running", State.PAUSING), ("cancel", "cancelled", State.CANCELLING)],
)
def test_what_was_asked_of_a_running_job_is_seen_at_once(desk: Desk, act: str, status: str, state: State) -> None:
    job = desk.openai_job()["id"]
    desk.begin(job)
    assert desk.ask("POST", f"{JOBS}/{job}/{act}")["status"] == status
    assert desk.here.service.jobs.find("default", job).state is state
    assert show(desk, job).finished_at is None


def test_a_waiting_job_is_paused_resumed_and_cancelled(desk: Desk) -> None:
    job = desk.openai_job()["id"]
    queue = desk.here.service.queue
    claim = queue.claim(queue.list_workers()[0])
    assert claim is not None
    queue.validated(claim)
    assert desk.ask("POST", f"{JOBS}/{job}/pause")["status"] == "paused"
    assert desk.ask("POST", f"{JOBS}/{job}/resume")["status"] == "queued"
    assert desk.ask("POST", f"{JOBS}/{job}/cancel")["status"] == "cancelled"
    refused = desk.ask("POST", f"{JOBS}/{job}/resume", status=409)["error"]
    assert (refused["code"], refused["type"]) == ("conflict", "conflict_error")


@pytest.mark.parametrize(("code", "param"), [("invalid_training_file", "training_file"), ("out_of_memory", None)])
def test_a_job_that_failed_says_why(desk: Desk, code: str, param: str | None) -> None:
    job = desk.openai_job()["id"]
    desk.fail(desk.begin(job), code, "line 3 is not JSON")
    ended = show(desk, job)
    assert ended.status == "failed"
    assert ended.error is not None
    assert ended.error.to_dict() == {"code": code, "message": "line 3 is not JSON", "param": param}
    assert ended.fine_tuned_model is None


def test_jobs_of_every_dialect_are_seen_here(desk: Desk) -> None:
    own = desk.own_job(
        objective={"kind": "dpo", "beta": 0.5}, optim={"epochs": 2.5, "batch": 3, "learning_rate": 4e-5}, seed=9
    )
    synth = desk.synth_job(learning_rate=1e-4)
    listed = [FineTuningJob.model_validate(job, strict=True) for job in desk.ask("GET", JOBS)["data"]]
    assert [job.id for job in listed] == [synth["id"], own["id"]]
    assert listed[0].hyperparameters.to_dict() == {"n_epochs": 1, "batch_size": 10, "learning_rate_multiplier": 0.5}
    assert listed[1].hyperparameters.to_dict() == {"n_epochs": 3, "batch_size": 3, "learning_rate_multiplier": 2.0}
    assert listed[1].method is not None
    assert listed[1].method.type == "dpo"
    assert listed[1].seed == 9


def test_pages_of_jobs_and_their_metadata(desk: Desk) -> None:
    made = [desk.openai_job(metadata={"n": str(n)} if n else None)["id"] for n in range(3)]
    first = desk.ask("GET", f"{JOBS}?limit=2")
    assert [job["id"] for job in first["data"]] == made[:0:-1]
    assert (first["has_more"], first["last_id"]) == (True, made[1])
    rest = desk.ask("GET", f"{JOBS}?limit=2&after={made[1]}")
    assert ([job["id"] for job in rest["data"]], rest["has_more"]) == ([made[0]], False)
    assert [job["id"] for job in desk.ask("GET", f"{JOBS}?metadata[n]=2")["data"]] == [made[2]]
    assert [job["id"] for job in desk.ask("GET", f"{JOBS}?metadata=null")["data"]] == [made[0]]
    assert desk.ask("GET", f"{JOBS}?after=ftjob-none", status=404)["error"]["code"] == "not_found"


def test_events_are_the_newest_first_page_by_page(desk: Desk) -> None:
    job = desk.openai_job()["id"]
    desk.train(desk.begin(job))
    seen: list[FineTuningJobEvent] = []
    after = ""
    while True:
        page = desk.ask("GET", f"{JOBS}/{job}/events?limit=3{after}")
        seen += [FineTuningJobEvent.model_validate(event, strict=True) for event in page["data"]]
        if not page["has_more"]:
            break
        after = f"&after={page['last_id']}"
    numbers = [int(event.id.rpartition("-")[2]) for event in seen]
    assert numbers == list(range(len(numbers), 0, -1))
    assert seen[0].message == "done"
    figures = [event.data for event in seen if event.type == "metrics"]
    assert {"step": 4, "valid_loss": 0.25, "valid_mean_token_accuracy": 0.5} in figures
    assert {"step": 1, "train_loss": 2.0, "learning_rate": 1e-4} in figures
    assert desk.ask("GET", f"{JOBS}/{job}/events?after=nonsense", status=400)["error"]["param"] == "after"


def test_checkpoints_have_the_figures_of_their_step(desk: Desk) -> None:
    job = desk.openai_job()["id"]
    claim = desk.begin(job)
    desk.train(claim)
    again = [
        NewEvent("step_done", "again", step=4, data={"loss": 0.4, "learning_rate": 1e-4}),
        NewEvent("checkpoint_saved", "again", step=4),
    ]
    desk.here.service.queue.report(claim, again)
    model = desk.succeed(claim)
    page = desk.ask("GET", f"{JOBS}/{job}/checkpoints?limit=1")
    assert page["has_more"]
    rest = desk.ask("GET", f"{JOBS}/{job}/checkpoints?after={page['last_id']}")
    found = [FineTuningJobCheckpoint.model_validate(each, strict=True) for each in page["data"] + rest["data"]]
    assert [each.step_number for each in found] == [4, 2]
    assert found[0].fine_tuned_model_checkpoint == f"{model}:ckpt-step-4"
    assert found[0].metrics.to_dict() == {
        "step": 4.0,
        "train_loss": 0.4,
        "valid_loss": 0.25,
        "valid_mean_token_accuracy": 0.5,
        "full_valid_loss": 0.25,
        "full_valid_mean_token_accuracy": 0.5,
    }


def test_the_results_file_has_a_line_for_each_step(desk: Desk) -> None:
    job = desk.openai_job()["id"]
    assert show(desk, job).result_files == []
    desk.finish(job)
    [file] = show(desk, job).result_files
    shown = desk.ask("GET", f"/v1/files/{file}")
    assert (shown["purpose"], shown["status"], shown["filename"]) == (
        "fine-tune-results",
        "processed",
        f"{job}_results.csv",
    )
    content = desk.here.ask("GET", f"/v1/files/{file}/content").text
    assert content.splitlines() == [
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy",
        "1,2.0,,,",
        "2,1.0,,,",
        "3,0.6666666666666666,,,",
        "4,0.5,,0.25,0.5",
    ]
    assert shown["bytes"] == len(content)
    assert [each["id"] for each in desk.ask("GET", "/v1/files?purpose=fine-tune-results")["data"]] == [file]
    assert desk.ask("DELETE", f"/v1/files/{file}", status=409)["error"]["code"] == "conflict"
    other = desk.here.ask("GET", f"/v1/files/{file}", other=True)
    assert other.status_code == 404


def test_a_retry_of_the_sdk_makes_no_second_job(desk: Desk) -> None:
    first = desk.openai_job()["id"]
    body = {"model": "practice", "training_file": desk.file}
    again = desk.ask("POST", JOBS, json=body, headers={"x-stainless-retry-count": "1"})
    assert again["id"] == first
    assert desk.openai_job()["id"] != first
    keyed = [desk.ask("POST", JOBS, json=body, headers={"idempotency-key": "k"})["id"] for _ in range(2)]
    assert keyed[0] == keyed[1]
    other = {**body, "seed": 1}
    refused = desk.ask("POST", JOBS, json=other, headers={"idempotency-key": "k"}, status=422)["error"]
    assert refused["code"] == "idempotency_mismatch"


@pytest.mark.parametrize(
    ("keys", "status", "code", "param"),
    [
        ({"model": "no/../model"}, 400, "model_invalid", None),
        ({"training_file": "file-none"}, 400, "data_invalid", "training_file"),
        ({"method": {"type": "reinforcement"}}, 400, "unsupported", "method.type"),
        ({"method": supervised(beta=1)}, 400, "spec_invalid", "method.supervised.hyperparameters.beta"),
        ({"method": supervised(n_epochs=0)}, 422, "request_invalid", None),
        ({"metadata": {str(n): "x" for n in range(17)}}, 400, "spec_invalid", "metadata"),
        ({"training": {"optim": {"kind": "lion"}}}, 400, "spec_invalid", None),
        ({"compute": {"gpu_type": "B300"}}, 400, "plan_does_not_fit", None),
        ({"wishes": 3}, 400, "spec_invalid", "wishes"),
    ],
)
def test_a_refusal_has_the_shape_that_the_sdk_reads(
    desk: Desk, keys: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    body = {"model": "practice", "training_file": desk.file, **keys}
    error = desk.ask("POST", JOBS, json=body, status=status)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert param in (None, error["param"])
    assert desk.ask("GET", JOBS)["data"] == []


def test_jobs_of_another_project_are_not_there(desk: Desk) -> None:
    job = desk.openai_job()["id"]
    for verb, path in (
        ("GET", ""),
        ("GET", "/events"),
        ("GET", "/checkpoints"),
        ("POST", "/cancel"),
        ("POST", "/pause"),
    ):
        done = desk.here.ask(verb, f"{JOBS}/{job}{path}", other=True)
        assert (done.status_code, done.json()["error"]["code"]) == (404, "not_found")
