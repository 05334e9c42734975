"""What the mlx engine does besides its verbs: memory, recomputation, compiled passes, models written back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.engines.registry import find_engine
from luthier.engines.verbs import OutOfMemory, SampleParams, StepParams
from luthier.errors import CheckpointError, MissingExtraError, UnsupportedError
from luthier.runs.resolve import ResolvedModel
from luthier.training.batches import build_batch
from tests.unit.engines.conftest import Shaped
from tests.unit.engines.mlx.beside import begin, build, pulled
from tests.unit.engines.tiny import assert_near, assert_same_gradients, draw_items, imitation, load_plain, make_plan

mx = pytest.importorskip("mlx.core")
pytest.importorskip("torch")
pytest.importorskip("mlx_lm")
pytestmark = pytest.mark.torch
ITEMS = draw_items(12, 17, 5, (6, 4, 5))


def steps(engine: Any, count: int = 2) -> None:
    for _ in range(count):
        engine.forward_backward(*imitation(ITEMS, scale=0.05))
        assert engine.optim_step(StepParams(1e-2)).result().taken


@pytest.mark.parametrize("method", ["lora", "full"])
def test_recomputed_activations_give_the_same_gradients(method: str, shaped: Shaped, own_home: Path) -> None:
    engines = [
        build("mlx", shaped("llama"), own_home, method, compute={"recompute": each}) for each in ("never", "always")
    ]
    for engine in engines:
        begin(engine)
    (_, _, plain), (_, _, again) = (pulled(engine, *imitation(ITEMS)) for engine in engines)
    assert_same_gradients(again, plain, 1e-6)
    # Only these layers: another engine of the same architecture, and answers from a cache, are as they were.
    assert "Recomputed" in type(engines[1]._loaded.model.layers[0]).__name__
    assert "Recomputed" not in type(engines[0]._loaded.model.layers[0]).__name__
    asked = [ITEMS[0].sequences[0].tolist()], SampleParams(max_tokens=5)
    assert engines[0].sample(*asked).result() == engines[1].sample(*asked).result()


def test_rows_alone_and_rows_together_are_the_same(shaped: Shaped, own_home: Path) -> None:
    plan = make_plan(engine={"kind": "mlx"}, keys={"dropout": 0.2})
    found = []
    for packed in (True, False):
        engine = find_engine("mlx")(plan, ResolvedModel(shaped("llama"), name="tiny"), own_home, packed=packed)
        assert engine.facts.is_packed is packed
        begin(engine)
        found.append(pulled(engine, *imitation(ITEMS)))
    assert_near(found[0][1], found[1][1], 1e-5)
    assert_same_gradients(found[0][2], found[1][2])


def test_logits_in_chunks_are_logits_at_once(shaped: Shaped, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's own gradient among them, which only reaches it through every chunk."""
    from luthier.engines.mlx import head

    batch, loss = imitation(draw_items(90, 80, 70))
    engine = build("mlx", shaped("llama"), own_home, "full")
    whole = pulled(engine, batch, loss)
    monkeypatch.setattr(head, "_CHUNK_ELEMENTS", 1)
    assert len(list(head.chunks(len(batch.targets), 160))) == 3
    parts = pulled(engine, batch, loss)
    assert_near(parts[1], whole[1], 1e-6)
    assert_same_gradients(parts[2], whole[2], 1e-5)
    assert_near(engine.forward(batch).result().logprobs, whole[1], 1e-6)


@pytest.fixture(params=[False, True], ids=["rounded", "compiled"])
def compiling(request: pytest.FixtureRequest) -> Iterator[None]:
    """As on Apple silicon: shapes rounded up, and functions compiled; on this machine a C++ compiler does that."""
    if request.param and (os.environ.get("HYPOTHESIS_PROFILE") != "thorough" or not shutil.which("g++")):
        pytest.skip("MLX compiles by g++ on a CPU, which takes two minutes: `make soak` runs it")
    yield
    mx.disable_compile()


def test_compiled_passes_over_rounded_shapes_give_the_same(
    compiling: None, request: pytest.FixtureRequest, shaped: Shaped, own_home: Path
) -> None:
    from luthier.engines.mlx.engine import MlxEngine

    small = shaped("llama", num_hidden_layers=1)
    plain = build("mlx", small, own_home, keys={"dropout": 0.2})
    loaded = build("mlx", small, own_home, keys={"dropout": 0.2})
    compiled = MlxEngine(loaded._plan, loaded._resolved, loaded._loaded, compiles=True)
    if "compiled" in request.node.name:
        mx.enable_compile()
    for engine in (plain, compiled):
        begin(engine)
    for items in (ITEMS, ITEMS[:2], ITEMS):
        one, other = (pulled(engine, *imitation(items, step=1)) for engine in (plain, compiled))
        assert_near(other[1], one[1], 1e-5)
        assert_same_gradients(other[2], one[2])
    for engine in (plain, compiled):
        steps(engine)
    found = [engine.forward(build_batch(ITEMS)).result() for engine in (plain, compiled)]
    assert_near(found[1].logprobs, found[0].logprobs, 1e-4)
    assert (found[0].hits == found[1].hits).all()


