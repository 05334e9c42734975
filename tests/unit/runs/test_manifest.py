"""A sealed folder is whole or not there, and no byte of it can change unseen."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import CheckpointError, DiskFullError, StorageError
from luthier.runs.manifest import MANIFEST, check_manifest, find_manifest, reserve_check, seal, write_durably

CONTENT = {"a.bin": b"weights", "inner/b.json": b"{}"}


def fill(folder: Path) -> None:
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A folder with nothing else in it."""
    (tmp_path / "there").mkdir()
    return tmp_path / "there"


def test_what_was_sealed_is_checked_and_told(there: Path) -> None:
    sealed = seal(there / "x", fill, {"step": 3, "rng": ["1", "2"], "loss": 0.1})
    told = check_manifest(there / "x")
    assert (told["step"], told["rng"], told["loss"]) == (3, ["1", "2"], 0.1)
    assert sorted(told["files"]) == sorted(CONTENT)
    assert told["files"]["a.bin"]["size"] == 7
    assert told["sha256"] == sealed.digest
    assert sealed.size_bytes == 9
    assert [path.name for path in there.iterdir()] == ["x"]


@given(place=st.floats(0, 1), bit=st.integers(0, 7), name=st.sampled_from([*CONTENT, MANIFEST]))
def test_any_flipped_bit_is_found(place: float, bit: int, name: str) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "x"
        seal(folder, fill, {"step": 3, "note": "what a fact says"})
        content = bytearray((folder / name).read_bytes())
        content[round(place * (len(content) - 1))] ^= 1 << bit
        (folder / name).write_bytes(content)
        assert find_manifest(folder) is None


def test_every_byte_of_a_manifest_matters(there: Path) -> None:
    seal(there / "x", fill, {"step": 10})
    path = there / "x" / MANIFEST
    whole = path.read_bytes()
    for place in range(len(whole)):
        for other in (whole[place] ^ 1, whole[place] ^ 0x2A, 0, 0x20):
            if other != whole[place]:
                path.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
                assert find_manifest(there / "x") is None, (place, other)
    path.write_bytes(whole)
    assert find_manifest(there / "x") is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "a.bin").unlink(), "`a.bin` is missing"),
        (lambda folder: (folder / "a.bin").write_bytes(b"weigh"), "`a.bin` has 5 bytes, and its manifest says 7"),
        (lambda folder: (folder / "a.bin").write_bytes(b"Weights"), "`a.bin` does not have the SHA-256"),
        (lambda folder: (folder / "c").write_bytes(b""), "`c` is not in its manifest"),
        (lambda folder: (folder / "c").symlink_to("inner"), "`c` is not in its manifest"),
        (lambda folder: (folder / MANIFEST).unlink(), "`manifest.json` is missing"),
        (lambda folder: (folder / MANIFEST).write_bytes(b"[]"), "`manifest.json` is damaged"),
    ],
)
def test_the_error_names_the_file_and_what_is_wrong(change: object, said: str, there: Path) -> None:
    seal(there / "x", fill, {})
    change(there / "x")  # type: ignore[operator]
    with pytest.raises(CheckpointError, match="x: " + said.replace("(", r"\(")) as caught:
        check_manifest(there / "x")
    assert caught.value.where == str(there / "x")
    assert "luthier resume" in caught.value.hint


def test_a_folder_that_is_not_there_is_broken(there: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json` is missing"):
        check_manifest(there / "nowhere")


def test_sealing_again_replaces_the_whole_folder(there: Path) -> None:
    seal(there / "x", fill, {"step": 1})
    (there / "x.tmp-dead").mkdir()
    seal(there / "x", lambda folder: (folder / "only").write_bytes(b"1") and None, {"step": 2})
    assert list(check_manifest(there / "x")["files"]) == ["only"]
    assert [path.name for path in there.iterdir()] == ["x"]


def test_a_full_disk_leaves_the_old_folder_and_no_draft(there: Path) -> None:
    seal(there / "x", fill, {"step": 1})

    def fill_the_disk(folder: Path) -> None:
        fill(folder)
        with Path("/dev/full").open("wb") as file:
            file.write(b"more")

    with pytest.raises(DiskFullError, match="the disk is full; what was there before is untouched") as caught:
        seal(there / "x", fill_the_disk, {"step": 2})
    assert caught.value.code == "disk_full"
    assert check_manifest(there / "x")["step"] == 1
    assert [path.name for path in there.iterdir()] == ["x"]


def test_a_full_disk_in_the_words_of_safetensors(there: Path) -> None:
    from safetensors import SafetensorError

    def write(folder: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(DiskFullError):
        seal(there / "x", write, {})


def test_other_errors_of_the_disk_and_of_the_writer(there: Path) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", "there")

    def broken(folder: Path) -> None:
        raise KeyError("a bug")

    with pytest.raises(StorageError, match="there: cannot be written: Permission denied"):
        seal(there / "x", refuse, {})
    with pytest.raises(KeyError):
        seal(there / "x", broken, {})
    assert list(there.iterdir()) == []


@pytest.mark.parametrize("facts", [{"loss": float("nan")}, {"inner": [float("inf")]}, {"files": 1}, {"sha256": ""}])
def test_facts_that_would_not_come_back_are_refused(facts: dict[str, object], there: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be kept as JSON|for itself"):
        seal(there / "x", fill, facts)
    assert list(there.iterdir()) == []


def test_room_is_asked_for_before_it_is_needed(there: Path) -> None:
    reserve_check(there / "not" / "yet", 1000)
    with pytest.raises(DiskFullError, match="are needed there, and") as caught:
        reserve_check(there, 1e18)
    assert "output.dir" in caught.value.hint


def test_a_single_file_is_replaced_whole(there: Path) -> None:
    write_durably(there / "in" / "a.json", b"1")
    write_durably(there / "in" / "a.json", b"22")
    assert [path.name for path in (there / "in").iterdir()] == ["a.json"]
    assert (there / "in" / "a.json").read_bytes() == b"22"


@pytest.mark.skipif(sys.platform != "linux", reason="names open files by /proc")
def test_everything_reaches_the_disk_before_the_rename(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, rename = os.fsync, Path.rename

    def note_sync(handle: int) -> None:
        done.append(Path(f"/proc/self/fd/{handle}").readlink().relative_to(there.resolve()).as_posix())
        sync(handle)

    def note_rename(self: Path, target: Path) -> Path:
        done.append("rename")
        return rename(self, target)

    monkeypatch.setattr("os.fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    seal(there / "x", fill, {})
    draft = done[0].partition("/")[0]
    assert draft.startswith("x.tmp-")
    assert done == [
        f"{draft}/a.bin",
        f"{draft}/inner/b.json",
        f"{draft}/inner",
        f"{draft}/manifest.json",
        draft,
        "rename",
        ".",
    ]
