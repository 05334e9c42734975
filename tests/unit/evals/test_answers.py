"""What was answered is never asked again, and a comparison that was stopped goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier.data.prompts import Prompt
from luthier.engines.verbs import SampleParams
from luthier.evals import answers
from luthier.evals.answers import Remembered, Subject
from luthier.evals.asked import Reading, options_for, read_asked, read_plain
from luthier.runs.resolve import ResolvedModel, practice_folder
from luthier.spec.data import Data
from tests.unit.evals.scripted import Scripted

COUNT = 150


@pytest.fixture
def reading() -> Reading:
    prompts = [Prompt([{"role": "user", "content": f"say {number}"}]) for number in range(COUNT)]
    return read_asked(options_for(practice_folder(), None, Data()), prompts)


def subject_of(home: Path, sampler: Any, patch: pytest.MonkeyPatch) -> Subject:
    patch.setattr(answers, "load_sampler", lambda *_: sampler)
    return Subject(ResolvedModel(practice_folder(), name="practice"), home)


def test_a_second_time_nothing_is_loaded(tmp_path: Path, reading: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Scripted(lambda prompt: prompt[-9:-6])
    first = subject_of(tmp_path, sampler, monkeypatch)
    said = first.answer(reading, SampleParams(20, 0.7, seed=3))
    assert len(sampler.prompts) == len(said.answers) == COUNT
    texts = read_plain(reading.text, ["one two three", "four"], max_length=64)
    scores = first.score(texts)
    again = subject_of(tmp_path, None, monkeypatch)
    assert again.answer(reading, SampleParams(20, 0.7, seed=3)) == said
    assert again.score(texts) == scores == [-0.5 * text.tokens for text in texts]


@pytest.mark.parametrize("params", [SampleParams(21, 0.7), SampleParams(20, 0.6), SampleParams(20, 0.7, seed=1)])
def test_other_settings_are_other_answers(
    params: SampleParams, tmp_path: Path, reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = Scripted(lambda prompt: [])
    subject = subject_of(tmp_path, sampler, monkeypatch)
    subject.answer(reading, SampleParams(20, 0.7))
    subject.answer(reading, params)
    assert len(sampler.prompts) == 2 * COUNT


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, reading: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopping(Scripted):
        def sample(self, *args: Any) -> list[list[int]]:
            if self.prompts:
                raise KeyboardInterrupt
            return super().sample(*args)

    with pytest.raises(KeyboardInterrupt):
        subject_of(tmp_path, Stopping(lambda prompt: [7]), monkeypatch).answer(reading, SampleParams(20))
    rest = Scripted(lambda prompt: [7])
    said = subject_of(tmp_path, rest, monkeypatch).answer(reading, SampleParams(20))
    assert len(rest.prompts) == COUNT - 64
    assert len(said.answers) == COUNT


def test_each_portion_has_a_seed_of_its_own_and_cut_answers_are_known(
    tmp_path: Path, reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    class Listening(Scripted):
        def sample(self, prompts: Any, params: SampleParams, tick: Any = None) -> list[list[int]]:
            seeds.append(params.seed)
            return super().sample(prompts, params, tick)

    sampler = Listening(lambda prompt: [5] * (3 if len(seeds) == 2 else 2))
    heard: list[tuple[int, int]] = []
    said = subject_of(tmp_path, sampler, monkeypatch).answer(
        reading, SampleParams(3, seed=2), lambda done, count: heard.append((done, count))
    )
    assert len(set(seeds)) == 3
    assert sum(said.is_cut) == 64
    assert heard == [(64, COUNT), (128, COUNT), (COUNT, COUNT)]
    assert sampler.params is not None
    assert sampler.params.stop_tokens == reading.stops


def test_a_broken_memory_is_made_again_and_the_oldest_is_forgotten(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> int:
        made.append(1)
        return len(made)

    memory = Remembered(tmp_path, "model")
    assert [memory.get("a", make), memory.get("a", make)] == [1, 1]
    (path,) = (tmp_path / "answers").iterdir()
    path.write_bytes(b'{"fou')
    assert memory.get("a", make) == 2
    assert Remembered(tmp_path, "other").get("a", make) == 3
    memory.prune(most=1)
    assert len(list((tmp_path / "answers").iterdir())) == 1
