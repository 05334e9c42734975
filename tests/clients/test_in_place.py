"""Whole jobs on a real server, by the OpenAI SDK that is installed here and by Synth's protocol request by request."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.serving import MODEL, Serving, serve, write_rows

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
FINAL = ("succeeded", "failed", "cancelled", "canceled", "completed")
SECONDS = 300


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One server for both."""
    with serve(tmp_path_factory.mktemp("serving")) as running:
        yield running


def test_the_openai_sdk(serving: Serving, tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "rows")
    script = [sys.executable, HERE / "openai_sdk.py", serving.url, serving.key, MODEL, folder, "--chat"]
    done = subprocess.run([str(each) for each in script], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["model"].startswith(f"ft:{MODEL}:orders-v1:ftjob-")


def test_the_protocol_of_synth(serving: Serving, tmp_path: Path) -> None:
    """What `synth-ai train --type sft` sends, in its order, and no more than it reads of the answers."""
    content = (write_rows(tmp_path / "rows") / "rows.jsonl").read_bytes()
    headers = {"authorization": f"Bearer {serving.key}", "user-agent": "python-requests/2.32"}
    with httpx2.Client(base_url=f"{serving.url}/api", headers=headers, timeout=60) as client:
        form = {"purpose": (None, "fine-tune"), "file": ("train.jsonl", content, "application/jsonl")}
        file = _read(client.post("/learning/files", files=form))["id"]
        assert _read(client.get(f"/learning/files/{file}"))["status"] in ("ready", "uploaded", "stored", "complete")
        made = _read(client.post("/learning/jobs", json=_payload(file)))
        job = made["job_id"]
        _read(client.post(f"/learning/jobs/{job}/start", json={}))
        deadline = time.monotonic() + SECONDS
        while (shown := _read(client.get(f"/learning/jobs/{job}")))["status"] not in FINAL:
            assert time.monotonic() < deadline, shown
            time.sleep(0.2)
        assert shown["status"] == "succeeded", shown
        assert f'"fine_tuned_model": "ft:{MODEL}:{job}"' in json.dumps(shown, indent=2)[:600]
        points = _read(client.get(f"/learning/jobs/{job}/metrics?name=train.loss"))["points"]
        assert [point["step"] for point in points] == [1, 2]


def _payload(file: str) -> dict[str, Any]:
    """For a full fine-tune with a share held out, as the shipped configurations have it."""
    return {
        "model": MODEL,
        "hyperparameters": {
            "n_epochs": 1,
            "per_device_batch": 2,
            "gradient_accumulation_steps": 4,
            "sequence_length": 512,
            "learning_rate": 5e-06,
            "warmup_ratio": 0.03,
            "train_kind": "fft",
            "evaluation_strategy": "steps",
            "eval_steps": 20,
            "save_best_model_at_end": True,
            "metric_for_best_model": "val.loss",
            "greater_is_better": False,
        },
        "training_type": "sft_offline",
        "metadata": {
            "effective_config": {
                "compute": {"gpu_type": "H100", "gpu_count": 1, "nodes": 1},
                "data": {"topology": {}},
                "training": {"mode": "sft_offline", "validation": {"enabled": True}},
            }
        },
        "training_file_id": file,
    }


def _read(answer: httpx2.Response) -> dict[str, Any]:
    assert answer.status_code in (200, 201), answer.text
    assert answer.headers["content-type"].startswith("application/json")
    return dict(answer.json())
