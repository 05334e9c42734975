"""The index of results: what is registered is listed, found and forgotten; nothing outside it is touched."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from luthier.errors import RunError
from luthier.runs.models import find_model, list_children, list_models, register, remove_model
from luthier.runs.run import Run
from tests.unit.runs.made import NOON, build_spec, finish, make_run, write_rows


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = make_run(tmp_path / "runs", build_spec(write_rows(tmp_path / "rows.jsonl")))
    finish(made)
    return made


def test_a_run_is_found_by_its_id_and_by_its_ft_id(run: Run) -> None:
    entry = find_model(run.id)
    assert entry is not None
    assert (entry.name, entry.method, entry.final, entry.parent) == (
        f"ft:practice:{run.id}",
        "qlora",
        "final_lora_weights",
        None,
    )
    assert find_model(entry.name) == entry == register(run)
    assert entry.is_there


@pytest.mark.parametrize("name", ["", "..", "../../x", "ft:a:", "a/b", "ft:x:../y", "nobody", "a\0b"])
def test_a_name_that_is_no_id_is_not_found(name: str) -> None:
    assert find_model(name) is None


def test_the_newest_comes_first_and_unreadable_entries_are_left_out(run: Run, tmp_path: Path, own_home: Path) -> None:
    later = make_run(tmp_path / "runs", run.spec, now=NOON + timedelta(hours=1))
    (own_home / "models" / "broken.json").write_text("{")
    (own_home / "models" / "odd.json").write_text('{"id": "odd"}')
    assert [entry.id for entry in list_models()] == [later.id, run.id]
    assert list_models()[0].final is None


def test_removing_forgets_and_deletes_only_when_asked(run: Run) -> None:
    remove_model(run.model_id)
    assert (find_model(run.id), run.folder.is_dir()) == (None, True)
    register(run)
    remove_model(run.id, delete_files=True)
    assert (list_models(), run.folder.exists()) == ([], False)
    with pytest.raises(RunError, match="no run `"):
        remove_model(run.id)


def test_what_another_run_stands_on_is_not_deleted(run: Run, tmp_path: Path) -> None:
    child = make_run(tmp_path / "runs", build_spec(tmp_path / "rows.jsonl", run.model_id))
    entry = find_model(run.id)
    assert entry is not None
    assert [each.id for each in list_children(entry)] == [child.id]
    with pytest.raises(RunError, match=f"is the base of {child.id}"):
        remove_model(run.id, delete_files=True)
    assert run.folder.is_dir()
    remove_model(child.id, delete_files=True)
    remove_model(run.id, delete_files=True)
    assert not run.folder.exists()


def test_a_folder_that_is_no_run_any_more_is_never_deleted(run: Run) -> None:
    (run.folder / "finetune_config.yaml").unlink()
    remove_model(run.id, delete_files=True)
    assert run.folder.is_dir()


def test_an_id_that_no_file_can_have_is_refused(run: Run, tmp_path: Path) -> None:
    odd = run.folder.rename(tmp_path / "a name with spaces")
    with pytest.raises(RunError, match="cannot be the id of a run"):
        register(Run(odd))
