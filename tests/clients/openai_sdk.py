"""What a user of the OpenAI SDK does, with any SDK from 1.x to 3.x: `python openai_sdk.py URL KEY MODEL FOLDER`.

It imports nothing of this project. FOLDER holds rows.jsonl, held.jsonl and pairs.jsonl. It prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import openai

FINAL = ("succeeded", "failed", "cancelled")
SECONDS = 240
LAST_STEPS = {"supervised": 8, "dpo": 4}


def main(url: str, key: str, model: str, folder: Path, *, chats: bool) -> dict[str, Any]:
    """The whole flow; an AssertionError names the part that does not hold."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=2)
    training = upload(client, folder / "rows.jsonl")
    held = upload_in_parts(client, folder / "held.jsonl")
    preferences = upload(client, folder / "pairs.jsonl")
    held_back = make_job(client, model, training, "supervised", n_epochs=1000)
    supervised = make_job(client, model, training, "supervised", validation=held, n_epochs=2, suffix="orders v1")
    dpo = make_job(client, model, preferences, "dpo", n_epochs=1)
    check_pause_and_cancel(client, held_back)
    tuned = check_result(client, supervised, "supervised")
    check_result(client, dpo, "dpo")
    check_lists(client, [supervised, dpo, held_back], tuned)
    check_errors(client, held_back)
    said = chat(client, tuned) if chats else None
    client.files.delete(preferences)
    return {"sdk": openai.__version__, "model": tuned, "said": said}


def upload(client: Any, path: Path) -> str:
    """A file, sent and found good."""
    with path.open("rb") as content:
        sent = client.files.create(file=content, purpose="fine-tune")
    checked = client.files.wait_for_processing(sent.id, poll_interval=0.2, max_wait_seconds=SECONDS)
    assert checked.status == "processed", checked
    assert client.files.content(sent.id).read() == path.read_bytes()
    assert sent.id in {file.id for file in client.files.list(purpose="fine-tune")}
    return str(sent.id)


def upload_in_parts(client: Any, path: Path) -> str:
    """The same in parts of a few hundred bytes, by the SDK's own function."""
    done = client.uploads.upload_file_chunked(
        file=path, mime_type="application/jsonl", purpose="fine-tune", part_size=700
    )
    assert (done.status, done.file.bytes) == ("completed", path.stat().st_size), done
    assert client.files.content(done.file.id).read() == path.read_bytes()
    return str(done.file.id)


def make_job(
    client: Any, model: str, file: str, kind: str, *, n_epochs: int, validation: str | None = None, suffix: str = ""
) -> str:
    """A job; what was asked for is in the answer."""
    beta = {"beta": 0.2} if kind == "dpo" else {}
    hyperparameters = {"n_epochs": n_epochs, "batch_size": 4, "learning_rate_multiplier": 2.0, **beta}
    extra = {"validation_file": validation} if validation else {}
    job = client.fine_tuning.jobs.create(
        model=model,
        training_file=file,
        method={"type": kind, kind: {"hyperparameters": hyperparameters}},
        seed=7,
        metadata={"made_by": openai.__version__},
        **({"suffix": suffix} if suffix else {}),
        **extra,
    )
    assert job.status in ("validating_files", "queued", "running"), job
    assert (job.seed, job.training_file, job.model, job.object) == (7, file, model, "fine_tuning.job"), job
    assert job.metadata == {"made_by": openai.__version__}, job
    shown = getattr(job.method, kind).hyperparameters
    assert (shown.n_epochs, shown.batch_size, shown.learning_rate_multiplier) == (n_epochs, 4, 2.0), job
    return str(job.id)


