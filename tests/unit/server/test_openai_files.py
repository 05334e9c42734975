"""OpenAI's files, uploads and models: what the SDK sends is kept, checked, listed, and gone when it is deleted."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from openai.types import FileObject, Model, Upload

from luthier.jobs.checking import FileReport
from luthier.server.app import create_app
from tests.service.here import BASE_URL, ROW
from tests.service.jobs.desk import wait_until
from tests.unit.server.conftest import Desk

ROWS = ROW.encode() * 3


@pytest.fixture
def checked(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """The same desk, whose checks are told what they find, in place of a process."""
    bad = FileReport(False, "invalid_training_file", "1 of 1 rows is malformed", problems=({"line": 1},))
    monkeypatch.setattr(
        "luthier.server.checks.check_file",
        lambda path, **_: FileReport(True, rows=3) if path.read_bytes() == ROWS else bad,
    )
    return desk


def send(desk: Desk, content: bytes = ROWS, status: int = 200, **fields: str) -> Any:
    """A file in a form, its fields before it."""
    form = {name: (None, value) for name, value in ({"purpose": "fine-tune"} | fields).items() if value}
    return desk.ask("POST", "/v1/files", status=status, files={**form, "file": ("rows.jsonl", content)})


def wait(desk: Desk, file: str) -> FileObject:
    """The file once its check is done."""

    def look() -> FileObject | None:
        found = FileObject.model_validate(desk.ask("GET", f"/v1/files/{file}"), strict=True)
        return None if found.status == "uploaded" else found

    return wait_until(look)


def test_a_file_is_kept_checked_and_given_back(checked: Desk) -> None:
    sent = FileObject.model_validate(send(checked), strict=True)
    assert (sent.filename, sent.bytes, sent.purpose) == ("rows.jsonl", len(ROWS), "fine-tune")
    assert (sent.status, sent.expires_at) == ("uploaded", None)
    assert wait(checked, sent.id).status == "processed"
    content = checked.here.ask("GET", f"/v1/files/{sent.id}/content")
    assert content.content == ROWS
    assert "attachment" in content.headers["content-disposition"]


def test_a_bad_file_says_which_rows(checked: Desk) -> None:
    sent = send(checked, b"not json\n")
    found = wait(checked, sent["id"])
    assert found.status == "error"
    assert found.status_details is not None
    assert found.status_details.startswith("1 of 1 rows is malformed")
    body = {"model": "practice", "training_file": sent["id"]}
    refused = checked.ask("POST", "/v1/fine_tuning/jobs", status=400, json=body)["error"]
    assert refused["param"] == "training_file"


def test_files_are_listed_by_page_order_and_purpose(checked: Desk) -> None:
    made = [checked.file, send(checked)["id"], send(checked, purpose="evals")["id"]]
    assert [file["id"] for file in checked.ask("GET", "/v1/files")["data"]] == made[::-1]
    assert [file["id"] for file in checked.ask("GET", "/v1/files?order=asc&limit=2")["data"]] == made[:2]
    assert [file["id"] for file in checked.ask("GET", f"/v1/files?order=asc&after={made[1]}")["data"]] == made[2:]
    assert [file["id"] for file in checked.ask("GET", "/v1/files?purpose=evals")["data"]] == made[2:]


def test_a_deleted_file_is_gone_from_the_disk(desk: Desk) -> None:
    content = desk.here.service.files.path(desk.here.service.files.find("default", desk.file))
    job = desk.openai_job()["id"]
    assert desk.ask("DELETE", f"/v1/files/{desk.file}", status=409)["error"]["code"] == "conflict"
    desk.ask("POST", f"/v1/fine_tuning/jobs/{job}/cancel")
    assert desk.ask("DELETE", f"/v1/files/{desk.file}") == {"id": desk.file, "object": "file", "deleted": True}
    assert not content.exists()
    assert desk.ask("GET", f"/v1/files/{desk.file}", status=404)["error"]["code"] == "not_found"


def test_a_file_may_expire(checked: Desk) -> None:
    life = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    sent = send(checked, **life)
    assert sent["expires_at"] - sent["created_at"] in (3599, 3600, 3601)
    for wrong in ("3599", "2592001", "soon"):
        error = send(checked, status=400, **{**life, "expires_after[seconds]": wrong})["error"]
        assert error["param"] == "expires_after"


@pytest.mark.parametrize("purpose", ["", "assistants", "fine-tune-results"])
def test_a_purpose_that_is_none_here_is_refused(desk: Desk, purpose: str) -> None:
    error = send(desk, status=400, purpose=purpose)["error"]
    assert error["param"] == "purpose"


def test_a_purpose_that_comes_after_the_file_is_refused(desk: Desk) -> None:
    before = desk.ask("GET", "/v1/files")["data"]
    file = 'Content-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{}'
    purpose = 'Content-Disposition: form-data; name="purpose"\r\n\r\n'

    async def send_in_pieces(*parts: str) -> Any:
        async def body() -> AsyncIterator[bytes]:
            for part in parts:
                yield f"--x\r\n{part}\r\n".encode()
            yield b"--x--\r\n"

        headers = {
            "authorization": f"Bearer {desk.here.keys['submit']}",
            "content-type": "multipart/form-data; boundary=x",
        }
        transport = httpx2.ASGITransport(app=create_app(desk.here.service))
        async with httpx2.AsyncClient(transport=transport, base_url=BASE_URL) as client:
            return await client.post("/v1/files", content=body(), headers=headers)

    for parts in ((file, f"{purpose}fine-tune"), (f"{purpose}fine-tune", file, f"{purpose}evals")):
        done = asyncio.run(send_in_pieces(*parts))
        assert (done.status_code, done.json()["error"]["param"]) == (400, "purpose"), done.text
    assert desk.ask("GET", "/v1/files")["data"] == before
    assert not list((desk.here.service.home / "tmp").glob("*"))


def begin_upload(desk: Desk, size: int = len(ROWS), status: int = 200) -> Any:
    body = {"bytes": size, "filename": "big.jsonl", "mime_type": "application/jsonl", "purpose": "fine-tune"}
    return desk.ask("POST", "/v1/uploads", json=body, status=status)


def send_part(desk: Desk, upload: str, content: bytes, status: int = 200) -> Any:
    return desk.ask("POST", f"/v1/uploads/{upload}/parts", files={"data": ("upload", content)}, status=status)


def test_a_file_in_parts(checked: Desk) -> None:
    upload = Upload.model_validate(begin_upload(checked), strict=True)
    assert (upload.status, upload.file) == ("pending", None)
    assert upload.expires_at - upload.created_at == 3600
    last, first = (send_part(checked, upload.id, part)["id"] for part in (ROWS[50:], ROWS[:50]))
    body = {"part_ids": [first, last], "md5": hashlib.md5(ROWS).hexdigest()}
    done = Upload.model_validate(checked.ask("POST", f"/v1/uploads/{upload.id}/complete", json=body), strict=True)
    assert done.status == "completed"
    assert done.file is not None
    assert checked.here.ask("GET", f"/v1/files/{done.file.id}/content").content == ROWS
    again = checked.ask("POST", f"/v1/uploads/{upload.id}/complete", json=body)
    assert again["file"]["id"] == done.file.id
    assert wait(checked, done.file.id).status == "processed"
    assert send_part(checked, upload.id, b"more", status=409)["error"]["code"] == "conflict"


def test_parts_that_do_not_make_the_file_are_refused(desk: Desk) -> None:
    upload = begin_upload(desk)["id"]
    part = send_part(desk, upload, ROWS)["id"]
    for body in ({"part_ids": [part], "md5": "0" * 32}, {"part_ids": [part, part]}):
        error = desk.ask("POST", f"/v1/uploads/{upload}/complete", json=body, status=400)["error"]
        assert error["code"] == "data_invalid"
    missing = desk.ask("POST", f"/v1/uploads/{upload}/complete", json={"part_ids": ["part_none"]}, status=404)
    assert missing["error"]["code"] == "not_found"


def test_a_cancelled_upload_takes_nothing_more(desk: Desk) -> None:
    upload = begin_upload(desk)["id"]
    send_part(desk, upload, ROWS)
    assert desk.ask("POST", f"/v1/uploads/{upload}/cancel")["status"] == "cancelled"
    send_part(desk, upload, ROWS, status=409)
    assert not list((desk.here.service.home / "uploads").glob("*/*"))


def test_an_upload_beyond_the_limit_is_refused_before_it_is_sent(desk: Desk) -> None:
    most = desk.here.service.settings.limits.upload_bytes
    assert begin_upload(desk, most + 1, status=413)["error"]["code"] == "too_large"


def test_models_are_bases_and_results(desk: Desk) -> None:
    model = desk.finish(desk.openai_job(suffix="bot")["id"])
    listed = [Model.model_validate(each, strict=True) for each in desk.ask("GET", "/v1/models")["data"]]
    assert [each.id for each in listed] == [model, "practice"]
    assert Model.model_validate(desk.ask("GET", f"/v1/models/{model}"), strict=True).owned_by == "default"
    assert desk.ask("GET", "/v1/models/practice")["owned_by"] == "base"
    assert desk.here.ask("GET", f"/v1/models/{model}", other=True).status_code == 404


def test_a_deleted_model_is_no_longer_the_result_of_its_job(desk: Desk) -> None:
    job = desk.openai_job()["id"]
    model = desk.finish(job)
    weights = desk.here.service.home / "runs" / job / "final_lora_weights"
    weights.mkdir()
    assert desk.ask("DELETE", f"/v1/models/{model}") == {"id": model, "object": "model", "deleted": True}
    assert not weights.exists()
    assert desk.ask("GET", f"/v1/fine_tuning/jobs/{job}/checkpoints")["data"] == []
    assert desk.ask("GET", f"/v1/fine_tuning/jobs/{job}")["fine_tuned_model"] is None
    assert desk.ask("DELETE", f"/v1/models/{model}", status=404)["error"]["code"] == "not_found"
    assert desk.ask("DELETE", "/v1/models/practice", status=404)["error"]["code"] == "not_found"


@pytest.mark.parametrize(("verb", "path"), [("GET", "/v1/nothing"), ("PUT", "/v1/files"), ("GET", "/v1/files?limit=0")])
def test_what_the_protocol_itself_refuses_has_the_same_shape(desk: Desk, verb: str, path: str) -> None:
    done = desk.here.ask(verb, path)
    assert done.status_code in (404, 405, 422)
    assert set(done.json()["error"]) == {"message", "type", "param", "code"}
    assert done.headers["x-request-id"]
