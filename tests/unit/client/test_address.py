"""Where a server and its key come from: flags before the environment before a `.env` file, and never by guessing."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.client.address import Address, find_address, list_env_files
from luthier.errors import CallError
from luthier.runs.env_file import read_env_file

URL = "http://127.0.0.1:8440"
BARE = "http:" + "//"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_flags_come_before_the_environment_before_a_file(tmp_path: Path) -> None:
    write(tmp_path / ".env", "LUTHIER_SERVER=http://file.test:1\nLUTHIER_API_KEY=from-file\n")
    environment = {"LUTHIER_SERVER": "http://env.test:1", "LUTHIER_API_KEY": "from-env"}
    assert find_address(URL, "flag", environment=environment, folder=tmp_path) == Address(URL, "flag")
    assert find_address(None, None, environment=environment, folder=tmp_path) == Address(
        "http://env.test:1", "from-env"
    )
    assert find_address(URL, None, environment={}, folder=tmp_path) == Address(URL, "from-file")


def test_the_names_of_synth_s_clients_are_understood(tmp_path: Path) -> None:
    given = {"BACKEND_BASE_URL": f"{URL}/api/", "SYNTH_API_KEY": "k"}
    found = find_address(None, None, environment=given, folder=tmp_path)
    assert (found.url, found.root, found.key) == (f"{URL}/api", URL, "k")


def test_of_several_files_a_person_chooses_and_a_script_must_name_one(tmp_path: Path) -> None:
    for name in ("a.env", "b.env"):
        write(tmp_path / name, f"LUTHIER_SERVER={URL}\nLUTHIER_API_KEY={name}\n")
    write(tmp_path / "c.env", "OTHER=1\n")
    assert [path.name for path in list_env_files(tmp_path)] == ["a.env", "b.env"]
    with pytest.raises(CallError, match=r"a\.env, b\.env"):
        find_address(None, None, environment={}, folder=tmp_path)
    chosen = find_address(None, None, environment={}, folder=tmp_path, choose=lambda found: found[1])
    assert chosen.key == "b.env"
    assert find_address(None, None, environment={}, env_file=tmp_path / "a.env", folder=tmp_path).key == "a.env"


def test_a_file_is_read_and_never_run(tmp_path: Path) -> None:
    text = "# A=0\nexport A = \"one # two\"\nB='it''s' # x\nC=$(touch gone) # note\nD=a=b\nbad line\nE=\n"
    found = read_env_file(write(tmp_path / ".env", text))
    assert found == {"A": "one # two", "B": "it", "C": "$(touch gone)", "D": "a=b", "E": ""}
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("url", ["ftp:" + "//x", "127.0.0.1:8440", BARE, f"{BARE}u:p@x", f"{BARE}x?q=1"])
def test_what_is_no_address_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(CallError, match="no address"):
        find_address(url, "k", environment={}, folder=tmp_path)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(CallError, match="no server"):
        find_address(None, None, environment={}, folder=tmp_path)
    with pytest.raises(CallError, match="no key"):
        find_address(URL, None, environment={}, folder=tmp_path)
    with pytest.raises(CallError, match="no file"):
        find_address(None, None, env_file=tmp_path / "none", environment={})


@pytest.mark.parametrize(("url", "is_open"), [(URL, False), (f"{BARE}box:1", True), ("https://box.test", False)])
def test_a_key_that_travels_openly_is_known(url: str, is_open: bool) -> None:
    assert Address(url, "k").travels_openly is is_open