METAL = "[metal::malloc] Attempting to allocate 48736917632 bytes which is greater than the maximum allowed buffer size"


@pytest.mark.parametrize(("said", "error"), [(METAL, OutOfMemory), ("shapes do not fit", RuntimeError)])
def test_memory_that_runs_out_on_metal_is_told_as_every_engine_tells_it(
    said: str, error: type, shaped: Shaped, own_home: Path
) -> None:
    """Only its words can be tried here: on a CPU, MLX ends the process when memory runs out."""
    engine = build("mlx", shaped("llama"), own_home)
    whole = engine._loaded.parts

    def decoder(tokens: Any) -> Any:
        raise RuntimeError(said)

    engine._loaded.parts = type(whole)(whole.model, decoder, whole.head)
    with pytest.raises(error):
        engine.forward_backward(*imitation(ITEMS))
    engine._loaded.parts = whole
    assert engine.optim_step(StepParams(1e-3)).result().grad_norm == 0


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma"])
def test_a_whole_model_is_one_that_transformers_loads(
    kind: str, shaped: Shaped, own_home: Path, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    engine = build("mlx", shaped(kind, sliding_window=64), own_home, "full")
    steps(engine)
    engine.save("weights").write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    tokens = ITEMS[1].sequences[0]
    with torch.no_grad():
        logits = load_plain(tmp_path)(torch.from_numpy(tokens)[None]).logits[0].log_softmax(-1).numpy()
    item = ITEMS[1]
    found = engine.forward(build_batch([item])).result().logprobs
    places = item.trained[0]
    assert_near(found, logits[places - 1, tokens[places]], 1e-5)


def test_a_model_that_mlx_lm_holds_otherwise_than_its_files_is_not_trained_in_full(
    shaped: Shaped, own_home: Path
) -> None:
    """Experts are one tensor in mlx_lm's model and many in the files."""
    with pytest.raises(UnsupportedError, match="could not be written back"):
        build("mlx", shaped("mixtral"), own_home, "full")


def test_a_model_that_mlx_lm_changes_while_loading_is_not_trained_in_full(
    shaped: Shaped, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By names and shapes alone it would be written back wrong."""
    from mlx_lm.models import llama

    before = llama.Model.sanitize

    def turned(self: Any, weights: Any) -> Any:
        return {name: each + 1 if "norm" in name else each for name, each in before(self, weights).items()}

    monkeypatch.setattr(llama.Model, "sanitize", turned)
    with pytest.raises(UnsupportedError, match="changes `model"):
        build("mlx", shaped("llama"), own_home, "full")


def test_weights_of_another_model_are_refused(shaped: Shaped, own_home: Path, tmp_path: Path) -> None:
    engine = build("mlx", shaped("llama", num_hidden_layers=2), own_home, "full")
    engine.save("weights").write(tmp_path)
    with pytest.raises(CheckpointError, match="which this run trains"):
        build("mlx", shaped("llama"), own_home, "full").load(tmp_path)


def test_trained_weights_and_moments_are_fp32_over_a_bf16_base(shaped: Shaped, own_home: Path) -> None:
    for method in ("lora", "full"):
        engine = build("mlx", shaped("llama"), own_home, method, compute={"precision": "bf16"})
        steps(engine, 1)
        before = dict(engine._masters.arrays)
        engine.forward_backward(*imitation(ITEMS, scale=0.05))
        engine.optim_step(StepParams(1e-6)).result()
        state = engine._stepper.state()
        assert {each.dtype for name, each in state.items() if "/" in name} == {np.dtype(np.float32)}
        assert {each.dtype for each in engine._masters.arrays.values()} == {mx.float32}
        moved = [(mx.abs(before[name] - each).max() > 0).item() for name, each in engine._masters.arrays.items()]
        assert all(moved)  # in bf16 a step this small would move next to nothing
        assert engine._loaded.model.layers[0].input_layernorm.weight.dtype == mx.bfloat16


def test_where_it_is_not_installed_the_error_is_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "mlx" else real(name, *more))
    with pytest.raises(MissingExtraError, match="`mlx`") as error:
        find_engine("mlx")
    assert error.value.hint == "run: pip install 'luthier[mlx]'"


def test_where_the_machine_cannot_run_it_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    real = importlib.import_module

    def broken(name: str, *more: Any) -> Any:
        if name == "mlx.core":
            raise ImportError("libmlx.so: cannot open shared object file")
        return real(name, *more)

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(MissingExtraError, match="cannot run it: libmlx") as error:
        find_engine("mlx")
    assert "luthier[mlx]" in error.value.hint
    assert "Apple silicon" in error.value.hint
