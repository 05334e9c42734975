"""A half-written cache is never used, and two builders at once both end with a whole one."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from luthier.data.cache import MANIFEST, build_once, cache_key, find_valid
from luthier.errors import StorageError


def fill(draft: Path) -> None:
    (draft / "tokens.u32").write_bytes(b"1234")


def test_a_cache_is_built_once(tmp_path: Path) -> None:
    calls: list[Path] = []

    def build(draft: Path) -> None:
        calls.append(draft)
        fill(draft)

    for _ in range(2):
        build_once(tmp_path / "key", build)
    assert len(calls) == 1
    assert (tmp_path / "key" / "tokens.u32").read_bytes() == b"1234"


@pytest.mark.parametrize("damage", ["no manifest", "short file", "missing file", "broken manifest"])
def test_a_damaged_cache_is_built_again(damage: str, tmp_path: Path) -> None:
    folder = build_once(tmp_path / "key", fill)
    if damage == "no manifest":
        (folder / MANIFEST).unlink()
    elif damage == "short file":
        (folder / "tokens.u32").write_bytes(b"12")
    elif damage == "missing file":
        (folder / "tokens.u32").unlink()
    else:
        (folder / MANIFEST).write_bytes(b'{"files": {"tok')
    assert find_valid(folder) is None
    build_once(folder, fill)
    assert find_valid(folder) == folder


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def build(draft: Path) -> None:
        fill(draft)
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        build_once(tmp_path / "tokens" / "key", build)
    assert list((tmp_path / "tokens").iterdir()) == []


def _build_in_step(folder: str, started: object, other: object) -> None:
    def build(draft: Path) -> None:
        fill(draft)
        started.set()  # type: ignore[attr-defined]
        other.wait(20)  # type: ignore[attr-defined]

    build_once(Path(folder), build)


def test_two_builders_at_once_both_find_a_whole_cache(tmp_path: Path) -> None:
    """Each waits inside its build until the other is inside too, so that both rename."""
    context = multiprocessing.get_context("fork")
    first, second = context.Event(), context.Event()
    folder = str(tmp_path / "tokens" / "key")
    pair = [
        context.Process(target=_build_in_step, args=(folder, first, second)),
        context.Process(target=_build_in_step, args=(folder, second, first)),
    ]
    for process in pair:
        process.start()
    for process in pair:
        process.join(30)
    assert [process.exitcode for process in pair] == [0, 0]
    assert find_valid(Path(folder))
    assert [path.name for path in Path(folder).parent.iterdir()] == ["key"]


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError) as caught:
        build_once(tmp_path / "file" / "key", fill)
    assert "LUTHIER_HOME" in caught.value.hint


def test_the_key_depends_on_every_fact() -> None:
    assert cache_key({"a": 1, "b": 2}) == cache_key({"b": 2, "a": 1})
    assert cache_key({"a": 1}) != cache_key({"a": 2})
