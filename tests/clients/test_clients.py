"""Published clients, unmodified, run whole jobs against `luthier serve`; `make test-clients` installs and runs them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.environments import FOLDER_VARIABLE, find_packages, make_environment
from tests.serving import MODEL, OTHER_MODEL, ROOT, Serving, serve, write_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get(FOLDER_VARIABLE), reason="installs packages; run: make test-clients"),
]

HERE = Path(__file__).parent
SEED = ROOT / "tests" / "data" / "synth_seed_001.toml"
ALGORITHM = '[algorithm]\ntype = "offline"\nmethod = "sft"\nvariety = "fft"\n\n'
SYNTH = ["0.2.10", "0.2.9.dev7"]
SECONDS = 400


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One server for all clients."""
    with serve(tmp_path_factory.mktemp("serving")) as running:
        yield running


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """The folder with rows."""
    return write_rows(tmp_path / "rows")


def run(command: list[Any], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A client in a folder of its own, with no more of this process's environment than it needs."""
    folder.mkdir(exist_ok=True)
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8", **variables}
    return subprocess.run(
        [str(each) for each in command], cwd=folder, env=environment, input="1\n", capture_output=True, text=True,
        timeout=SECONDS,
    )  # fmt: skip


def told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What a script of ours said at its end."""
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("version", ["1", "2", "3"])
def test_the_openai_sdk(version: str, serving: Serving, rows: Path, tmp_path: Path) -> None:
    python = make_environment(f"openai-{version}") / "python"
    script = [python, HERE / "openai_sdk.py", serving.url, serving.key, MODEL, rows, "--chat"]
    said = told(run(script, tmp_path / "client"))
    assert said["sdk"].startswith(f"{version}.")
    assert said["model"].startswith(f"ft:{MODEL}:orders-v1:")


@pytest.mark.parametrize("version", SYNTH)
def test_synth_classes(version: str, serving: Serving, rows: Path, tmp_path: Path) -> None:
    python = make_environment(f"synth-{version}") / "python"
    script = [python, HERE / "synth_classes.py", serving.url, serving.key, MODEL, rows, "--chat"]
    assert told(run(script, tmp_path / "client"))["model"].startswith(f"ft:{MODEL}:")


def write_job(folder: Path, version: str, *, change: tuple[str, str] = ("", "")) -> Path:
    """The TOML of seed 001: byte for byte where the client takes it so, else below the table that it asks for."""
    folder.mkdir(exist_ok=True)
    job = folder / "crafter_fft_4b.toml"
    text = SEED.read_text("utf-8").replace(*change)
    job.write_text(text if version == "0.2.9.dev7" else ALGORITHM + text, "utf-8")
    return job


def train(version: str, serving: Serving, job: Path, rows: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """`synth-ai train --type sft --config JOB`."""
    folder = job.parent
    (folder / ".env").write_text(f"SYNTH_API_KEY={serving.key}\n")
    command = [
        *(make_environment(f"synth-{version}") / "synth-ai", "train", "--type", "sft", "--config", job),
        *("--dataset", rows / "rows.jsonl", "--env-file", folder / ".env", "--poll-interval", "0.5", *more),
    ]
    return run(command, folder, BACKEND_BASE_URL=serving.url)


@pytest.mark.parametrize("version", SYNTH)
def test_synth_train(version: str, serving: Serving, rows: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "client", version)
    said = train(version, serving, job, rows).stdout
    assert "Final status: succeeded" in said, said
    assert f'"fine_tuned_model": "ft:{OTHER_MODEL}:ftjob-' in said, said


def test_synth_train_says_what_is_missing(serving: Serving, rows: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "client", "0.2.10", change=('gpu_type = "H100"', ""))
    done = train("0.2.10", serving, job, rows)
    assert done.returncode == 1
    assert "missing_gpu_type" in done.stdout + done.stderr, done.stdout


def test_synth_train_says_what_the_server_lacks(serving: Serving, rows: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "client", "0.2.10", change=('gpu_type = "H100"', 'gpu_type = "B300"'))
    said = train("0.2.10", serving, job, rows).stdout
    assert "B300" in said, said
    assert "H100" in said, said


def test_synth_train_says_which_rows_are_bad(serving: Serving, rows: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "client", "0.2.10")
    bad = [{"messages": [{"role": "robot", "content": "hi"}, {"role": "assistant", "content": "ho"}]}] * 3
    (rows / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in bad))
    done = train("0.2.10", serving, job, rows)
    assert done.returncode == 1
    assert "role `robot`" in done.stdout, done.stdout


def test_the_dry_run_of_dev7_prints_the_payload(serving: Serving, rows: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "client", "0.2.9.dev7")
    done = train("0.2.9.dev7", serving, job, rows, "--dry-run")
    assert '"use_qlora": true' in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("version", SYNTH)
def test_the_legacy_script(version: str, serving: Serving, rows: Path, tmp_path: Path) -> None:
    commands = make_environment(f"synth-{version}")
    script = find_packages(commands) / "examples" / "warming_up_to_rl" / "run_fft_and_save.py"
    job = write_job(tmp_path / "client", version)
    command = [commands / "python", script, "--toml", job, "--data", rows / "rows.jsonl", "--poll-seconds", "300"]
    done = run(command, job.parent, BACKEND_BASE_URL=f"{serving.url}/api", SYNTH_API_KEY=serving.key)
    assert done.returncode == 0, done.stdout + done.stderr
    saved = (script.parent / "ft_model_id.txt").read_text().splitlines()[-1]
    assert saved.startswith(f"ft:{OTHER_MODEL}:ftjob-")
    assert f"ft_model={saved}" in done.stdout
