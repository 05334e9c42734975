"""Hostile bodies: none is a failure of the server's own, none is kept, and no file is held in memory."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest

from luthier.server.settings import Limits
from tests.service.here import ROW, Here, service_here
from tests.service.test_access import filled, operations

OCTETS = {"content-type": "application/octet-stream"}
LENIENT = {
    f"/api/v1/{each}"
    for each in ("client/config", "client/dynamic_config", "telemetry", "create_session", "sessions/search")
}
"""Where a Tinker client of any age is taken: no key is needed, and unknown ones are passed over."""
HOSTILE = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"1",
    b'"x"',
    b"NaN",
    b'{"spec": NaN}',
    b'{"spec": {"seed": 1e999}}',
    b'{"spec": {"seed": 123456789012345678901234567890}}',
    b'{"spec": {"seed": -1}}',
    b'{"spec": {}, "spec": {}}',
    b'{"model": "a", "model": "b", "training_file": "f"}',
    b'{"spec": {"model": {"base": "\\u0000"}}}',
    b'{"model": "\\u0000", "training_file": "\\u0000"}',
    b'{"spec": {"model": {"base": "\\ud800"}}}',
    b'{"model": "\\udfff", "training_file": "f"}',
    b'{"spec": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}",
    b"[" * 100_000,
    b'{"spec": ' + b"[" * 40 + b"]" * 40 + b"}",
    b"\xff\xfe{",
    b'\xef\xbb\xbf{"spec": {}}',
    b'{"spec": "' + b"a" * 1_000_000 + b'"}',
    b'{"metadata": {"' + b"k" * 100 + b'": "v"}, "spec": {}}',
    b'{"spec": {"model": {"base": "../../etc"}, "data": {"train": "/etc/passwd"}}}',
    b'{"model": "../../../etc/passwd", "training_file": "/proc/self/environ"}',
    b'{"messages": [{"role": "user"}], "model": {"$ref": "x"}}',
    b'{"model": "practice", "messages": "x", "max_tokens": -1, "n": 1000000}',
    b'{"model": "practice", "training_file": "f", "hyperparameters": {"n_epochs": 1e308}}',
    b'{"model": "practice", "training_file": "f", "suffix": "<img src=x onerror=alert(1)>"}',
    b'{"training_type": "sft", "model": [], "metadata": {"effective_config": 7}}',
    b'{"training_file_id": "x", "model": "practice", "hyperparameters": [], "metadata": {"effective_config": []}}',
    b'{"__proto__": {"x": 1}, "constructor": 1}',
]


def _writes(here: Here) -> list[tuple[str, str]]:
    return [(verb, path) for verb, path, operation in operations(here) if "requestBody" in operation]


@pytest.mark.parametrize("body", HOSTILE, ids=lambda body: body[:24].decode("latin-1"))
def test_no_body_is_a_failure_of_the_server(here: Here, body: bytes) -> None:
    writes = _writes(here)
    assert len(writes) >= 15
    for verb, path in writes:
        for kind in ("application/json", "multipart/form-data; boundary=x"):
            done = here.ask(verb, filled(path), content=body, headers={"content-type": kind})
            lowest = 200 if path in LENIENT else 400
            assert lowest <= done.status_code < 500, f"{verb} {path} {kind}: {done.status_code} {done.text[:300]}"
    assert here.ask("GET", "/luthier/v1/jobs").json()["jobs"] == []


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/xml", "a" * 500])
def test_a_page_can_send_no_form_of_its_own(here: Here, kind: str) -> None:
    for path in ("/luthier/v1/jobs", "/v1/fine_tuning/jobs", "/api/learning/jobs"):
        done = here.ask("POST", path, content=b'{"spec": {}}', headers={"content-type": kind})
        assert done.status_code in (415, 422)


@pytest.mark.parametrize(
    "path",
    [
        "/luthier/v1/jobs/a%00b",
        "/luthier/v1/jobs?after=%00",
        "/v1/models/" + "a" * 5000,
        "/luthier/v1/jobs/../../../../etc/passwd",
        "/luthier/v1/jobs/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/luthier/v1/files/%ff%fe",
        "/luthier/v1/jobs?limit=99999999999999999999",
        "/luthier/v1/jobs/x/events?after_seq=99999999999999999999999",
        "/luthier/v1/jobs?limit=1e3",
        "/luthier/v1/jobs?state=none",
        "/v1/files?limit=-1",
        "/v1/fine_tuning/jobs?metadata[a]=%00",
        "/api/learning/jobs/x/metrics?after_step=abc",
        "/luthier/v1/files/by-hash/" + "g" * 64,
    ],
)
def test_no_address_is_a_failure_of_the_server(here: Here, path: str) -> None:
    for verb in ("GET", "DELETE"):
        done = here.ask(verb, path)
        assert 400 <= done.status_code < 500, f"{done.status_code} {done.text[:200]}"


def test_a_header_that_stands_twice_is_refused(here: Here) -> None:
    for name in ("host", "authorization", "idempotency-key", "content-length"):
        headers = [("authorization", f"Bearer {here.keys['read']}"), (name, "1"), (name, "2")]
        done = here.client.request("GET", "/luthier/v1/whoami", headers=headers)
        assert done.status_code == 400


# -- files -----------------------------------------------------------------------------------------------------------


def _form(*parts: tuple[str, bytes], boundary: str = "b0") -> dict[str, Any]:
    body = b"".join(
        f"--{boundary}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + data + b"\r\n"
        for head, data in parts
    )
    content = body + f"--{boundary}--\r\n".encode()
    return {"content": content, "headers": {"content-type": f"multipart/form-data; boundary={boundary}"}}


PURPOSE = ('name="purpose"', b"fine-tune")


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "..\\\\..\\\\windows\\\\win.ini",
        "/etc/passwd",
        "%2e%2e%2fetc",
        "con.jsonl",
        "a/b/c.jsonl",
        "<img src=x onerror=alert(1)>.jsonl",
        "\u202egpj.jsonl",
        "a" * 3000 + ".jsonl",
        "",
        ".",
        "..",
    ],
)
def test_a_filename_is_text_to_show_and_never_a_path(here: Here, name: str) -> None:
    file = ('name="file"; filename="' + name.replace('"', "") + '"', ROW.encode())
    done = here.ask("POST", "/v1/files", **_form(PURPOSE, file))
    assert done.status_code == 200, done.text
    shown = done.json()["filename"]
    assert "/" not in shown
    assert "\\" not in shown
    assert 0 < len(shown) <= 255
    assert shown.isprintable()
    here.ask("DELETE", f"/v1/files/{done.json()['id']}")
    assert not [path for path in here.service.home.rglob("*") if path.suffix == ".jsonl"]


def test_a_form_that_is_none_is_refused_and_leaves_nothing(own: Here) -> None:
    file = ('name="file"; filename="a.jsonl"', ROW.encode())
    bad = [
        _form(PURPOSE),
        _form(PURPOSE, file, file),
        _form(PURPOSE, ('name="other"; filename="a.jsonl"', b"x")),
        _form(('name="purpose"', b"x" * 20_000), file),
        _form(('name="purpose"', b"a\0b"), file),
        _form(*[(f'name="f{n}"', b"x") for n in range(50)], file),
        {**_form(PURPOSE, file), "headers": {"content-type": "multipart/form-data"}},
        {**_form(PURPOSE, file), "headers": {"content-type": "multipart/form-data; boundary=other"}},
    ]
    cut = _form(PURPOSE, file)
    bad += [{**cut, "content": cut["content"][:-count]} for count in (3, 8, 40)]
    for each in bad:
        done = own.ask("POST", "/v1/files", **each)
        assert 400 <= done.status_code < 500, done.text
    assert own.ask("GET", "/v1/files").json()["data"] == []
    left = [path for path in own.service.home.rglob("*") if path.is_file() and "luthier.db" not in path.name]
    assert left == []


def test_a_file_that_is_known_is_not_sent_twice(here: Here) -> None:
    content = ROW * 3
    digest = hashlib.sha256(content.encode()).hexdigest()
    assert here.ask("HEAD", f"/luthier/v1/files/by-hash/{digest}").status_code == 404
    file = here.send(content)
    found = here.ask("GET", f"/luthier/v1/files/by-hash/{digest}")
    assert found.json()["id"] == file
    assert here.ask("HEAD", f"/luthier/v1/files/by-hash/{digest}").status_code == 200
    assert here.ask("GET", f"/luthier/v1/files/by-hash/{digest}", other=True).status_code == 404
    whole = here.ask("GET", f"/luthier/v1/files/{file}/content")
    assert whole.text == content
    assert whole.headers["content-disposition"].startswith("attachment")
    rest = here.ask("GET", f"/luthier/v1/files/{file}/content", headers={"range": "bytes=10-"})
    assert (rest.status_code, rest.text) == (206, content[10:])
    over = here.ask("GET", f"/luthier/v1/files/{file}/content", headers={"range": "bytes=100000-"})
    assert over.status_code == 416


def test_a_file_with_another_hash_than_was_said_is_not_kept(here: Here) -> None:
    done = here.ask("POST", f"/luthier/v1/files?sha256={'0' * 64}", content=b"x", headers=OCTETS)
    assert done.status_code == 400
    assert here.ask("GET", f"/luthier/v1/files/by-hash/{hashlib.sha256(b'x').hexdigest()}").status_code == 404


def test_a_file_is_kept_up_to_the_limit_and_not_beyond_it(tmp_path: Path) -> None:
    limits = Limits(file_bytes=100_000, part_bytes=100_000, reserve_bytes=0)
    with service_here(tmp_path / "home", limits=limits) as here:
        assert here.ask("POST", "/luthier/v1/files", content=b"x" * 100_000, headers=OCTETS).status_code == 201
        assert here.ask("POST", "/luthier/v1/files", content=b"x" * 100_001, headers=OCTETS).status_code == 413
        file = 'name="file"; filename="a.jsonl"'
        assert here.ask("POST", "/v1/files", **_form(PURPOSE, (file, b"x" * 100_000))).status_code == 200
        assert here.ask("POST", "/v1/files", **_form(PURPOSE, (file, b"x" * 100_001))).status_code == 413
        assert here.ask("POST", "/api/learning/files", **_form(PURPOSE, (file, b"x" * 100_001))).status_code == 413
        assert list((here.service.home / "tmp").glob("*")) == []


def test_the_disks_reserve_is_kept(tmp_path: Path) -> None:
    with service_here(tmp_path / "home", limits=Limits(reserve_bytes=2**60)) as here:
        done = here.ask("POST", "/luthier/v1/files", content=b"x", headers=OCTETS)
        assert (done.status_code, done.json()["error"]["code"]) == (507, "disk_full")
        assert here.ask("GET", "/luthier/v1/files").status_code == 200
        ready = here.client.get("/luthier/v1/ready")
        assert (ready.status_code, ready.json()["disk"]) == (503, False)


def test_where_no_file_is_sent_no_large_body_is_taken(here: Here) -> None:
    done = here.ask("POST", "/luthier/v1/jobs", content=b" " * (5 << 20), headers={"content-type": "application/json"})
    assert done.status_code == 413
    done = here.ask("POST", "/luthier/v1/jobs", **_form(PURPOSE))
    assert done.status_code == 415


@pytest.mark.parametrize(
    "base",
    [
        "/etc",
        "~",
        "..",
        "../..",
        "a/../b",
        "./x",
        "C:\\x",
        "hf:org/name",
        "https://example.com/x",
        "org/name/more",
        "file:///etc/passwd",
        "",
        "org/..",
        "ft:practice:none",
        "ft:../../x:ftjob-none",
    ],
)
def test_a_base_model_is_a_name_and_never_a_place(here: Here, base: str) -> None:
    spec = {"model": {"base": base}, "data": {"train": here.send()}}
    done = here.ask("POST", "/luthier/v1/jobs", json={"spec": spec})
    assert done.status_code in (400, 404), done.text
    chat = here.ask(
        "POST", "/v1/chat/completions", json={"model": base, "messages": [{"role": "user", "content": "x"}]}
    )
    assert chat.status_code in (400, 404, 422), chat.text


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("data", "train", "/etc/passwd"),
        ("data", "train", "hf:org/name:train"),
        ("data", "train", "http://localhost/latest/meta-data"),
        ("data", "valid", "../../x.jsonl"),
        ("model", "chat_template", "/etc/passwd"),
        ("model", "revision", "../../main"),
        ("output", "dir", "/tmp"),
        ("output", "model_id_file", "/tmp/x"),
        ("engine", "kind", "tinker"),
    ],
)
def test_a_spec_of_a_stranger_names_no_place(here: Here, table: str, key: str, value: str) -> None:
    spec: dict[str, dict[str, Any]] = {"model": {"base": "practice"}, "data": {"train": here.send()}}
    spec.setdefault(table, {})[key] = value
    done = here.ask("POST", "/luthier/v1/jobs", json={"spec": spec})
    assert done.status_code == 400, done.text
    assert re.search(r"data_invalid|spec_invalid", done.json()["error"]["code"])


def test_the_allow_list_decides(tmp_path: Path) -> None:
    with service_here(tmp_path / "home", allowed_models=("Qwen/*",)) as here:
        file = here.send()
        for base, status in (("Qwen/Qwen3-0.6B", 201), ("practice", 400), ("qwen/x", 400), ("Other/Qwen", 400)):
            spec = {"model": {"base": base}, "data": {"train": file}}
            assert here.ask("POST", "/luthier/v1/jobs", json={"spec": spec}).status_code == status, base


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.pkl", "x.ckpt", "modeling_x.py"])
def test_a_base_with_code_or_pickles_in_it_is_refused_before_any_job(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "models" / "org" / "bad"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"x")
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with service_here(tmp_path / "home", models=tmp_path / "models") as here:
        spec = {"model": {"base": "org/bad"}, "data": {"train": here.send()}}
        done = here.ask("POST", "/luthier/v1/jobs", json={"spec": spec})
        assert (done.status_code, done.json()["error"]["code"]) == (400, "model_invalid")
        assert here.ask("GET", "/luthier/v1/jobs").json()["jobs"] == []
