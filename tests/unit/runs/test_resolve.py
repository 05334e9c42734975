"""Every way to name a model leads to the right base and adapters, or to an error that says the way on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from luthier.errors import ModelError
from luthier.runs.resolve import AdapterRef, find_resolved, find_run, practice_folder, resolve_model, resolve_start
from luthier.runs.run import Run
from tests.unit.runs.made import build_spec, finish, make_run, write_rows


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


@pytest.fixture
def run(rows: Path, tmp_path: Path) -> Run:
    made = make_run(tmp_path / "runs", build_spec(rows))
    finish(made)
    return made


def model_folder(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


def test_practice_and_folders_are_models_as_they_stand(tmp_path: Path) -> None:
    assert find_resolved("practice").folder == practice_folder()
    folder = model_folder(tmp_path / "model")
    found = find_resolved(str(folder), with_weights=True)
    assert (found.folder, found.adapters, found.parent, found.revision) == (folder, (), None, None)


def test_a_run_by_any_of_its_names_is_its_base_and_its_adapter(run: Run) -> None:
    final = run.final_weights
    assert final is not None
    for name in (str(run.folder), run.id, run.model_id, f"ft:whatever:{run.id}", str(final)):
        found = find_resolved(name, with_weights=True)
        assert found.folder == practice_folder()
        assert [(each.path.resolve(), each.quantised) for each in found.adapters] == [(final.resolve(), True)]
        assert (found.parent, found.name) == (run.id, run.model_id)
        assert resolve_model(name) == practice_folder()


def test_adapters_over_adapters_come_in_order(run: Run, rows: Path, tmp_path: Path) -> None:
    second = make_run(tmp_path / "runs", build_spec(rows, run.model_id, method={"kind": "lora", "targets": ["q_proj"]}))
    finish(second)
    third = make_run(tmp_path / "runs", build_spec(rows, str(second.folder), method={"kind": "lora"}))
    finish(third)
    found = find_resolved(third.id, with_weights=True)
    assert [(ref.path.parent.name, ref.quantised) for ref in found.adapters] == [
        (run.id, True),
        (second.id, False),
        (third.id, False),
    ]
    assert found.folder == practice_folder()
    assert third.lineage["parents"] == [second.id, run.id]
    assert (second.lineage["parent"], third.lineage["parent"]) == (run.id, second.id)
    assert [each["quantised"] for each in third.lineage["base"]["adapters"]] == [True, False]


def test_a_full_run_is_a_model_of_its_own(rows: Path, tmp_path: Path) -> None:
    full = make_run(tmp_path / "runs", build_spec(rows, method={"kind": "full"}))
    final = finish(full)
    for name in (full.id, str(final), str(full.folder)):
        found = find_resolved(name, with_weights=True)
        assert (found.folder.resolve(), found.adapters, found.parent) == (final.resolve(), (), full.id)
    after = make_run(tmp_path / "runs", build_spec(rows, full.model_id))
    finish(after)
    assert find_resolved(after.id).folder.resolve() == final.resolve()
    assert after.lineage["parents"] == [full.id]


def test_what_a_model_started_from(run: Run, rows: Path, tmp_path: Path) -> None:
    second = make_run(tmp_path / "runs", build_spec(rows, run.model_id, method={"kind": "full"}))
    finish(second)
    found = [find_resolved(name, with_weights=True) for name in (second.id, run.id)]
    assert [each.id for each in map(find_run, found) if each] == [second.id, run.id]
    assert resolve_start(found[0]) == found[1]
    assert resolve_start(found[1]).folder == practice_folder()
    assert resolve_start(found[1]).adapters == ()
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(run.folder / "final_lora_weights", elsewhere)
    adapter = find_resolved(str(elsewhere))
    assert find_run(adapter) is None
    assert resolve_start(adapter).folder == practice_folder()
    base = find_resolved("practice")
    assert find_run(base) is None
    with pytest.raises(ModelError, match="practice is a base model"):
        resolve_start(base)


def test_how_the_base_was_quantised_is_told(rows: Path, tmp_path: Path) -> None:
    for double in (True, False):
        method = {"kind": "qlora", "targets": ["q_proj"], "double_quant": double}
        made = make_run(tmp_path / "runs", build_spec(rows, method=method))
        finish(made)
        assert [each.double_quant for each in find_resolved(made.id).adapters] == [double]


def test_a_checkpoint_is_an_adapter_of_its_run(run: Run) -> None:
    final = run.final_weights
    assert final is not None
    shutil.copytree(final, run.folder / "checkpoint_step_3")
    found = find_resolved(str(run.folder / "checkpoint_step_3"), with_weights=True)
    assert found.adapters == (AdapterRef(run.folder / "checkpoint_step_3", quantised=True),)
    assert found.parent == run.id


def test_an_adapter_from_elsewhere_names_its_own_base(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": str(base), "revision": None}))
    found = find_resolved(str(adapter))
    assert (found.folder, found.adapters, found.parent) == (base, (AdapterRef(adapter),), None)
    with pytest.raises(ModelError, match=r"no \.safetensors file"):
        find_resolved(str(adapter), with_weights=True)
    for named, said in ((str(adapter), "names the adapter itself"), ("", "names no base model"), (3, "names no base")):
        config.write_text(json.dumps({"base_model_name_or_path": named}))
        with pytest.raises(ModelError, match=said):
            find_resolved(str(adapter))


def test_runs_in_a_circle_end(run: Run) -> None:
    path = run.folder / "finetune_config.yaml"
    path.write_text(path.read_text().replace("base: practice", f"base: ft:practice:{run.id}"))
    with pytest.raises(ModelError, match="starts from its own result"):
        find_resolved(run.id)


@pytest.mark.parametrize(
    ("name", "said", "hint"),
    [
        ("ft:org/base:nobody", "no run on this machine has the id `ft:org/base:nobody`", "luthier models"),
        ("practise", "no model at practise", "did you mean `practice`?"),
        ("./nowhere", "no model at ./nowhere", "`practice`"),
        ("two words", "no model at two words", "a hub id"),
    ],
)
def test_what_leads_nowhere_says_so(name: str, said: str, hint: str) -> None:
    with pytest.raises(ModelError, match=re.escape(said)) as caught:
        find_resolved(name)
    assert hint in caught.value.hint


def test_an_unfinished_or_moved_run_says_so(rows: Path, tmp_path: Path) -> None:
    made = make_run(tmp_path / "runs", build_spec(rows))
    with pytest.raises(ModelError, match="has no final weights: it is stopped") as caught:
        find_resolved(made.id)
    assert "luthier resume" in caught.value.hint
    made.folder.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match="is gone"):
        find_resolved(made.model_id)


def test_damaged_weights_are_found_where_they_are_used(run: Run) -> None:
    final = run.final_weights
    assert final is not None
    (final / "adapter_model.safetensors").write_bytes(b"other")
    assert find_resolved(run.id).adapters
    with pytest.raises(ModelError, match="damaged"):
        find_resolved(run.id, with_weights=True)


def test_another_base_under_an_adapter_is_found(rows: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in practice_folder().iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    made = make_run(tmp_path / "runs", build_spec(rows, str(base)))
    finish(made)
    assert find_resolved(made.id, with_weights=True).folder == base
    (base / "generation_config.json").write_bytes(b"{}")
    with pytest.raises(ModelError, match="no longer the model that it was trained on"):
        find_resolved(made.id, with_weights=True)


@pytest.mark.parametrize(
    "config",
    [
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"text_config": {"auto_map": {"AutoModel": "evil.Model"}}},
        {"model_type": "llama\nimport os"},
        {"model_type": "../x"},
        {"model_type": 3},
        {"vision_config": {"model_type": "a;b"}},
    ],
)
def test_a_model_that_wants_code_run_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", **config)
    with pytest.raises(ModelError, match=r"auto_map|model_type"):
        find_resolved(str(folder))


@pytest.mark.parametrize("kind", ["qwen3_moe", "openai-gpt", "phi3", "EvollaModel"])
def test_real_names_of_architectures_pass(kind: str, tmp_path: Path) -> None:
    assert find_resolved(str(model_folder(tmp_path / "model", model_type=kind))).folder == tmp_path / "model"


class Hub:
    """What the hub's client does, as far as it is asked: a cache of snapshots that downloads fill."""

    def __init__(self, folder: Path, files: dict[str, str]) -> None:
        self.snapshot = folder / "snapshots" / ("c" * 40)
        self.files = files
        self.calls: list[dict[str, Any]] = []

    def snapshot_download(self, **call: Any) -> str:
        import fnmatch

        self.calls.append(call)
        if call.get("local_files_only"):
            if not self.snapshot.is_dir():
                raise FileNotFoundError("not in the cache")
            return str(self.snapshot)
        self.snapshot.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            is_wanted = any(fnmatch.fnmatch(name, pattern) for pattern in call["allow_patterns"])
            if is_wanted and not any(fnmatch.fnmatch(name, pattern) for pattern in call["ignore_patterns"]):
                (self.snapshot / name).write_text(content)
        return str(self.snapshot)


INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
HUB_FILES = {
    "config.json": '{"model_type": "llama"}',
    "tokenizer.json": "{}",
    "model.safetensors.index.json": INDEX,
    "model-1.safetensors": "1",
    "model-2.safetensors": "2",
    "consolidated.safetensors": "both",
    "original/params.json": "{}",
    "pytorch_model.bin": "never",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub", dict(HUB_FILES))
    monkeypatch.setattr(
        "luthier.runs.resolve.import_extra", lambda *_: SimpleNamespace(snapshot_download=made.snapshot_download)
    )
    return made


def test_a_hub_id_fetches_texts_and_then_weights_only_when_asked(hub: Hub) -> None:
    found = find_resolved("org/name", "main")
    assert (found.folder, found.revision, found.name) == (hub.snapshot, "c" * 40, "org/name")
    assert sorted(path.name for path in hub.snapshot.iterdir()) == [
        "config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    find_resolved("org/name", "main", with_weights=True)
    assert {"model-1.safetensors", "model-2.safetensors"} <= {path.name for path in hub.snapshot.iterdir()}
    assert "consolidated.safetensors" not in [path.name for path in hub.snapshot.iterdir()]
    assert len(hub.calls) == 4
    find_resolved("org/name", "main", with_weights=True)
    assert len(hub.calls) == 5
    assert {call["revision"] for call in hub.calls} == {"main"}
    (hub.snapshot / "model-2.safetensors").unlink()
    find_resolved("org/name", "main", with_weights=True)
    assert (hub.snapshot / "model-2.safetensors").exists()


def test_an_adapter_on_the_hub_stands_over_its_base(hub: Hub) -> None:
    hub.files = {"adapter_config.json": '{"base_model_name_or_path": "practice"}', "adapter_model.safetensors": "x"}
    found = find_resolved("org/adapter", with_weights=True)
    assert (found.folder, found.adapters) == (practice_folder(), (AdapterRef(hub.snapshot),))


def test_what_the_hub_says_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> str:
        raise RuntimeError("401 Client Error\nmore lines")

    monkeypatch.setattr("luthier.runs.resolve.import_extra", lambda *_: SimpleNamespace(snapshot_download=refuse))
    with pytest.raises(
        ModelError, match=r"org/name: not on this machine, and the hub did not give it: 401 Client Error$"
    ):
        find_resolved("org/name")
