"""Bases in 4 and 8 bits by mlx_lm's quantiser: cached once, trained over, and given back number for number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.engines.mlx import loading
from luthier.errors import UnsupportedError
from luthier.runs.resolve import AdapterRef, ResolvedModel
from luthier.training.batches import build_batch
from luthier.weights.shards import read_model_files
from luthier.weights.tensors import read_model_shape
from tests.unit.engines.conftest import Shaped
from tests.unit.engines.mlx.beside import begin, build, pulled
from tests.unit.engines.tiny import assert_near, draw_items, imitation

mx = pytest.importorskip("mlx.core")
pytest.importorskip("torch")
pytest.importorskip("mlx_lm")
pytestmark = pytest.mark.torch
ITEMS = draw_items(12, 17, 5)
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def logprobs(engine: Any) -> np.ndarray:
    found: np.ndarray = engine.forward(build_batch(ITEMS)).result().logprobs
    return found


@pytest.fixture(params=[False, True], ids=["as on a CPU", "as on Metal"])
def packed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Weights computed with as they are packed, which takes longer on a CPU, or held in full width."""
    monkeypatch.setattr(loading, "keeps_packed", lambda: request.param)
    found: bool = request.param
    return found


@pytest.mark.parametrize("bits", [4, 8])
def test_the_base_has_the_values_of_its_bits(bits: int, packed: bool, shaped: Shaped, own_home: Path) -> None:
    base = shaped("llama", **WIDE)
    engine = build("mlx", base, own_home, "qlora", keys={"bits": bits})
    layer = engine._loaded.model.layers[0].self_attn.q_proj.linear
    assert (getattr(layer, "bits", None), getattr(layer, "group_size", None)) == (
        (bits, 64) if packed else (None, None)
    )
    dequantise = loading.build_dequantise(base, precision="fp32", bits=bits)
    name = "model.layers.0.self_attn.q_proj.weight"
    stored = next(file for file in read_model_files(base).values() if name in file.entries).read_floats(name)
    values = dequantise(name, stored)
    from luthier.engines.mlx.lora import whole_weight

    assert np.array_equal(values, np.array(whole_weight(layer)))
    assert 0 < np.abs(values - stored).max() < (0.2 if bits == 4 else 0.02)
    assert dequantise("model.norm.weight", np.ones(64, np.float32)) is None
    begin(engine)
    value, _, gradients = pulled(engine, *imitation(ITEMS))
    plain = build("mlx", base, own_home)
    begin(plain)
    assert value == pytest.approx(pulled(plain, *imitation(ITEMS))[0], rel=0.3 if bits == 4 else 0.02)
    assert all(np.abs(each).max() > 0 for each in gradients.values())


