"""The real client of the hub against a hub of ours: one commit, the right bytes, a card, and no token anywhere."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier.adapters.merge import merge_adapter
from luthier.adapters.push import PushOptions, push_run
from luthier.cli.main import main
from luthier.errors import CallError, HubError, ModelError, ProofError
from luthier.runs.layout import MERGED_MODEL
from luthier.runs.resolve import practice_folder
from luthier.runs.run import Run
from tests.unit.adapters.runs import certified, finished_run, uncertified
from tests.unit.reports.made import comparison, looked_for

# The hub's client itself speaks to its network library in a way that this one would rather not hear any more.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
TOKEN = "hf_secret"
REPO = "org/name"
WITH = PushOptions(certified)


class Hub(ThreadingHTTPServer):
    """As much of the hub as a client needs that makes a place and commits files to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.tokens: set[str] = set()
        self.refuses: dict[str, int] = {}


class _Request(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        repo = self.server.repos.get(REPO)
        if repo is None:
            self._answer({"error": "Repository not found"}, 404)
            return
        self._answer({"id": REPO, "modelId": REPO, "private": repo["private"], "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        body = self._read()
        self.server.tokens.add(self.headers.get("Authorization", ""))
        path = self.path.split("?")[0]
        for part, status in self.server.refuses.items():
            if part in path:
                self._answer({"error": f"no, {TOKEN} may not"}, status)
                return
        if path == "/api/repos/create":
            asked = json.loads(body)
            place = f"{asked['organization']}/{asked['name']}"
            is_new = place not in self.server.repos
            self.server.repos.setdefault(place, {"private": asked.get("visibility") == "private"})
            self._answer({"url": f"{self.server.url}/{place}", "name": place}, 200 if is_new else 409)
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = [
                {"path": each["path"], "uploadMode": _mode(each["path"]), "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.server.url}/large/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        else:
            self._commit(body)

    def do_PUT(self) -> None:
        content = self._read()
        digest = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == digest
        self.server.large[digest] = content
        self._answer({})

    def _read(self) -> bytes:
        """The body, by its length or in the pieces that large files come in."""
        if length := self.headers.get("Content-Length"):
            return self.rfile.read(int(length))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _commit(self, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.server.commits.append(value["summary"])
            elif line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            else:
                self.server.files[value["path"]] = self.server.large[value["oid"]]
        url = f"{self.server.url}/{REPO}/commit/{'a' * 40}"
        self._answer({"success": True, "commitOid": "a" * 40, "commitUrl": url, "hookOutput": ""})

    def _answer(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/vnd.git-lfs+json" if "lfs" in self.path else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # Large files by the hub's older protocol; the newer one speaks to servers that ours is not.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return finished_run(tmp_path)


def test_the_adapter_is_there_byte_for_byte_in_one_commit(run: Run, hub: Hub) -> None:
    facts = push_run(run, REPO, WITH)
    final = run.final_weights
    assert final is not None
    assert set(hub.files) == set(facts.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert hub.files[name] == (final / name).read_bytes()
    assert hub.commits == [f"{run.id}, trained with Luthier"]
    assert (facts.commit, facts.url) == ("a" * 40, f"{hub.url}/{REPO}")
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert hub.repos[REPO]["private"] is False


def test_the_card_is_made_of_the_lineage(run: Run, hub: Hub) -> None:
    push_run(run, REPO, WITH)
    card = hub.files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "peft"
    for told in (run.id, "| train_loss | 0.25 |", "| steps | 5 |", run.lineage["data"]["hash"]):
        assert told in card
    assert "the card of the training" not in card
    assert TOKEN not in card


def test_a_merged_model_and_one_trained_in_full_are_models(run: Run, hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no merged model") as caught:
        push_run(run, REPO, PushOptions(certified, merged=True))
    assert "luthier merge" in caught.value.hint
    assert run.final_weights is not None
    merge_adapter(practice_folder(), [run.final_weights], run.folder / MERGED_MODEL)
    push_run(run, REPO, PushOptions(certified, merged=True))
    assert hub.files["model.safetensors"] == (run.folder / MERGED_MODEL / "model.safetensors").read_bytes()
    assert "library_name: transformers" in hub.files["README.md"].decode()
    full = finished_run(tmp_path / "full", kind="full")
    push_run(full, REPO, WITH)
    assert hub.files["model.safetensors"] == (practice_folder() / "model.safetensors").read_bytes()
    (run.folder / MERGED_MODEL / "config.json").unlink()
    with pytest.raises(ModelError, match="damaged"):
        push_run(run, REPO, PushOptions(certified, merged=True))


def test_private_is_private_or_nothing_is_pushed(run: Run, hub: Hub) -> None:
    push_run(run, REPO, PushOptions(certified, private=True))
    assert hub.repos[REPO]["private"] is True
    push_run(run, REPO, PushOptions(certified, private=True))
    hub.repos[REPO]["private"] = False
    count = len(hub.commits)
    with pytest.raises(HubError, match="anybody can read it"):
        push_run(run, REPO, PushOptions(certified, private=True))
    assert len(hub.commits) == count == 2


@pytest.mark.parametrize(
    ("part", "status", "hint"),
    [("create", 401, "token"), ("create", 403, "may not write"), ("commit", 409, "push again"), ("preupload", 404, "")],
)
def test_what_the_hub_says_is_told_without_the_token(run: Run, hub: Hub, part: str, status: int, hint: str) -> None:
    hub.refuses[f"/{part}"] = status
    with pytest.raises(HubError) as caught:
        push_run(run, REPO, WITH)
    assert f"({status})" in caught.value.message
    assert hint in caught.value.hint
    assert TOKEN not in caught.value.message + caught.value.hint
    assert hub.files == {}


def test_no_hub_no_token_no_name_no_certificate(run: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("name", "a/b/c", "../x", "org/..", "-a/b"):
        with pytest.raises(CallError, match="no name of a place"):
            push_run(run, name, WITH)
    with pytest.raises(ProofError):
        push_run(run, REPO, PushOptions(uncertified))
    assert hub.repos == {}
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CallError, match="no token"):
        push_run(run, REPO, WITH)
    assert "without_certificate" not in run.lineage


def test_a_base_that_nobody_else_has_is_a_note(run: Run, hub: Hub) -> None:
    assert "`practice` as the base" in push_run(run, REPO, WITH).notes[0]


def test_the_command(run: Run, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(run.folder), REPO]) == 1
    assert "certificate" in capsys.readouterr().err
    (run.folder / "comparison.json").write_text(json.dumps({**comparison(exact_match="better"), **looked_for()}))
    assert main(["push", str(run.folder), REPO, "--private", "--without-certificate"]) == 0
    card = hub.files["README.md"].decode()
    assert "| certificate | none |" in card
    assert "| exact match | 0.2 in the base, 0.9 here: better (difference +0.6 to +0.8) |" in card
    assert "| contamination | None of the 12 rows," in card
    assert re.search(rf"pushed: {hub.url}/{REPO}", capsys.readouterr().out)
    assert run.lineage["without_certificate"][0]["what"] == f"push to {REPO}"
    assert main(["push", run.id, REPO, "--without-certificate", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["commit"] == "a" * 40