def wait_for(client: Any, job_id: str, *statuses: str) -> Any:
    """The job, once it stands where it should; another end is an error."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in statuses:
            return job
        assert job.status not in FINAL, f"{job_id} ended as {job.status}: {job.error}"
        time.sleep(0.2)
    raise AssertionError(f"{job_id} is still {job.status}")


def check_pause_and_cancel(client: Any, job_id: str) -> None:
    """A job that would never end is paused, goes on, and is cancelled for good."""
    wait_for(client, job_id, "queued", "running")
    client.fine_tuning.jobs.pause(job_id)
    assert wait_for(client, job_id, "paused").finished_at is None
    assert client.fine_tuning.jobs.resume(job_id).status in ("queued", "running")
    assert client.fine_tuning.jobs.cancel(job_id).status == "cancelled"
    deadline = time.monotonic() + SECONDS
    while client.fine_tuning.jobs.retrieve(job_id).finished_at is None:
        assert time.monotonic() < deadline, "the cancelled job does not end"
        time.sleep(0.2)


def check_result(client: Any, job_id: str, kind: str) -> str:
    """A job that succeeded: model, tokens, events, checkpoints and the results file."""
    job = wait_for(client, job_id, "succeeded")
    last = LAST_STEPS[kind]
    assert job.fine_tuned_model.startswith("ft:"), job
    assert job.fine_tuned_model.endswith(job_id), job
    assert job.trained_tokens > 0, job
    assert job.finished_at >= job.created_at, job
    assert job.error is None, job
    events = list(client.fine_tuning.jobs.list_events(job_id, limit=5))
    assert len({event.id for event in events}) == len(events)
    measured = [event.data for event in events if event.type == "metrics"]
    assert {data["step"] for data in measured if "train_loss" in data} == set(range(1, last + 1)), measured
    assert {event.level for event in events} <= {"info", "warn"}, events
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job_id, limit=1))
    assert checkpoints[0].step_number == last, checkpoints
    assert checkpoints[0].metrics.train_loss > 0, checkpoints
    assert checkpoints[0].fine_tuned_model_checkpoint == f"{job.fine_tuned_model}:ckpt-step-{last}", checkpoints
    lines = client.files.content(job.result_files[0]).text.splitlines()
    assert lines[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy", lines
    assert [line.split(",")[0] for line in lines[1:]] == [str(step) for step in range(1, last + 1)], lines
    if kind == "supervised":
        assert "orders-v1" in job.fine_tuned_model, job
        assert [checkpoint.step_number for checkpoint in checkpoints] == [last, last // 2], checkpoints
        assert checkpoints[0].metrics.full_valid_loss > 0, checkpoints
        assert float(lines[-1].split(",")[3]) > 0, lines
    return str(job.fine_tuned_model)


def check_lists(client: Any, jobs: list[str], model: str) -> None:
    """Jobs and models are listed, page by page and by metadata."""
    assert set(jobs) <= {job.id for job in client.fine_tuning.jobs.list(limit=2)}
    mine = client.fine_tuning.jobs.list(extra_query={"metadata[made_by]": openai.__version__})
    assert set(jobs) <= {job.id for job in mine}
    assert model in {each.id for each in client.models.list()}
    assert client.models.retrieve(model).id == model


def check_errors(client: Any, cancelled: str) -> None:
    """Each refusal is the exception that users of the SDK catch."""
    expect(openai.NotFoundError, "not_found", lambda: client.fine_tuning.jobs.retrieve("ftjob-none"))
    expect(openai.ConflictError, "conflict", lambda: client.fine_tuning.jobs.pause(cancelled))
    expect(openai.NotFoundError, "not_found", lambda: client.models.retrieve("ft:none:ftjob-none"))
    bad = client.with_options(api_key="ftk_wrong_key")
    expect(openai.AuthenticationError, "unauthorized", bad.models.list)


def expect(kind: type[Exception], code: str, call: Any) -> None:
    """The call raises this error, with the code and a request id."""
    raised: Any = None
    try:
        call()
    except kind as error:
        raised = error
    assert raised is not None, f"expected {kind.__name__}"
    assert (raised.code, bool(raised.request_id)) == (code, True), raised


def chat(client: Any, model: str) -> str:
    """The tuned model answers, whole and as a stream, and says the same for the same seed."""
    asked: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": "Two tea for table 4"}],
        "max_tokens": 24,
        "temperature": 0,
        "seed": 1,
    }
    whole = client.chat.completions.create(**asked)
    parts = list(client.chat.completions.create(stream=True, **asked))
    streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert whole.choices[0].message.content == streamed, (whole, streamed)
    assert whole.usage.completion_tokens > 0, whole
    assert whole.choices[0].finish_reason in ("stop", "length"), whole
    return streamed


if __name__ == "__main__":
    arguments = [each for each in sys.argv[1:] if each != "--chat"]
    said = main(*arguments[:3], Path(arguments[3]), chats="--chat" in sys.argv)
    print(json.dumps(said))