def test_it_is_quantised_once(shaped: Shaped, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = shaped("llama", **WIDE)
    first = logprobs(build("mlx", base, own_home, "qlora"))
    (folder,) = [path for path in (own_home / "mlx").iterdir() if path.is_dir()]
    monkeypatch.setattr(loading, "_read_with_adapters", None)
    assert np.array_equal(logprobs(build("mlx", base, own_home, "qlora")), first)
    import mlx_lm.utils

    assert mlx_lm.utils.load_model(folder)[1]["quantization"]["bits"] == 4


def test_modules_trained_whole_stay_in_full_width(
    shaped: Shaped, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "keeps_packed", lambda: True)
    engine = build("mlx", shaped("llama", **WIDE), own_home, "qlora", keys={"also_train": ["lm_head"]})
    assert getattr(engine._loaded.model.lm_head, "bits", None) is None
    assert getattr(engine._loaded.model.model.embed_tokens, "bits", None) == 4
    assert np.abs(pulled(engine, *imitation(ITEMS))[2]["lm_head.weight"]).max() > 0


def test_what_was_trained_whole_is_asked_in_full_width_again(
    packed: bool, shaped: Shaped, own_home: Path, tmp_path: Path
) -> None:
    """By who certifies it: over the quantised base, with the tables that were trained in the place of their own."""
    from luthier.engines.registry import load_prober
    from tests.unit.engines.tiny import logprobs_of

    base = shaped("llama", **WIDE)
    engine = build("mlx", base, own_home, "qlora", keys={"also_train": ["lm_head", "embed_tokens"]})
    begin(engine)
    engine._masters.arrays["lm_head.weight"] += 0.1
    engine.save("weights").write(tmp_path)
    ref = AdapterRef(tmp_path, True, engine="mlx")
    prober = load_prober(ResolvedModel(base), own_home, precision="fp32", device="cpu", over=ref)
    assert prober.adapt(tmp_path) == []
    tokens = ITEMS[1].sequences[0]
    (logits,) = prober.logits([tokens], len(tokens))
    expected = logprobs_of(engine, tokens)
    found = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert np.abs(found - expected).max() < 1e-4


def test_widths_that_groups_do_not_divide_stay_as_they_are(
    shaped: Shaped, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "keeps_packed", lambda: True)
    model = build("mlx", shaped("llama"), own_home, "qlora")._loaded.model  # 32 and 48 wide
    assert getattr(model.layers[0].self_attn.q_proj.linear, "group_size", None) == 32
    assert getattr(model.layers[0].mlp.down_proj.linear, "bits", None) is None


def test_an_adapter_goes_over_the_values_it_was_trained_on(shaped: Shaped, own_home: Path, tmp_path: Path) -> None:
    """As the next run's base: the quantised values and the update, as the run that trained it computed them."""
    base = shaped("llama", **WIDE)
    engine = build("mlx", base, own_home, "qlora")
    begin(engine)
    engine.save("weights").write(tmp_path)
    below = ResolvedModel(base, (AdapterRef(tmp_path, True, engine="mlx"),), name="tiny")
    loaded = loading.load_for_sampling(below, own_home, precision="fp32")
    from luthier.engines.mlx.sampling import MlxSampler

    sequence = ITEMS[0].sequences[0]
    counted = np.zeros(len(sequence), bool)
    counted[ITEMS[0].trained[0]] = True
    (summed,) = MlxSampler(loaded).score([sequence.tolist()], [counted])
    expected = engine.forward(build_batch(ITEMS[:1])).result().logprobs.sum()
    assert summed == pytest.approx(expected, rel=1e-4)


def test_values_of_another_engine_s_quantiser_are_refused(shaped: Shaped, own_home: Path, tmp_path: Path) -> None:
    base = shaped("llama", **WIDE)
    build("mlx", base, own_home).save("weights").write(tmp_path)
    for engine, other in (("torch", "mlx"), ("mlx", "torch")):
        resolved = ResolvedModel(base, (AdapterRef(tmp_path, True, engine=other),), name="tiny")
        from luthier.engines.registry import find_engine
        from tests.unit.engines.tiny import make_plan

        with pytest.raises(UnsupportedError, match="was trained over"):
            find_engine(engine)(make_plan(engine={"kind": engine}), resolved, own_home)


def test_a_base_that_is_quantised_already_is_trained_as_it_is(shaped: Shaped, own_home: Path, tmp_path: Path) -> None:
    base = shaped("llama", **WIDE)
    loading.write_quantised(base, tmp_path / "q", 4)
    shapes = read_model_shape(base), read_model_shape(tmp_path / "q")
    assert shapes[1].mlx_bits == 4
    assert replace(shapes[1], mlx_bits=None) == shapes[0]
    engines = build("mlx", base, own_home, "qlora"), build("mlx", tmp_path / "q", own_home, "qlora")
    assert np.array_equal(logprobs(engines[0]), logprobs(engines[1]))
    loading.write_dequantised(tmp_path / "q", tmp_path / "full")
    assert_near(logprobs(build("mlx", tmp_path / "full", own_home)), logprobs(engines[0]), 1e-4)
