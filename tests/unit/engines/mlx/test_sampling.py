"""Answers and scores: many prompts at once as each alone, drawn by the seed, and scored as torch scores them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from luthier.engines.registry import load_sampler
from luthier.engines.verbs import SampleParams
from luthier.runs.resolve import ResolvedModel
from tests.unit.engines.conftest import Shaped
from tests.unit.engines.tiny import draw_items

pytest.importorskip("torch")
pytest.importorskip("mlx_lm")
pytestmark = pytest.mark.torch
PROMPTS = [item.sequences[0].tolist() for item in draw_items(12, 3, 25, 7)]


@pytest.fixture(scope="module")
def sampler(shaped: Shaped, tmp_path_factory: pytest.TempPathFactory):
    return load_sampler(ResolvedModel(shaped("llama")), tmp_path_factory.mktemp("home"), "mlx")


def test_together_is_each_alone_and_each_is_told_as_it_comes(sampler) -> None:
    params = SampleParams(max_tokens=6)
    together = sampler.sample(PROMPTS, params)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        heard: list[int] = []
        assert sampler.stream(prompt, params, heard.append) == answer == heard
    stops = SampleParams(max_tokens=6, stop_tokens=(together[0][2],))
    cut = sampler.sample(PROMPTS, stops)
    assert cut[0] == together[0][:2]
    assert sampler.stream(PROMPTS[0], stops, lambda _: None) == together[0][:2]


def test_draws_are_of_the_seed(sampler) -> None:
    one, again, other = (
        sampler.sample(PROMPTS, SampleParams(max_tokens=8, temperature=1.5, top_p=0.95, top_k=50, seed=seed))
        for seed in (1, 1, 2)
    )
    assert one == again != other


def test_progress_is_told_and_nothing_asked_is_nothing_answered(sampler) -> None:
    told: list[tuple[int, int]] = []
    sampler.sample(PROMPTS, SampleParams(max_tokens=2), lambda *each: told.append(each))
    assert told[-1] == (4, 4)
    assert sampler.sample(PROMPTS, SampleParams(max_tokens=0)) == [[], [], [], []]


def test_scores_are_torch_s(sampler, shaped: Shaped, own_home: Path) -> None:
    theirs = load_sampler(ResolvedModel(shaped("llama")), own_home, "torch")
    masks = [np.arange(len(prompt)) % 2 == 1 for prompt in PROMPTS]
    for counted in (None, masks):
        assert sampler.score(PROMPTS, counted) == pytest.approx(theirs.score(PROMPTS, counted), rel=3e-2)


def test_a_cache_that_holds_one_row_answers_one_by_one(sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.engines.mlx import sampling

    expected = sampler.sample(PROMPTS, SampleParams(max_tokens=5))
    monkeypatch.setattr(sampling, "_together", lambda *_: (_ for _ in ()).throw(NotImplementedError))
    assert sampler.sample(PROMPTS, SampleParams(max_tokens=5)) == expected
