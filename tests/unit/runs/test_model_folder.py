"""What a model folder must not hold, and how names lead into the models folder and never out of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import ModelError
from luthier.runs.model_folder import check_model_folder, check_name, find_in_models, list_in_models
from luthier.runs.resolve import find_resolved, practice_folder, resolve_model


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models folder with one model in it."""
    folder = tmp_path / "models"
    shutil.copytree(practice_folder(), folder / "maker" / "small-1.5B")
    monkeypatch.setenv("LUTHIER_MODELS", str(folder))
    return folder


def test_a_name_resolves_in_the_models_folder_first(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "maker" / "small-1.5B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = find_resolved("maker/small-1.5B", with_weights=True)
    assert found.folder == models / "maker" / "small-1.5B"
    assert found.name == "maker/small-1.5B"
    assert list_in_models(models) == ["maker/small-1.5B"]
    with pytest.raises(ModelError, match="has no revisions"):
        resolve_model("maker/small-1.5B", revision="main")


def test_a_name_never_leads_out(models: Path, tmp_path: Path) -> None:
    shutil.copytree(practice_folder(), tmp_path / "secret")
    (models / "maker" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="leads out of the models folder"):
        resolve_model("maker/link")
    (models / "maker" / "inner").symlink_to(models / "maker" / "small-1.5B")
    assert resolve_model("maker/inner").name == "inner"
    assert find_in_models("maker/..", models) is None
    assert find_in_models("maker/absent", models) is None
    assert find_in_models("maker/small-1.5B", None) is None


@pytest.mark.parametrize(
    "name",
    ["/etc", "../x", "./x", "x/..", "a/b/c", "~/model", "", "model", "ft:../x", "ft:a", "a b/c", "x/\x00", "x/y\n"],
)
def test_a_request_names_no_path(name: str) -> None:
    with pytest.raises(ModelError, match="not the name of a model"):
        check_name(name)


@pytest.mark.parametrize(
    "name", ["practice", "Qwen/Qwen3-0.6B", "ft:practice:ftjob-abc", "ft:Qwen/Qwen3-0.6B:suffix:ftjob-abc"]
)
def test_names_of_models_pass(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    "name",
    ["modeling_x.py", "extra.so", "pytorch_model.bin", "model.pt", "consolidated.pth", "state.PKL", "x.ckpt", "tf.h5"],
)
def test_a_folder_with_code_or_pickles_is_refused(models: Path, name: str) -> None:
    (models / "maker" / "small-1.5B" / name).write_bytes(b"")
    with pytest.raises(ModelError, match=f"small-1.5B: holds (code )?.{{0,2}}{name}"):
        resolve_model("maker/small-1.5B")


@pytest.mark.parametrize(
    ("file", "facts", "message"),
    [
        ("config.json", {"auto_map": {"AutoModel": "x.Y"}}, "asks to run code of its own"),
        ("tokenizer_config.json", {"inner": [{"auto_map": {"A": "b"}}]}, "asks to run code of its own"),
        ("generation_config.json", {"auto_map": {"A": "b"}}, "asks to run code of its own"),
        ("config.json", {"model_type": "qwen\nimport os"}, "no name of an architecture"),
        ("config.json", {"text_config": {"model_type": "a" * 65}}, "no name of an architecture"),
    ],
)
def test_a_configuration_that_wants_code_is_refused(
    models: Path, file: str, facts: dict[str, Any], message: str
) -> None:
    path = models / "maker" / "small-1.5B" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))
    with pytest.raises(ModelError, match=message):
        resolve_model("maker/small-1.5B")


def test_links_out_and_folders_without_weights_are_refused(models: Path, tmp_path: Path) -> None:
    folder = models / "maker" / "small-1.5B"
    (tmp_path / "outside.txt").write_text("secret")
    (folder / "merges.txt").symlink_to(tmp_path / "outside.txt")
    with pytest.raises(ModelError, match="is a link that leads out of it"):
        check_model_folder(folder, within=models)
    (folder / "merges.txt").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no .safetensors file"):
        check_model_folder(folder)
