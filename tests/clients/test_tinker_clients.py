"""The published Tinker SDKs, their command line and the cookbook, unmodified, against `luthier serve`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from tests.clients.environments import COOKBOOK, FOLDER_VARIABLE, TINKER_VERSIONS, find_packages, make_environment
from tests.clients.test_clients import HERE, run, told
from tests.service.tinker.sdk import Served, serve_practice

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get(FOLDER_VARIABLE), reason="installs packages; run: make test-clients"),
]

# Tables are as wide as their ids, and nothing is fetched.
VARIABLES = {"COLUMNS": "240", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all clients, as exact as it can be; the SDK reads the tokenizer from the folder of its model."""
    with serve_practice(tmp_path_factory.mktemp("served"), "--precision", "fp32") as running:
        yield running


def ask(version: str, served: Served, place: Path, *command: Any) -> subprocess.CompletedProcess[str]:
    """A command of a client's environment, which finds the server by the variables of the SDK."""
    commands = make_environment(version)
    program = [commands / str(command[0]), *command[1:]]
    return run(program, place / "client", TINKER_BASE_URL=served.url, TINKER_API_KEY=served.key, **VARIABLES)


# The newest first: what it alone can save is then listed to the older ones.
@pytest.mark.parametrize("version", TINKER_VERSIONS)
def test_the_tinker_sdk(version: str, served: Served, tmp_path: Path) -> None:
    script = ["python", HERE / "tinker_sdk.py", served.url, served.key, served.model]
    said = told(ask(f"tinker-{version}", served, tmp_path, *script))
    assert said["sdk"] == version
    assert said["losses"][-1] < said["losses"][0]
    assert said["custom_loss"] is not None
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(said["downloaded"])


MAKE_A_RUN = """
import json, sys, tinker
client = tinker.ServiceClient().create_lora_training_client(sys.argv[1], rank=4)
client = client.result() if hasattr(client, "result") else client
paths = [client.save_state("kept").result().path, client.save_weights_for_sampler("kept").result().path]
if hasattr(tinker, "RestClient") and hasattr(client, "save_weights_external"):
    paths.append(client.save_weights_external("kept").result().path)
print(json.dumps({"run": client.model_id, "paths": paths}))
"""


@pytest.mark.parametrize("version", ["0.38.0", "0.24.1", "0.11.0"])
def test_the_command_line(version: str, served: Served, tmp_path: Path) -> None:
    environment = f"tinker-{version}"
    made = told(ask(environment, served, tmp_path, "python", "-c", MAKE_A_RUN, served.model))

    def tinker(*words: str) -> str:
        done = ask(environment, served, tmp_path, "tinker", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert made["run"] in tinker("run", "list")
    assert made["run"] in json.dumps(json.loads(tinker("--format", "json", "run", "list")))
    checkpoints = tinker("--format", "json", "checkpoint", "list", "--run-id", made["run"])
    assert all(path in checkpoints for path in made["paths"]), checkpoints
    assert "kept" in tinker("checkpoint", "list")
    assert made["run"] in tinker("--format", "json", "run", "info", made["run"])
    tinker("checkpoint", "download", made["paths"][-1], "--output", str(tmp_path))
    assert [each.name for each in tmp_path.rglob("adapter_config.json")], "no adapter was downloaded"
    if version == "0.38.0":
        assert served.model in tinker("--format", "json", "model", "list")
        assert served.key not in tinker("auth", "status")


def cook(served: Served, place: Path, recipe: str, *options: str) -> list[dict[str, Any]]:
    """A recipe of the cookbook, run whole; the rows of its metrics."""
    log = place / "log"
    words = [f"model_name={served.model}", "renderer_name=role_colon", "lora_rank=8", "eval_every=0", f"log_path={log}"]
    done = ask(COOKBOOK, served, place, "python", "-m", f"tinker_cookbook.recipes.{recipe}.train", *words, *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return read_rows(log / "metrics.jsonl")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_the_cookbook_learns_chats_and_resumes(served: Served, tmp_path: Path) -> None:
    rows = find_packages(make_environment(COOKBOOK)) / "tinker_cookbook" / "example_data" / "conversations.jsonl"
    options = [f"dataset={rows}", "batch_size=16", "num_epochs=2", "max_length=512", "save_every=5"]
    options.append("learning_rate=2e-3")
    cook(served, tmp_path, "chat_sl", *options, "max_steps=7", "behavior_if_log_dir_exists=delete")
    # As if it had been killed after its checkpoint at step 5: of the one at its end it knows nothing.
    saved = tmp_path / "log" / "checkpoints.jsonl"
    saved.write_text("".join(f"{json.dumps(row)}\n" for row in read_rows(saved) if row["name"] != "final"), "utf-8")
    told = cook(served, tmp_path, "chat_sl", *options, "max_steps=16", "behavior_if_log_dir_exists=resume")
    measured = [row for row in told if "train_mean_nll" in row]
    assert [row["step"] for row in measured] == [*range(7), *range(5, 16)], measured
    losses = {row["step"]: row["train_mean_nll"] for row in measured}
    # The same rows, seen for the first and for the second time.
    assert mean(losses[step] for step in range(8, 16)) < mean(losses[step] for step in range(8)) - 0.2, losses
    assert read_rows(saved)[-1]["name"] == "final"


def test_the_cookbook_is_rewarded_for_sums(served: Served, tmp_path: Path) -> None:
    """Sampled at temperature 1, the practice model gets about half of the sums right, so there is room to rise."""
    options = ["env=arithmetic", "group_size=8", "groups_per_batch=16", "max_tokens=8", "learning_rate=2e-3"]
    options += ["max_steps=10", "save_every=5", "behavior_if_log_dir_exists=delete"]
    told = cook(served, tmp_path, "math_rl", *options)
    rewards = [row["env/all/correct"] for row in told if "env/all/correct" in row]
    assert len(rewards) == 10, told
    assert mean(rewards[-3:]) > mean(rewards[:3]) + 0.08, rewards
