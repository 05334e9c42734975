"""A service in this process whose jobs a test carries through their states by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest

from luthier.jobs.job import Claim, NewEvent, Outcome, WorkerRow
from tests.service.here import ROW, Here, service_here

STEPS = 4


@dataclass
class Desk:
    """The service of one test, with one file that was found good."""

    here: Here
    file: str = ""

    def ask(self, verb: str, path: str, *, status: int = 200, **more: Any) -> Any:
        """The JSON that answers; the status is what it should be."""
        done = self.here.ask(verb, path, **more)
        assert done.status_code == status, f"{verb} {path}: {done.status_code} {done.text}"
        return done.json()

    def keep_file(self, content: bytes = ROW.encode() * 40) -> str:
        """A file as it is after a check that found it good."""
        files = self.here.service.files
        incoming = files.begin("default", "fine-tune", "rows.jsonl", limit_bytes=1 << 20)
        incoming.write(content)
        stored = incoming.finish()
        return files.set_report("default", stored.id, "ready", rows=content.count(b"\n"), report={}).id

    def openai_job(self, **more: Any) -> dict[str, Any]:
        """A job made by the OpenAI dialect."""
        body = {"model": "practice", "training_file": self.file, **more}
        return dict(self.ask("POST", "/v1/fine_tuning/jobs", json=body))

    def synth_job(self, **hyperparameters: Any) -> dict[str, Any]:
        """A job made by the Synth dialect."""
        body = {**synth_body(self.file), "hyperparameters": {"n_epochs": 1, "batch_size": 10, **hyperparameters}}
        return dict(self.ask("POST", "/api/learning/jobs", json=body))

    def own_job(self, **tables: Any) -> dict[str, Any]:
        """A job made by a run spec."""
        spec = {"model": {"base": "practice"}, "data": {"train": self.file}, **tables}
        return dict(self.ask("POST", "/luthier/v1/jobs", status=201, json={"spec": spec}))

    def begin(self, job: str) -> Claim:
        """The job is checked, and a worker has begun to train it."""
        return self.here.work(job)

    def train(self, claim: Claim, *, evaluates: bool = True) -> None:
        """What a run of four steps reports: each step, and at the second and the last a checkpoint."""
        events = [NewEvent("run_started", "started")]
        for step in range(1, STEPS + 1):
            said = {"loss": 2.0 / step, "learning_rate": 1e-4, "grad_norm": 0.5}
            events.append(NewEvent("step_done", f"step {step}", step=step, data=said))
            if step % 2 == 0 and evaluates:
                measured = {"loss": 1.0 / step, "perplexity": 2.0, "token_accuracy": 0.5}
                events.append(NewEvent("evaluated", f"held-out at {step}", step=step, data=measured))
            if step % 2 == 0:
                events.append(NewEvent("checkpoint_saved", f"checkpoint {step}", step=step))
                (self.run_of(claim) / f"checkpoint_step_{step}").mkdir(parents=True)
        events.append(NewEvent("finished", "done", step=STEPS))
        self.here.service.queue.report(claim, events, step=STEPS, steps=STEPS)

    def succeed(self, claim: Claim) -> str:
        """The job has a result, with the log that its run wrote; the result's id."""
        run = self.run_of(claim)
        run.mkdir(parents=True, exist_ok=True)
        log = [{"step": step, "loss": 2.0 / step} for step in range(1, STEPS + 1)]
        log[-1]["eval"] = {"loss": 0.25, "token_accuracy": 0.5}  # type: ignore[assignment]
        (run / "training_log.json").write_bytes(orjson.dumps(log))
        named = f"{claim.job.suffix}:{claim.job.id}" if claim.job.suffix else claim.job.id
        model = f"ft:{claim.job.base}:{named}"
        outcome = Outcome("succeeded", model=model, trained_tokens=640)
        self.here.service.queue.finish(claim, outcome)
        return model

    def finish(self, job: str) -> str:
        """A job from its check to its result."""
        claim = self.begin(job)
        self.train(claim)
        return self.succeed(claim)

    def run_of(self, claim: Claim) -> Path:
        """The run folder of a job."""
        return self.here.service.home / "runs" / claim.job.id

    def fail(self, claim: Claim, code: str, message: str) -> None:
        """The job fails."""
        self.here.service.queue.finish(claim, Outcome("failed", error_code=code, message=message))


def synth_body(file: str) -> dict[str, Any]:
    """The payload of a Synth client."""
    compute = {"gpu_type": "H100", "gpu_count": 1, "nodes": 1}
    training = {"mode": "sft_offline", "use_qlora": True}
    return {
        "model": "practice",
        "training_file_id": file,
        "training_type": "sft_offline",
        "hyperparameters": {"n_epochs": 1},
        "metadata": {"effective_config": {"compute": compute, "data": {"topology": {}}, "training": training}},
    }


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """A service of the test's own, on which H100 stands for its processor."""
    with service_here(tmp_path / "server", offers={"H100": "cpu"}, models=None) as here:
        here.service.queue.heartbeat(WorkerRow("tests", "here", {"slots": 9, "processors": 4}, {"slots": 9}))
        found = Desk(here)
        found.file = found.keep_file()
        yield found
