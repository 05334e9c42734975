"""What a client trained live is an ordinary model: listed, asked, certified, merged, trained on, deleted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.adapters.verify import MergeOptions, is_outside, merge_outside, verify_outside
from luthier.live.store import LiveStore
from luthier.runs.layout import LINEAGE
from luthier.runs.lineage import base_facts
from luthier.runs.resolve import find_resolved
from tests.service.here import Here, service_here
from tests.service.tinker.left_behind import LeftBehind, write_practice_adapter

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Here, str, str]]:
    """A service, and the `ft:` id and path of weights in it."""
    with service_here(tmp_path_factory.mktemp("models") / "home") as here:
        left = LeftBehind(LiveStore(here.service.database, here.service.home))
        path = left.a_checkpoint(left.a_model())
        yield here, left.find(path).ft_id, path


def ask_model(here: Here, model: str, *, other: bool = False) -> tuple[int, str]:
    """The status, and what it says."""
    body = {"model": model, "messages": [{"role": "user", "content": "2+2"}], "max_tokens": 4, "temperature": 0}
    done = here.ask("POST", "/v1/chat/completions", other=other, json=body)
    return done.status_code, done.json()["choices"][0]["message"]["content"] if done.status_code == 200 else done.text


def test_it_is_listed_and_found_by_its_own_project(shared: tuple[Here, str, str]) -> None:
    here, ft_id, path = shared
    assert ft_id.startswith("ft:practice:ckpt-")
    listed = {each["id"]: each for each in here.ask("GET", "/v1/models").json()["data"]}
    assert listed[ft_id]["owned_by"] == "default"
    assert here.ask("GET", f"/v1/models/{ft_id}").json() == listed[ft_id]
    assert here.ask("GET", f"/v1/models/{path}").json() == listed[ft_id]
    assert ft_id not in here.ask("GET", "/v1/models", other=True).text
    assert here.ask("GET", f"/v1/models/{ft_id}", other=True).status_code == 404


def test_it_answers_under_its_id_and_under_its_path(shared: tuple[Here, str, str]) -> None:
    here, ft_id, path = shared
    base, by_id, by_path = (ask_model(here, name) for name in ("practice", ft_id, path))
    assert (base[0], by_id[0]) == (200, 200)
    assert by_id == by_path != base
    assert ask_model(here, ft_id, other=True)[0] == ask_model(here, path, other=True)[0] == 404


def test_a_state_is_no_model_to_ask(shared: tuple[Here, str, str]) -> None:
    here, _, _ = shared
    left = LeftBehind(LiveStore(here.service.database, here.service.home))
    path = left.a_checkpoint(left.a_model(), "weights", "state")
    status, said = ask_model(here, path)
    assert status == 400
    assert "save_weights_for_sampler" in said


def test_a_job_may_start_from_it(shared: tuple[Here, str, str]) -> None:
    here, ft_id, _ = shared
    spec = {"model": {"base": ft_id}, "data": {"train": here.send()}}
    assert here.ask("POST", "/luthier/v1/jobs", json={"spec": spec}).status_code == 201
    spec["data"] = {"train": here.send(other=True)}
    assert here.ask("POST", "/luthier/v1/jobs", other=True, json={"spec": spec}).status_code == 404


def test_deleting_the_model_deletes_the_checkpoint(own: Here) -> None:
    left = LeftBehind(LiveStore(own.service.database, own.service.home))
    ft_id = left.find(left.a_checkpoint(left.a_model())).ft_id
    assert own.ask("DELETE", f"/v1/models/{ft_id}", other=True).status_code == 404
    assert own.ask("DELETE", f"/v1/models/{ft_id}").json()["deleted"] is True
    assert own.ask("GET", f"/v1/models/{ft_id}").status_code == 404
    assert own.ask("GET", "/api/v1/checkpoints").json()["checkpoints"] == []


@pytest.fixture
def adapter(own_home: Path) -> Path:
    """An adapter as the live service leaves it, in this machine's own home."""
    folder = own_home / "live" / "session-a_train_0" / "sampler_weights_3"
    folder.mkdir(parents=True)
    write_practice_adapter(folder)
    lineage = {"model": "ft:practice:ckpt-abc", "base": base_facts(find_resolved("practice"))}
    (folder / LINEAGE).write_text(json.dumps(lineage))
    return folder


def test_its_id_is_known_on_the_servers_machine(adapter: Path) -> None:
    found = find_resolved("ft:practice:ckpt-abc")
    assert [each.path for each in found.adapters] == [adapter]
    assert is_outside("ft:practice:ckpt-abc")
    assert not is_outside("ft:practice:ckpt-other")


def test_it_is_certified_by_what_lies_on_disk(adapter: Path) -> None:
    certificate, path = verify_outside("ft:practice:ckpt-abc")
    assert certificate.is_valid, certificate.broken
    assert json.loads(path.read_text())["valid"] is True
    assert path.parent == adapter.parent


def test_another_base_or_a_broken_tensor_is_found(adapter: Path) -> None:
    lineage = json.loads((adapter / LINEAGE).read_text())
    lineage["base"] = {**lineage["base"], "hash": "0", "files": {**lineage["base"]["files"], "config.json": "0"}}
    (adapter / LINEAGE).write_text(json.dumps(lineage))
    certificate, _ = verify_outside(str(adapter))
    assert [each.claim for each in certificate.broken] == ["the base is the one that the run was trained on"]
    assert "config.json" in certificate.broken[0].found


def test_it_is_merged_by_its_id(adapter: Path, tmp_path: Path) -> None:
    merged = merge_outside("ft:practice:ckpt-abc", tmp_path / "merged", MergeOptions(dtype="fp32"))
    assert merged.certificate is not None
    assert merged.certificate.is_valid
