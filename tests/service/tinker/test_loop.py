"""The whole loop by the real SDK against a server of its own process, and by hand as clients before 0.25 speak."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.runs.resolve import practice_folder
from tests.service.here import service_here
from tests.service.process import Server, running, source_environment

pytestmark = pytest.mark.slow

_CLIENT = Path(__file__).with_name("client_tour.py")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        # Models leave the memory all the time, and have one place between them: nobody may notice.
        limits = ("live_snapshot_seconds=0.2", "live_settle_seconds=0.02", "live_idle_seconds=0.05", "live_open=1")
        flags = [part for limit in limits for part in ("--limit", limit)]
        with running(tmp_path_factory.mktemp("loop"), *flags) as found:
            yield found


@pytest.fixture(scope="module")
def found(server: Server) -> dict[str, Any]:
    """What the SDK found on its tour."""
    pytest.importorskip("tinker")
    done = subprocess.run(
        [sys.executable, str(_CLIENT), server.url, server.key],
        capture_output=True,
        text=True,
        env=source_environment({"TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def test_the_loss_falls_and_chunks_are_summed(found: dict[str, Any]) -> None:
    assert found["losses"][-1] < 0.8 * found["losses"][0]
    assert found["chunked_tokens"] == 1100
    assert found["custom"] > 0
    assert found["tokenizer"] == str(practice_folder())


def test_what_is_refused_uses_its_number_up(found: dict[str, Any]) -> None:
    assert found["refused"] == ["400", "400", "user", "422"]
    assert found["after_refusals"] < found["losses"][-1]


def test_a_saved_state_goes_on_as_if_never_left(found: dict[str, Any]) -> None:
    assert found["straight"] == found["loaded"] == found["twin"]
    assert found["fresh"][0] == found["straight"][0]
    assert found["fresh"][1] != found["straight"][1], "without the optimizer's state it goes another way"
    assert (found["taken"], found["overwritten"]) == ("user", True)


def test_samples_are_of_the_weights_that_were_saved(found: dict[str, Any]) -> None:
    named, unnamed, inflight = found["before"]
    assert named == unnamed == inflight
    assert named[0] is None
    assert np.allclose(named[1:], found["own"][:-1], atol=0.2)
    assert not np.allclose(named[1:], found["base"][1:], atol=0.2)
    assert found["after"][:2] == [named, unnamed]
    assert found["after"][2] != inflight, "an inflight sampler follows its model"
    first, again, other = found["samples"]
    assert first == again != other
    assert [len(each) for each in first] == [6, 6]


def test_a_saved_sampler_is_an_ordinary_adapter(server: Server, found: dict[str, Any]) -> None:
    run, kind, _ = found["path"].removeprefix("tinker://").split("/")
    (folder,) = (server.home / "live" / run.replace(":", "_")).glob(f"{kind}_*")
    lineage = json.loads((folder / "lineage.json").read_text())
    assert lineage["run"] == run
    assert lineage["data"]["hash"] is None
    assert lineage["steps"] > 6
    assert {each.name for each in folder.iterdir()} >= {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    }


def test_clients_before_protobuf_and_with_defaults_left_out(server: Server) -> None:
    with server.client() as client:

        def post(path: str, status: int = 200, **body: Any) -> Any:
            answer = client.post(f"/api/v1/{path}", json=body)
            assert answer.status_code == status, answer.text
            return answer.json()

        def result(taken: Any) -> Any:
            return post("retrieve_future", request_id=taken["request_id"])

        session = post("create_session", tags=[], sdk_version="0.11.0")["session_id"]
        asked = {"session_id": session, "model_seq_id": 0, "base_model": "practice", "lora_config": {"rank": 2}}
        first, again = post("create_model", **asked), post("create_model", **asked)
        assert first == again
        model = result(first)["model_id"]
        tensor = {"data": [6, 7], "dtype": "int64", "shape": [2]}
        datum = {
            "model_input": {"chunks": [{"tokens": [5, 6], "type": "encoded_text"}]},
            "loss_fn_inputs": {"target_tokens": tensor},
        }
        inner = {"data": [datum], "loss_fn": "cross_entropy"}
        late = post("optim_step", model_id=model, seq_id=2, adam_params={"learning_rate": 1e-3})
        taken = post("forward_backward", model_id=model, seq_id=1, forward_backward_input=inner)
        assert post("forward_backward", model_id=model, seq_id=1, forward_backward_input=inner) == taken
        told = result(taken)
        assert set(told["metrics"]) >= {"loss:sum"}
        assert len(told["loss_fn_outputs"][0]["logprobs"]["data"]) == 2
        assert result(late)["type"] == "optim_step"
        forward = post("forward", model_id=model, seq_id=3, forward_input=inner)
        assert result(forward)["metrics"]["loss:sum"] < told["metrics"]["loss:sum"]
        problem = post("optim_step", 422, model_id=model, seq_id=4, adam_params={"learning_rate": "fast"})
        assert "adam_params.learning_rate" in problem["error"]["message"]
        assert "metrics" in result(post("optim_step", model_id=model, seq_id=5, adam_params={}))
        assert post("retrieve_future", 410, request_id="future-unknown")["code"] == "gone"
        assert client.post("/api/v1/create_custom_loss", json={}).status_code == 400


def test_a_server_of_several_processes_says_that_it_cannot(tmp_path: Path) -> None:
    """At once: after a 503 clients would ask again for minutes."""
    with service_here(tmp_path, processes=2) as here:
        answer = here.ask("POST", "/api/v1/create_model", json={})
        assert answer.json()["code"] == "unsupported"
        answer = here.ask("POST", "/api/v1/get_info", json={"model_id": "m"})
        assert (answer.status_code, answer.json()["code"]) == (400, "unsupported")
        assert "--processes 1" in answer.json()["message"]
