"""A base in 4 bits held against bitsandbytes' own layer; its cache; and the code of the hub that is never asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.engines.conftest import Shaped
from tests.unit.engines.tiny import (
    SHAPES,
    VOCAB,
    assert_near,
    build_engine,
    draw_items,
    gradients_of,
    imitation,
    load_plain,
    logprobs_of,
    make_plan,
    start_update,
)

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
TOKENS = np.random.default_rng(4).integers(3, VOCAB, 19)
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def their_layer(linear: Any, *, double: bool) -> Any:
    """bitsandbytes' layer with the values of a linear layer, in training mode."""
    from luthier.engines.torch.nf4 import quantiser

    quantiser()  # imports bitsandbytes as the engine does
    import bitsandbytes

    dtype, has_bias = linear.weight.dtype, linear.bias is not None
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=has_bias,
        compute_dtype=dtype,
        compress_statistics=double,
        quant_type="nf4",
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data.clone(), requires_grad=False, compress_statistics=double, quant_type="nf4"
    )
    if has_bias:
        layer.bias = torch.nn.Parameter(linear.bias.data.clone())
    return layer.to("cpu").train()


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("precision", DTYPES)
def test_one_layer_computes_what_that_of_bitsandbytes_does_in_training(
    precision: str, double: bool, tmp_path: Path
) -> None:
    from luthier.engines.torch.nf4 import quantise_model

    dtype = getattr(torch, DTYPES[precision])
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(96, 130), "down": torch.nn.Linear(130, 96, bias=False)}).to(
        dtype
    )
    theirs = {name: their_layer(each, double=double) for name, each in model.items()}
    kept = torch.nn.ModuleDict({name: torch.nn.Linear(1, 1) for name in model})
    for name, each in model.items():
        kept[name] = torch.nn.Linear(each.in_features, each.out_features, bias=each.bias is not None, dtype=dtype)
        kept[name].load_state_dict(each.state_dict())
    for one, keep in ((model, False), (kept, True)):
        layers = dict(one.named_children())
        quantise_model(one, layers, double=double, keep_dequantised=keep, home=tmp_path, base_key="x")  # type: ignore[arg-type]
    for name, layer in theirs.items():
        x = torch.randn(7, layer.in_features, dtype=dtype)
        results, slopes = [], []
        for one in (layer, model[name], kept[name]):
            given = x.clone().requires_grad_(True)
            result = one(given)
            result.backward(torch.ones_like(result))
            results.append(result.detach())
            slopes.append(given.grad)
        for found in (results[1:], slopes[1:]):
            assert torch.equal(found[0], found[1])
        assert torch.equal(results[0], results[1])
        assert torch.equal(slopes[0], slopes[1])


@pytest.mark.parametrize("kind", SHAPES)
def test_a_model_in_4_bits_computes_what_it_does_with_layers_of_bitsandbytes(
    kind: str, shaped: Shaped, own_home: Path
) -> None:
    engine = build_engine(shaped(kind), own_home, make_plan("qlora"))
    model = load_plain(shaped(kind))
    before = model(torch.from_numpy(TOKENS)[None]).logits
    for name in engine._loaded.adapters:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, their_layer(model.get_submodule(name), double=True))
    model.train()
    logits = model(torch.from_numpy(TOKENS)[None]).logits
    assert (logits - before).abs().max() > 0.05
    assert_near(logprobs_of(engine, TOKENS), logits[0].log_softmax(-1).detach())


@pytest.mark.parametrize("precision", DTYPES)
def test_kept_dequantised_is_dequantised_each_time_bit_for_bit(precision: str, shaped: Shaped, own_home: Path) -> None:
    found = []
    for keeps in (True, False):
        plan = make_plan("qlora", keeps_dequantised=keeps, compute={"precision": precision})
        engine = build_engine(shaped("qwen2"), own_home, plan)
        start_update(engine)
        computed = engine.forward_backward(*imitation(draw_items(12, 17, 9))).result()
        found.append((computed.logprobs, gradients_of(engine)))
    assert np.array_equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    assert all(np.array_equal(each, found[1][1][name]) for name, each in found[0][1].items())


def test_the_quantised_weights_are_kept_for_the_next_load(
    shaped: Shaped, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.engines.torch import nf4

    counted = []
    functions = nf4.quantiser()
    quantise = functions.quantize_4bit

    def count(*arguments: Any, **settings: Any) -> Any:
        counted.append(1)
        return quantise(*arguments, **settings)

    monkeypatch.setattr(functions, "quantize_4bit", count)
    first = build_engine(shaped("llama"), own_home, make_plan("qlora"))
    assert len(counted) == len(first._loaded.adapters) == 21
    again = build_engine(shaped("llama"), own_home, make_plan("qlora", keys={"targets": ["q_proj"]}))
    assert len(counted) == 21
    assert np.array_equal(logprobs_of(first, TOKENS), logprobs_of(again, TOKENS))
    build_engine(shaped("llama"), own_home, make_plan("qlora", keys={"double_quant": False}))
    build_engine(shaped("llama", seed=1), own_home, make_plan("qlora"))
    build_engine(shaped("llama"), own_home, make_plan("qlora", compute={"precision": "bf16"}))
    assert len(counted) == 4 * 21


def test_only_a_tenth_of_the_bytes_is_held(shaped: Shaped, own_home: Path) -> None:
    engine = build_engine(shaped("llama"), own_home, make_plan("qlora"))
    held = [layer.base_weight for layer in engine._loaded.adapters.values()]
    full = sum(layer.in_features * layer.out_features * 4 for layer in engine._loaded.adapters.values())
    packed = sum(each.packed.numel() * each.packed.element_size() for each in held)
    assert packed == full / 8
    assert not any(
        parameter.dim() == 2 and "embed" not in name and "lm_head" not in name and "lora" not in name
        for name, parameter in engine._loaded.model.named_parameters()
    )


_SCRIPT = """
import sys
from pathlib import Path
from tests.unit.engines.tiny import build_engine, draw_items, imitation, make_plan

engine = build_engine(Path(sys.argv[1]), Path(sys.argv[2]), make_plan("qlora", compute={"precision": "bf16"}))
engine.forward_backward(*imitation(draw_items(9, 5))).result()
assert "bitsandbytes" in sys.modules
"""


@pytest.mark.slow
def test_no_code_is_fetched_from_the_hub_and_nothing_is_said_of_it(
    shaped: Shaped, own_home: Path, tmp_path: Path
) -> None:
    """A package `kernels` that would be noticed if anything imported it, whatever the processor can do."""
    trap = tmp_path / "packages" / "kernels"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\n")
    (trap.parent / "kernels-9.9.dist-info").mkdir()
    (trap.parent / "kernels-9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 9.9\n"
    )
    root = Path(__file__).parents[4]
    environment = {**os.environ, "PYTHONPATH": f"{trap.parent}{os.pathsep}{root}", "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(shaped("llama")), str(own_home)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    assert not (tmp_path / "imported").exists()
