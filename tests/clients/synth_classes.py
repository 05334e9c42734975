"""Synth's Python classes against a server: `python synth_classes.py URL KEY MODEL FOLDER`, nothing of this project.

It runs a job by `LearningClient`, watches it by `JobHandle` and by the event stream, lists files, jobs and models, and
with `--chat` has the result answer. One JSON object at the end.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from synth_ai.inference.client import InferenceClient
from synth_ai.jobs.client import JobsClient
from synth_ai.learning.client import LearningClient
from synth_ai.learning.jobs import JobHandle
from synth_ai.learning.sse import stream_events

METADATA = {
    "effective_config": {
        "compute": {"gpu_type": "H100", "gpu_count": 1, "nodes": 1},
        "data": {"topology": {}},
        "training": {"mode": "sft_offline", "use_qlora": True},
    }
}


async def main(url: str, key: str, model: str, folder: Path, *, chats: bool) -> dict[str, Any]:
    """The whole flow; an AssertionError names the part that does not hold."""
    learning = LearningClient(url, key)
    file = await learning.upload_training_file(folder / "rows.jsonl")
    made = await learning.create_job(
        training_type="sft_offline",
        model=model,
        training_file_id=file,
        hyperparameters={"n_epochs": 1, "batch_size": 8, "learning_rate": 1e-4},
        metadata=METADATA,
    )
    job = str(made["job_id"])
    await learning.start_job(job)
    streamed: list[dict[str, Any]] = []
    metrics: list[dict[str, Any]] = []
    watching = JobHandle(url, key, job).poll_until_terminal(
        interval_seconds=0.3, max_seconds=240, on_metric=metrics.append
    )
    done, _ = await asyncio.gather(watching, stream_events(url, key, job, seconds=240, on_event=streamed.append))
    assert done["status"] == "succeeded", done
    tuned = str(done["fine_tuned_model"])
    assert tuned == f"ft:{model}:{job}", done
    assert {each["name"] for each in metrics} >= {"train.loss", "train.learning_rate"}, metrics
    assert [each["seq"] for each in streamed] == list(range(1, len(streamed) + 1)), streamed
    assert streamed[-1]["type"] == "workflow.completed", streamed[-1]
    await check_polling(learning, job, tuned)
    await check_lists(url, key, file, job, tuned)
    return {"job": job, "model": tuned, "said": await chat(url, key, tuned) if chats else None}


async def check_polling(learning: Any, job: str, tuned: str) -> None:
    """What `LearningClient` reads of a job that has ended."""
    ended = await learning.poll_until_terminal(job, interval_seconds=0.1, max_seconds=10)
    assert (ended["status"], ended["fine_tuned_model"]) == ("succeeded", tuned), ended
    events = await learning.get_events(job)
    assert events[0]["type"] == "sft.created", events[0]
    points = await learning.get_metrics(job, name="train.loss")
    assert [point["step"] for point in points] == [1, 2], points
    timeline = [each["phase"] for each in await learning.get_timeline(job)]
    assert timeline == ["validating_files", "queued", "running", "succeeded"], timeline
    if hasattr(learning, "list_fine_tuned_models"):  # 0.2.9.dev7 has none yet
        models = {each["id"]: each for each in await learning.list_fine_tuned_models()}
        assert models[tuned]["job_id"] == job, models


async def check_lists(url: str, key: str, file: str, job: str, tuned: str) -> None:
    """What `JobsClient` lists, and a job that it makes."""
    async with JobsClient(url, key) as jobs:
        assert (await jobs.files.retrieve(file))["status"] == "ready"
        assert file in {each["id"] for each in (await jobs.files.list(purpose="fine-tune", limit=100))["data"]}
        assert job in {each["id"] for each in (await jobs.files.list_jobs(file))["data"]}
        assert job in {each["id"] for each in (await jobs.sft.list(limit=100, status="succeeded"))["data"]}
        assert (await jobs.sft.retrieve(job))["result"]["model_id"] == tuned
        assert (await jobs.sft.list_events(job, since_seq=1))["events"][0]["seq"] == 2
        assert (await jobs.sft.checkpoints(job))["data"][0]["step_number"] == 2
        assert (await jobs.models.retrieve(tuned))["base_model"] in tuned
        assert tuned in {each["id"] for each in (await jobs.models.list(limit=100))["data"]}
        assert job in {each["id"] for each in (await jobs.models.list_jobs(tuned))["data"]}
        again = await jobs.sft.create(
            training_file=file,
            model=tuned.split(":")[1],
            hyperparameters={"n_epochs": 900},
            idempotency_key=f"again-{job}",
        )
        assert (await jobs.sft.cancel(again["id"]))["status"] == "cancelled"


async def chat(url: str, key: str, model: str) -> str:
    """What the tuned model answers."""
    said = await InferenceClient(url, key, timeout=120).create_chat_completion(
        model=model, messages=[{"role": "user", "content": "Two tea for table 4"}], max_tokens=24, temperature=0
    )
    return str(said["choices"][0]["message"]["content"])


if __name__ == "__main__":
    arguments = [each for each in sys.argv[1:] if each != "--chat"]
    print(json.dumps(asyncio.run(main(*arguments[:3], Path(arguments[3]), chats="--chat" in sys.argv))))
