"""Files: one content once on the disk, gone with its last file; nothing half, nothing outside the home."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import exc

from luthier.errors import ConflictError, DiskFullError, LuthierError, NotFoundError, TooLargeError
from luthier.jobs.content import Draft, content_path
from luthier.jobs.database import Database
from luthier.jobs.files import FileStore, StoredFile
from tests.unit.jobs.conftest import Clock


def send(
    files: FileStore, content: bytes, project: str = "anna", filename: str = "a.jsonl", **more: float
) -> StoredFile:
    incoming = files.begin(project, "fine-tune", filename, limit_bytes=1000, **more)
    for start in range(0, len(content), 7):
        incoming.write(content[start : start + 7])
    return incoming.finish()


def contents(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "files").rglob("*") if path.is_file())


def drafts(home: Path) -> list[Path]:
    return list((home / "tmp").iterdir())


def test_a_file_is_what_was_sent(files: FileStore, home: Path, now: Clock) -> None:
    content = b"one line\nand another\n" * 9
    file = send(files, content)
    digest = hashlib.sha256(content).hexdigest()
    assert (file.sha256, file.bytes, file.status, file.created_at) == (digest, len(content), "uploaded", now.time)
    path = files.path(file)
    assert path.read_bytes() == content
    assert path.stat().st_mode & 0o077 == 0, "for the server alone"
    assert files.find("anna", file.id) == file
    assert files.find_by_hash("anna", digest) == file
    assert drafts(home) == []


def test_the_same_content_lies_there_once_and_goes_with_its_last_file(files: FileStore, home: Path) -> None:
    mine, again, theirs = send(files, b"same"), send(files, b"same"), send(files, b"same", "ben")
    assert len({mine.id, again.id, theirs.id}) == 3
    assert contents(home) == [mine.sha256]
    files.delete("anna", mine.id)
    files.delete("ben", theirs.id)
    assert contents(home) == [mine.sha256]
    files.delete("anna", again.id)
    assert contents(home) == []
    with pytest.raises(NotFoundError):
        files.delete("anna", again.id)


def test_that_others_have_a_content_is_not_told(files: FileStore) -> None:
    theirs = send(files, b"secret", "ben")
    assert files.find_by_hash("anna", theirs.sha256) is None
    for ask in (lambda: files.find("anna", theirs.id), lambda: files.delete("anna", theirs.id)):
        with pytest.raises(NotFoundError):
            ask()
    with pytest.raises(NotFoundError):
        files.set_report("anna", theirs.id, "ready")
    with pytest.raises(NotFoundError):
        files.list_files("anna", after=theirs.id)
    assert files.list_files("anna").items == []
    assert (files.used_bytes("anna"), files.used_bytes("ben")) == (0, 6)


def test_more_than_the_limit_is_refused_and_leaves_nothing(files: FileStore, home: Path) -> None:
    incoming = files.begin("anna", "fine-tune", "a", limit_bytes=10)
    incoming.write(b"x" * 10)
    with pytest.raises(TooLargeError):
        incoming.write(b"x")
    incoming.abort()
    incoming.abort()
    assert drafts(home) == contents(home) == []
    assert files.list_files("anna").items == []


def test_to_abort_after_the_end_changes_nothing(files: FileStore) -> None:
    incoming = files.begin("anna", "fine-tune", "a", limit_bytes=10)
    incoming.write(b"x")
    file = incoming.finish()
    incoming.abort()
    assert files.path(file).read_bytes() == b"x"


def test_a_full_disk_is_told_and_leaves_nothing(files: FileStore, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    incoming = files.begin("anna", "fine-tune", "a", limit_bytes=10)

    def no_room(_handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    incoming.write(b"x")
    monkeypatch.setattr("os.fsync", no_room)
    with pytest.raises(DiskFullError):
        incoming.finish()
    monkeypatch.undo()
    incoming.abort()
    assert drafts(home) == contents(home) == []
    assert files.list_files("anna").items == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_while_writing_is_told(home: Path) -> None:
    draft = Draft(home, 100)
    draft._file.close()
    with Path("/dev/full").open("wb", buffering=0) as full:
        draft._file = full
        with pytest.raises(DiskFullError):
            draft.write(b"x")
        draft.abort()
    assert drafts(home) == []


def test_a_disk_that_takes_less_than_it_was_given_is_given_the_rest(home: Path) -> None:
    class Slow(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(bytes(data)[:3])

    draft = Draft(home, 100)
    draft._file.close()
    draft._file = Slow(draft.path, "wb")  # type: ignore[assignment]
    draft.write(b"all of it")
    assert draft.seal() == hashlib.sha256(b"all of it").hexdigest()
    assert draft.path.read_bytes() == b"all of it"


@pytest.mark.parametrize("name", ["../../../etc/passwd", "a\x00b", "C:\\x\\con", "/etc/passwd", "." * 300, "\ud800"])
def test_names_are_for_showing_only(files: FileStore, home: Path, name: str) -> None:
    file = send(files, b"x", filename=name)
    assert files.path(file).is_relative_to(home / "files")
    assert files.find("anna", file.id).filename == file.filename
    assert contents(home) == [file.sha256]
    for asked in (name, f"../{file.id}", file.id + "\x00"):
        with pytest.raises(NotFoundError):
            files.find("anna", asked)


@pytest.mark.parametrize("sha256", ["../" * 10, "A" * 64, "a" * 63, "", "a" * 64 + "\n"])
def test_only_a_hash_becomes_a_path(home: Path, sha256: str) -> None:
    with pytest.raises(ValueError, match="SHA-256"):
        content_path(home, sha256)


def test_what_a_check_found_is_kept(files: FileStore) -> None:
    file = send(files, b"x")
    assert [each.id for each in files.unchecked()] == [file.id]
    report = {"problems": [{"line": 3, "reason": "not JSON"}]}
    assert files.set_report("anna", file.id, "error", rows=3, report=report) == files.find("anna", file.id)
    found = files.find("anna", file.id)
    assert (found.status, found.rows, found.report) == ("error", 3, report)
    assert files.unchecked() == []
    with pytest.raises(ValueError, match="ready"):
        files.set_report("anna", file.id, "fine")


def test_pages(files: FileStore) -> None:
    made = [send(files, bytes([number])).id for number in range(5)]
    send(files, b"theirs", "ben")
    first = files.list_files("anna", limit=3)
    rest = files.list_files("anna", limit=3, after=first.items[-1].id)
    assert [file.id for file in [*first.items, *rest.items]] == made[::-1]
    assert (first.has_more, rest.has_more) == (True, False)
    assert [file.id for file in files.list_files("anna", newest_first=False, limit=2, after=made[1]).items] == made[2:4]
    assert files.list_files("anna", purpose="other").items == []


def test_files_expire(files: FileStore, home: Path, now: Clock) -> None:
    short, long = send(files, b"short", expires_at=now.time + 60), send(files, b"long", expires_at=now.time + 6000)
    now.time += 61
    files.sweep()
    assert contents(home) == [long.sha256]
    with pytest.raises(NotFoundError):
        files.find("anna", short.id)


def test_what_a_crash_left_is_swept(files: FileStore, home: Path) -> None:
    """Content without a row (a crash before the commit), and an old draft; a young one is somebody's."""
    kept = send(files, b"kept")
    orphan = content_path(home, hashlib.sha256(b"orphan").hexdigest())
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"orphan")
    old, young = home / "tmp" / "draft-old", home / "tmp" / "draft-young"
    for path in (old, young):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    files.sweep()
    assert contents(home) == [kept.sha256]
    assert drafts(home) == [young]


