"""The SDK's own REST client and command line against `luthier serve`: runs are listed, weights shared and fetched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from luthier.runs.resolve import practice_folder
from tests.service.process import Server, running
from tests.service.tinker.left_behind import LeftBehind

pytest.importorskip("tinker")
pytestmark = pytest.mark.slow

PATIENCE_SECONDS = 60


@dataclass
class Place:
    """A server that offers one folder, a run with three checkpoints on it, and the SDK's REST client."""

    server: Server
    folder: Path
    run: str
    paths: dict[str, str]

    def ask(self, script: str) -> Any:
        """What a script in a process of its own leaves in `told`; the SDK never closes its connections.

        It leaves without the interpreter's own end, in which the threads of the SDK's transport may abort.
        """
        lines = ["import json, os, sys, tinker", "client, run, paths = tinker.RestClient(), *json.loads(sys.argv[1])"]
        asked = json.dumps([self.run, self.paths])
        code = "\n".join([*lines, script, "print(json.dumps(told), flush=True)", "os._exit(0)"])
        return json.loads(self._run("-c", code, asked))

    def _run(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, **self.environment, "COLUMNS": "400"},
            timeout=PATIENCE_SECONDS,
            cwd=self.folder.parent,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    @property
    def environment(self) -> dict[str, str]:
        """What points the SDK here."""
        return {"TINKER_BASE_URL": self.server.url, "TINKER_API_KEY": self.server.key, "TINKER_TELEMETRY": "0"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Read by every test here, changed by none."""
    root = tmp_path_factory.mktemp("sdk")
    folder = root / "models" / "tiny" / "practice"
    shutil.copytree(practice_folder(), folder)
    with running(root, "--model", str(folder)) as server:
        left = LeftBehind.at(server.home)
        model = left.a_model(base=str(folder), user_metadata={"who": "me"})
        kinds = ("weights", "sampler_weights", "external_weights")
        paths = {kind: left.a_checkpoint(model, kind, "000001") for kind in kinds}
        left.store.database.close()
        yield Place(server, folder, model.id, paths)


def test_the_rest_client_reads_runs_and_checkpoints(place: Place) -> None:
    told = place.ask(READS)
    assert place.server.key.startswith("tml-")
    assert {str(place.folder), "tiny/practice"} <= set(told["models"])
    assert told["runs"] == [[place.run], 1]
    assert told["run"] == [str(place.folder), 8, {"who": "me"}, place.paths["weights"]]
    assert set(told["checkpoints"]) == set(place.paths.values())
    assert told["some"] == 2
    assert told["info"] == [str(place.folder), True]
    assert told["session"] == [place.run]
    assert place.run.partition(":")[0] in told["sessions"]


READS = """
runs = client.list_training_runs().result()
one = client.get_training_run_by_tinker_path(paths["weights"]).result()
info = client.get_weights_info_by_tinker_path(paths["sampler_weights"]).result()
told = {
    "models": [each.model_name for each in client.get_server_capabilities().result().supported_models],
    "runs": [[each.training_run_id for each in runs.training_runs], runs.cursor.total_count],
    "run": [one.base_model, one.lora_rank, one.user_metadata, one.last_checkpoint.tinker_path],
    "checkpoints": [each.tinker_path for each in client.list_checkpoints(run).result().checkpoints],
    "some": len(client.list_user_checkpoints(limit=2).result().checkpoints),
    "info": [info.base_model, info.train_unembed],
    "session": client.get_session(run.partition(":")[0]).result().training_run_ids,
    "sessions": client.list_sessions().result().sessions,
}
"""


def test_the_rest_client_changes_checkpoints(place: Place) -> None:
    told = place.ask(CHANGES)
    assert told["public"] == [True, False]
    assert told["expires"] == [True, False]
    assert "there is no checkpoint" in told["unknown"]


CHANGES = """
path = paths["sampler_weights"]
def found():
    return next(each for each in client.list_checkpoints(run).result().checkpoints if each.tinker_path == path)
told = {"public": [], "expires": []}
for change in (client.publish_checkpoint_from_tinker_path, client.unpublish_checkpoint_from_tinker_path):
    change(path).result()
    told["public"].append(found().public)
for seconds in (3600, None):
    client.set_checkpoint_ttl_from_tinker_path(path, seconds).result()
    told["expires"].append(found().expires_at is not None)
try:
    client.delete_checkpoint_from_tinker_path(path.replace("000001", "none")).result()
except tinker.NotFoundError as error:
    told["unknown"] = str(error)
"""


def test_the_command_line_lists_and_downloads(place: Place, tmp_path: Path) -> None:
    told = place.ask(COMMANDS.replace("PLACE", str(tmp_path)))
    assert "Tinker accessible: yes" in told["auth status"]
    assert place.run in told["run list"]
    runs = json.loads(told["--format json run list"])
    assert [each["training_run_id"] for each in runs["runs"]] == [place.run]
    assert place.paths["weights"] in told["checkpoint list"]
    assert str(place.folder) in told["model list"]
    [folder] = {each.parent for each in tmp_path.rglob("adapter_model.safetensors")}
    source = next((place.server.home / "live").glob("*/external_weights_*"))
    assert {each.name: each.read_bytes() for each in folder.iterdir()} == {
        each.name: each.read_bytes() for each in source.iterdir()
    }


COMMANDS = """
from click.testing import CliRunner
from tinker.cli.__main__ import main_cli
told = {}
for words in (
    "auth status", "run list", "--format json run list", "checkpoint list", "model list",
    "checkpoint download " + paths["external_weights"] + " --output PLACE",
):
    done = CliRunner().invoke(main_cli, words.split())
    assert done.exit_code == 0, (words, done.output, done.exception)
    told[words] = done.stdout
"""
