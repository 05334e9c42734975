"""What was trained is found again by hash, through the chain of runs, and answers that repeat it are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.data.example import Conversation
from luthier.data.hashes import content_hash, prompt_hash
from luthier.evals.contamination import answer_hash, find_overlap
from luthier.evals.parroting import could_repeat, list_hashes, list_repeats
from luthier.runs.run import Run
from luthier.workflow import make_ready, prepare_data, start_run
from tests.unit.training.works import chat_rows, make_spec


@pytest.fixture
def run(tmp_path: Path) -> Run:
    spec = make_spec(tmp_path, {"data": {"train": str(tmp_path / "rows/train.jsonl"), "valid": 0.25}})
    return start_run(make_ready(spec, prepare_data(spec)))


def example(number: int, said: str | None = None) -> Conversation:
    messages = [dict(message) for message in chat_rows(number + 1)[number]["messages"]]
    if said is not None:
        messages[1]["content"] = said
    return Conversation(messages)


def test_rows_prompts_and_answers_that_were_trained(run: Run) -> None:
    held_out = {line for _, line in run.held_out_rows()}
    trained, kept = next(n for n in range(12) if n + 1 not in held_out), next(iter(held_out)) - 1
    same, other, never = example(trained), example(trained, "something else"), example(kept)
    wanted = [same, other, never, example(40)]
    answers = {answer_hash(str(each.messages[1]["content"]) + " \n") for each in (same, other)}
    found = find_overlap(run, {content_hash(each) for each in wanted}, {prompt_hash(each) for each in wanted}, answers)
    assert found.rows == 12 - len(held_out)
    assert found.contents == {content_hash(same)}
    assert found.prompts == {prompt_hash(same)}
    assert found.answers == {answer_hash(str(same.messages[1]["content"]))}
    assert found.notes == []


def test_where_one_cannot_look_is_said(run: Run, tmp_path: Path) -> None:
    assert "not known" in find_overlap(None, set(), set(), set()).notes[0]
    path = tmp_path / "rows" / "train.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))
    assert "are still in its source" in find_overlap(run, set(), set(), set()).notes[0]
    path.unlink()
    assert "cannot be read again: no data at" in find_overlap(run, set(), set(), set()).notes[0]


def test_parroting_is_repeating_what_is_long_and_wrong() -> None:
    long, right = "a long sentence that was trained", "another long sentence, and right"
    answers = [f" {long}\n", right, "yes", "a long sentence that was new"]
    references = [None, right, "no", None]
    trained = {answer_hash(text) for text in (long, right, "yes")}
    assert list_repeats(answers, references, trained) == [0]
    assert len(list_hashes(answers, references)) == 2
    assert could_repeat(right, "something else")