def test_a_row_that_is_refused_leaves_no_content(files: FileStore, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = send(files, b"first")
    monkeypatch.setattr("luthier.jobs.files.new_id", lambda _prefix: first.id)
    with pytest.raises(exc.IntegrityError):
        send(files, b"second")
    files.sweep()
    assert contents(home) == [first.sha256]
    assert drafts(home) == []


def test_content_is_there_as_long_as_a_file_has_it_whoever_deletes_meanwhile(
    files: FileStore, database: Database
) -> None:
    """Two threads send and delete the same content; whatever is found has its content."""
    wrong: list[str] = []

    def send_and_delete() -> None:
        for _ in range(15):
            file = send(files, b"contested")
            if not files.path(file).exists():
                wrong.append(file.id)
            files.delete("anna", file.id)

    threads = [threading.Thread(target=send_and_delete) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not list((files._home / "files").rglob("*" * 2 + "/" + "?" * 64))


class TestUploads:
    """Files in parts: in the order that is said, whole, and gone when nobody completes them."""

    def part(self, files: FileStore, upload: str, content: bytes, project: str = "anna") -> str:
        incoming = files.uploads.begin_part(project, upload)
        incoming.write(content)
        return incoming.finish().id

    def test_parts_become_a_file_in_the_order_that_is_said(self, files: FileStore, home: Path) -> None:
        upload = files.uploads.create("anna", "fine-tune", "a.jsonl", bytes=9, mime_type="text/jsonl")
        last, unused, first = (self.part(files, upload.id, content) for content in (b"world", b"nope", b"the "))
        md5 = hashlib.md5(b"the world").hexdigest()
        done, file = files.uploads.complete("anna", upload.id, [first, last], md5=md5.upper())
        assert files.path(file).read_bytes() == b"the world"
        assert (done.status, done.file, file.filename, file.bytes) == ("completed", file.id, "a.jsonl", 9)
        assert unused not in {path.name for path in home.rglob("*")}
        assert files.uploads.complete("anna", upload.id, []) == (done, file), "asked again after a lost answer"
        assert len(files.list_files("anna").items) == 1
        with pytest.raises(ConflictError, match="completed"):
            files.uploads.cancel("anna", upload.id)

    def test_what_does_not_agree_makes_no_file_and_can_be_said_again(self, files: FileStore, home: Path) -> None:
        upload = files.uploads.create("anna", "fine-tune", "a", bytes=4)
        part = self.part(files, upload.id, b"data")
        other = files.uploads.create("anna", "fine-tune", "b", bytes=4)
        foreign = self.part(files, other.id, b"data")
        wrong: list[tuple[list[str], str | None, str]] = [
            ([part], "0" * 32, "data_invalid"),
            ([part, part], None, "data_invalid"),
            ([], None, "data_invalid"),
            ([foreign], None, "not_found"),
            (["../../luthier.db"], None, "not_found"),
        ]
        for parts, md5, code in wrong:
            with pytest.raises(LuthierError) as caught:
                files.uploads.complete("anna", upload.id, parts, md5=md5)
            assert caught.value.code == code, parts
        assert drafts(home) == contents(home) == []
        assert files.uploads.complete("anna", upload.id, [part])[1].bytes == 4

    def test_a_part_that_was_cut_is_sent_again(self, files: FileStore, home: Path) -> None:
        upload = files.uploads.create("anna", "fine-tune", "a", bytes=4)
        cut = files.uploads.begin_part("anna", upload.id)
        cut.write(b"da")
        cut.abort()
        part = self.part(files, upload.id, b"data")
        assert files.path(files.uploads.complete("anna", upload.id, [part])[1]).read_bytes() == b"data"
        assert drafts(home) == []

    def test_parts_do_not_fill_the_disk(self, files: FileStore, home: Path) -> None:
        upload = files.uploads.create("anna", "fine-tune", "a", bytes=4)
        self.part(files, upload.id, b"data")
        self.part(files, upload.id, b"data")
        with pytest.raises(TooLargeError):
            self.part(files, upload.id, b"d")
        big = files.uploads.begin_part("anna", upload.id, limit_bytes=3)
        with pytest.raises(TooLargeError):
            big.write(b"data")
        big.abort()
        assert drafts(home) == []

    @pytest.mark.parametrize("end", ["cancel", "expire"])
    def test_an_upload_that_ended_takes_nothing_and_leaves_nothing(
        self, files: FileStore, home: Path, now: Clock, end: str
    ) -> None:
        upload = files.uploads.create("anna", "fine-tune", "a", bytes=4)
        part = self.part(files, upload.id, b"data")
        late = files.uploads.begin_part("anna", upload.id)
        late.write(b"late")
        if end == "cancel":
            assert files.uploads.cancel("anna", upload.id).status == "cancelled"
            assert files.uploads.cancel("anna", upload.id).status == "cancelled"
        else:
            now.time += 3601
            with pytest.raises(ConflictError, match="expired"):
                files.uploads.complete("anna", upload.id, [part])
            files.sweep()
            assert files.uploads.find("anna", upload.id).status == "expired"
        with pytest.raises(ConflictError):
            late.finish()
        with pytest.raises(ConflictError):
            files.uploads.begin_part("anna", upload.id)
        assert list((home / "uploads").iterdir()) == drafts(home) == []

    def test_of_another_project_there_is_no_upload(self, files: FileStore) -> None:
        upload = files.uploads.create("ben", "fine-tune", "a", bytes=4)
        part = self.part(files, upload.id, b"data", "ben")
        asked = [
            lambda: files.uploads.find("anna", upload.id),
            lambda: files.uploads.begin_part("anna", upload.id),
            lambda: files.uploads.complete("anna", upload.id, [part]),
            lambda: files.uploads.cancel("anna", upload.id),
        ]
        for ask in asked:
            with pytest.raises(NotFoundError):
                ask()
