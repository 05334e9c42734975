"""LoRA held against PEFT: gradients with the same start, and the files that PEFT loads; which layers are adapted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.errors import UnsupportedError
from tests.unit.engines.conftest import Shaped
from tests.unit.engines.tiny import (
    EXPERTS,
    HYBRIDS,
    SHAPES,
    VOCAB,
    assert_near,
    assert_same_gradients,
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
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:Model has `tie_word"),
]
TOKENS = np.random.default_rng(4).integers(3, VOCAB, 19)
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True, "rank": 9},
    "last layers": {"last_layers": 2},
    "head and norms": {"also_train": ["lm_head", "norm"]},
    "embeddings": {"also_train": ["embed_tokens"]},
    "adapted head": {"targets": ["lm_head", "o_proj"]},
}


def save(engine: Any, folder: Path) -> Path:
    folder.mkdir()
    engine.save("weights").write(folder)
    return folder


def load_with_peft(model: Any, folder: Path, *, trainable: bool = False) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder, is_trainable=trainable).eval()


def peft_logprobs(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)[None]).logits[0].float().log_softmax(-1).numpy()


def train(engine: Any, steps: int = 2) -> None:
    """A few steps that are large enough to move everything that is trained."""
    from luthier.engines.verbs import StepParams

    batch, loss = imitation(draw_items(12, 17, 9), scale=0.1)
    for _ in range(steps):
        engine.forward_backward(batch, loss).result()
        assert engine.optim_step(StepParams(2e-2)).result().taken


# PEFT parts what is tied while it trains, so a tied head is left out.
IN_TRAINING = [
    (kind, method)
    for kind, settings in SHAPES.items()
    for method in ("plain", "rslora", "last layers", "head and norms")
    if not (method == "head and norms" and settings.get("tie_word_embeddings"))
]


@pytest.mark.parametrize(("kind", "method"), IN_TRAINING)
def test_gradients_are_those_of_peft(kind: str, method: str, shaped: Shaped, own_home: Path, tmp_path: Path) -> None:
    engine = build_engine(shaped(kind), own_home, make_plan(keys=METHODS[method]))
    start_update(engine)
    model = load_with_peft(load_plain(shaped(kind)), save(engine, tmp_path / "adapter"), trainable=True)
    items = draw_items(12, 17, 9)
    batch, loss = imitation(items)
    computed = engine.forward_backward(batch, loss).result()
    for item in items:
        ids = torch.from_numpy(item.sequences[0])
        places = torch.from_numpy(item.trained[0])
        logprobs = model(ids[None]).logits[0].float().log_softmax(-1)
        (-logprobs[places - 1, ids[places]].sum()).backward()
    assert computed.value > 0
    found = gradients_of(engine)
    expected = {_own_name(name): each.grad.numpy() for name, each in model.named_parameters() if each.grad is not None}
    assert_same_gradients(found, expected)


def _own_name(name: str) -> str:
    for ending in ("lora_A", "lora_B"):
        name = name.replace(f"{ending}.default.weight", ending)
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", SHAPES)
def test_peft_loads_our_files_and_gives_our_logits(
    kind: str, method: str, shaped: Shaped, own_home: Path, tmp_path: Path
) -> None:
    engine = build_engine(shaped(kind), own_home, make_plan(keys=METHODS[method]))
    before = logprobs_of(engine, TOKENS)
    train(engine)
    after = logprobs_of(engine, TOKENS)
    assert np.abs(after - before).max() > 0.1
    assert all(each.any() for each in engine._masters.named().values())
    model = load_with_peft(load_plain(shaped(kind)), save(engine, tmp_path / "adapter"))
    assert_near(peft_logprobs(model), after, 1e-4)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("kind", SHAPES)
def test_peft_over_the_dequantised_base_gives_our_logits(
    kind: str, kept: bool, shaped: Shaped, own_home: Path, tmp_path: Path
) -> None:
    from luthier.engines.torch.nf4 import quantiser

    engine = build_engine(shaped(kind), own_home, make_plan("qlora", keeps_dequantised=kept))
    train(engine)
    base = load_plain(shaped(kind))
    before = peft_logprobs(base)
    with torch.no_grad():
        for name in engine._loaded.adapters:
            weight = base.get_submodule(name).weight
            packed, state = quantiser().quantize_4bit(weight.data, quant_type="nf4", compress_statistics=True)
            weight.copy_(quantiser().dequantize_4bit(packed, state))
    assert np.abs(peft_logprobs(base) - before).max() > 0.01
    model = load_with_peft(base, save(engine, tmp_path / "adapter"))
    assert_near(peft_logprobs(model), logprobs_of(engine, TOKENS), 1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_embeddings_and_head_both_named_are_trained_once(
    kind: str, shaped: Shaped, own_home: Path, tmp_path: Path
) -> None:
    plan = make_plan(keys={"also_train": ["lm_head", "embed_tokens"]}, compute={"precision": "bf16"})
    engine = build_engine(shaped(kind), own_home, plan)
    before = logprobs_of(engine, TOKENS)
    train(engine)
    after = logprobs_of(engine, TOKENS)
    assert np.abs(after - before).max() > 0.1
    folder = save(engine, tmp_path / "adapter")
    model = load_with_peft(load_plain(shaped(kind)), folder)
    assert_near(peft_logprobs(model), after, 3e-2)
    other = build_engine(shaped(kind), own_home, plan)
    other.load(folder)
    assert_near(logprobs_of(other, TOKENS), after, 1e-6)


# -- which layers -------------------------------------------------------------------------------------------------

DENSE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
FOUND = {
    **dict.fromkeys(SHAPES, DENSE),
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    **{kind: {"q_proj", "k_proj", "v_proj", "o_proj"} for kind in EXPERTS},
    "lfm2": {"in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "w1", "w2", "w3"},
}


def adapted(engine: Any) -> dict[str, int]:
    """The last names of the layers with an adapter, and how many of each."""
    names = [name.rpartition(".")[2] for name in engine._loaded.adapters]
    return {name: names.count(name) for name in set(names)}


@pytest.mark.parametrize("kind", [*SHAPES, *EXPERTS, *HYBRIDS])
def test_auto_finds_every_linear_layer_but_the_head_as_the_plan_does(kind: str, shaped: Shaped, own_home: Path) -> None:
    from luthier.weights.tensors import read_model_shape

    engine = build_engine(shaped(kind), own_home, make_plan(keys={"targets": "auto"}))
    planned = set(read_model_shape(shaped(kind)).linears)
    assert set(engine._loaded.adapters) == planned
    if kind in FOUND:
        assert set(adapted(engine)) == FOUND[kind]
    named = build_engine(shaped(kind), own_home, make_plan(keys={"targets": sorted(adapted(engine))}))
    assert set(named._loaded.adapters) == planned


@pytest.mark.parametrize("kind", [*SHAPES, *EXPERTS])
def test_the_plan_counts_what_is_trained(kind: str, shaped: Shaped, own_home: Path) -> None:
    from luthier.training.planner import count_trainable
    from luthier.weights.tensors import read_model_shape

    for method, keys in (
        ("lora", {}),
        ("lora", {"last_layers": 1, "also_train": ["norm"]}),
        ("lora", {"also_train": ["lm_head"], "targets": ["o_proj"]}),
        ("full", {}),
    ):
        plan = make_plan(method, keys=keys)
        counted = count_trainable(plan.spec.method, read_model_shape(shaped(kind))).total
        assert build_engine(shaped(kind), own_home, plan).facts.trainable_parameters == counted


def test_targets_may_be_whole_names(shaped: Shaped, own_home: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    engine = build_engine(shaped("llama"), own_home, make_plan(keys={"targets": [name]}))
    assert list(engine._loaded.adapters) == [name]


def test_the_last_layers_alone(shaped: Shaped, own_home: Path) -> None:
    engine = build_engine(
        shaped("llama"), own_home, make_plan(keys={"last_layers": 2, "targets": ["q_proj", "lm_head"]})
    )
    assert sorted(engine._loaded.adapters) == [
        "lm_head",
        "model.layers.1.self_attn.q_proj",
        "model.layers.2.self_attn.q_proj",
    ]


@pytest.mark.parametrize(
    ("kind", "target", "said"),
    [
        ("llama", "embed_tokens", "Embedding"),
        ("llama", "input_layernorm", "RMSNorm"),
        ("llama", "nothing_such", "no layer of this model"),
        ("qwen3_moe", "experts", "Experts"),
        ("qwen3_moe", "gate_up_proj", "a parameter of its own"),
        ("mixtral", "down_proj", "a parameter of its own"),
        ("qwen3_moe", "gate", "Router"),
    ],
)
def test_what_is_no_linear_layer_is_refused_by_name(
    kind: str, target: str, said: str, shaped: Shaped, own_home: Path
) -> None:
    with pytest.raises(UnsupportedError, match=f"`{target}` .*{said}"):
        build_engine(shaped(kind), own_home, make_plan(keys={"targets": ["q_proj", target]}))


def test_a_module_to_train_that_is_not_there_is_refused(shaped: Shaped, own_home: Path) -> None:
    with pytest.raises(UnsupportedError, match="`lm_haed`"):
        build_engine(shaped("llama"), own_home, make_plan(keys={"also_train": ["lm_haed"]}))


def test_a_layer_cannot_have_an_adapter_and_be_trained_whole(shaped: Shaped, own_home: Path) -> None:
    with pytest.raises(UnsupportedError, match="`q_proj` has an adapter already"):
        build_engine(shaped("llama"), own_home, make_plan(keys={"also_train": ["q_proj"]}))


# -- how it starts ------------------------------------------------------------------------------------------------


def test_the_start_is_a_function_of_the_seed_and_changes_nothing(shaped: Shaped, own_home: Path) -> None:
    first, again, other = (build_engine(shaped("llama"), own_home, make_plan(seed=seed)) for seed in (1, 1, 2))
    starts = [engine._masters.named() for engine in (first, again, other)]
    for name, each in starts[0].items():
        assert torch.equal(each, starts[1][name])
        assert name.endswith("lora_B") != bool(each.any())
        assert torch.equal(each, starts[2][name]) == name.endswith("lora_B")
        if name.endswith("lora_A"):
            bound = each.shape[1] ** -0.5
            assert bound * 0.9 < each.abs().max() <= bound
    assert_near(logprobs_of(first, TOKENS), peft_logprobs(load_plain(shaped("llama"))))
