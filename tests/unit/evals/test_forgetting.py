"""The general text: the one that fits the model, in paragraphs or lines, and never endless."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.errors import DataError, MissingPathError
from luthier.evals.forgetting import find_general, read_general
from luthier.runs.resolve import ResolvedModel, practice_folder


def test_the_practice_model_has_a_text_of_its_own(tmp_path: Path) -> None:
    practice = find_general(ResolvedModel(practice_folder()), None)
    other = find_general(ResolvedModel(tmp_path), None)
    assert practice.parent.name == "demo"
    assert len(read_general(practice)) == 100
    assert 15 < len(read_general(other)) < 40
    assert find_general(ResolvedModel(tmp_path), tmp_path / "mine.txt") == tmp_path / "mine.txt"


@pytest.mark.parametrize(
    ("text", "parts"),
    [("one\ntwo\n", ["one", "two"]), ("one\ntwo\n\nthree", ["one two", "three"]), ("\n\nonly\n\n", ["only"])],
)
def test_paragraphs_or_lines(text: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(text)
    assert read_general(path) == parts


def test_a_long_text_is_read_in_part_and_none_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("word " * 100 + "\n")
    path.write_text(path.read_text() * 1000)
    assert len(read_general(path)) < 200
    path.write_text(" \n")
    with pytest.raises(DataError, match="holds no text"):
        read_general(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        read_general(path)
    with pytest.raises(MissingPathError):
        read_general(tmp_path / "none.txt")
