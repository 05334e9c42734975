"""Models that a server gives from folders of their own: their names, where they lead, and what may lie in them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from luthier.cli.commands.serve import _name_folders, _write_offered
from luthier.errors import CallError, ModelError
from luthier.runs.model_folder import MODELS_VARIABLE, find_in_models, list_in_models
from luthier.runs.resolve import find_resolved, practice_folder
from luthier.server.base_models import list_base_models, list_bases
from luthier.server.settings import Settings, read_settings


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """Two models that lie apart."""
    folders = tmp_path / "here" / "a" / "one", tmp_path / "there" / "b" / "two"
    for folder in folders:
        shutil.copytree(practice_folder(), folder)
    return folders


def settings_for(home: Path, *given: Path) -> Settings:
    folders = _name_folders(given, None)
    settings = Settings(
        home, "sqlite://", models=_write_offered(home, folders), allowed_models=tuple(folders), folders=folders
    )
    return read_settings(settings.as_json())


def test_each_folder_is_given_by_its_path_and_by_its_last_two_parts(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tmp_path / "home", *models)
    names = sorted([str(models[0]), str(models[1]), "a/one", "b/two"])
    assert list_bases(settings) == names
    found = list_base_models(settings)
    assert [each.name for each in found] == names
    assert all(each.context for each in found)
    assert list_in_models(settings.models) == ["a/one", "b/two"]
    monkeypatch.setenv(MODELS_VARIABLE, str(settings.models))
    assert find_resolved("b/two").folder == models[1]
    assert find_resolved(str(models[0])).folder == models[0]


def test_nothing_else_is_given(models: tuple[Path, Path], tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "home", models[0])
    for name in (str(models[1]), "b/two", "practice", str(tmp_path), "../b/two", "/etc"):
        assert not settings.allows(name)
    assert find_in_models("b/two", settings.models) is None


def test_two_folders_of_one_name_are_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "a" / "one"
    shutil.copytree(practice_folder(), other)
    with pytest.raises(CallError, match="`a/one` already"):
        _name_folders((models[0], other), None)
    assert _name_folders((models[0], models[0]), None) == {str(models[0]): str(models[0]), "a/one": str(models[0])}
    with pytest.raises(CallError, match="--models a folder of many"):
        _name_folders((models[0],), tmp_path)


def test_a_path_given_from_here_is_offered_whole(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models[0].parent)
    assert str(models[0]) in _name_folders((Path("one"),), None)


def test_links_may_lead_as_far_as_those_of_a_hubs_cache_and_no_further(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tmp_path / "home", models[0])
    monkeypatch.setenv(MODELS_VARIABLE, str(settings.models))
    weights = models[0] / "model.safetensors"
    blobs = models[0].parents[1] / "blobs"
    blobs.mkdir()
    weights.rename(blobs / "weights")
    weights.symlink_to(blobs / "weights")
    assert find_resolved("a/one").folder == models[0]
    weights.unlink()
    weights.symlink_to(models[1] / "model.safetensors")
    with pytest.raises(ModelError, match="leads out of it"):
        find_resolved("a/one")
