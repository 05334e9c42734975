"""Loading: what the files lack is refused, leaks between packed segments are found, earlier adapters are applied."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from luthier.engines.verbs import StepParams
from luthier.errors import ModelError, UnsupportedError
from luthier.runs.resolve import AdapterRef
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
)

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
TOKENS = np.random.default_rng(4).integers(3, VOCAB, 19)


def plain_logprobs(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)[None]).logits[0].float().log_softmax(-1).numpy()


def train(engine: Any, steps: int = 2, seed: int = 0) -> None:
    batch, loss = imitation(draw_items(12, 17, 9, seed=seed), scale=0.1)
    for _ in range(steps):
        engine.forward_backward(batch, loss).result()
        assert engine.optim_step(StepParams(2e-2)).result().taken


def save(engine: Any, folder: Path) -> Path:
    folder.mkdir()
    engine.save("weights").write(folder)
    return folder


def edited(base: Path, folder: Path, change: Any) -> Path:
    """A copy of a model folder with other weights in its file."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


# -- the files ----------------------------------------------------------------------------------------------------


def test_weights_that_no_file_has_are_not_drawn_at_random(shaped: Shaped, own_home: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = edited(shaped("llama"), tmp_path / "torn", lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=name):
        build_engine(folder, own_home)


def test_weights_of_another_shape_are_refused(shaped: Shaped, own_home: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = edited(shaped("llama"), tmp_path / "odd", lambda tensors: tensors.update({name: torch.zeros(3, 3)}))
    with pytest.raises(ModelError, match="cannot load"):
        build_engine(folder, own_home)


def test_a_folder_without_weights_is_refused(shaped: Shaped, own_home: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(shaped("llama"), tmp_path / "bare")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot load"):
        build_engine(folder, own_home)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", [*SHAPES, *EXPERTS, *HYBRIDS])
def test_a_model_trained_in_full_loads_in_transformers_and_in_the_engine(
    kind: str, precision: str, shaped: Shaped, own_home: Path, tmp_path: Path
) -> None:
    plan = make_plan("full", compute={"precision": precision})
    engine = build_engine(shaped(kind), own_home, plan)
    before = logprobs_of(engine, TOKENS)
    train(engine)
    after = logprobs_of(engine, TOKENS)
    assert np.abs(after - before).max() > 0.1
    folder = save(engine, tmp_path / "model")
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    model = load_plain(folder, dtype=dtype)
    assert_near(plain_logprobs(model), after, {"fp32": 2e-5, "bf16": 4e-2}[precision])
    config, was = (orjson.loads((each / "config.json").read_bytes()) for each in (folder, shaped(kind)))
    assert {**config, "dtype": ""} == {**was, "dtype": ""}
    assert config["dtype"] == dtype
    other = build_engine(shaped(kind), own_home, plan)
    other.load(folder)
    assert_near(logprobs_of(other, TOKENS), after, 1e-7)


def test_a_generation_config_that_transformers_would_refuse_is_no_hindrance(
    shaped: Shaped, own_home: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(shaped("llama"), tmp_path / "base")
    asked = orjson.dumps({"do_sample": False, "temperature": 0.6, "top_p": 0.9})
    (base / "generation_config.json").write_bytes(asked)
    engine = build_engine(base, own_home, make_plan("full"))
    folder = save(engine, tmp_path / "model")
    assert (folder / "model.safetensors").is_file()
    assert (folder / "generation_config.json").read_bytes() == asked


# -- packing ------------------------------------------------------------------------------------------------------


def test_attention_that_gives_other_logits_than_the_model_s_own_is_refused(
    shaped: Shaped, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.engines.torch import attention

    attend = attention._attend
    monkeypatch.setattr(attention, "_attend", lambda *arguments: attend(*arguments) * 1.1)
    with pytest.raises(ModelError, match="other logits"):
        build_engine(shaped("llama"), own_home)


def test_a_leak_that_is_made_here_is_found(shaped: Shaped, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.engines.torch import attention

    lay_out = attention.lay_out
    items = draw_items(12, 9, (4, 3, 5))
    sound = build_engine(shaped("llama"), own_home)
    expected = sound.forward_backward(*imitation(items)).result()
    gradients = gradients_of(sound)

    def lay_out_as_one(batch: Any, device: Any) -> Any:
        return attention.Layout((len(batch.tokens),), (None,), device)

    monkeypatch.setattr(attention, "lay_out", lay_out_as_one)
    engine = build_engine(shaped("llama"), own_home)
    assert not engine.facts.is_packed
    computed = engine.forward_backward(*imitation(items)).result()
    assert_near(computed.logprobs, expected.logprobs)
    assert computed.value == pytest.approx(expected.value, rel=1e-5)
    assert_same_gradients(gradients_of(engine), gradients)
    assert lay_out is not attention.lay_out


@pytest.mark.parametrize("kind", HYBRIDS)
def test_a_loss_of_the_logprobs_is_computed_one_segment_at_a_time(kind: str, shaped: Shaped, own_home: Path) -> None:
    """DPO in a model that leaks: equal to each sequence through transformers alone."""
    from luthier.engines.verbs import Loss
    from luthier.training.batches import build_batch
    from luthier.training.losses import dpo

    engine = build_engine(shaped(kind), own_home, make_plan("full"))
    items = draw_items((6, 4, 5), (3, 5, 2))
    batch = build_batch(items)
    reference = engine.forward(batch).result().logprobs - 0.1 * np.arange(len(batch.targets))
    computed = engine.forward_backward(batch, Loss(lambda p: dpo(p, batch.offsets, reference), 0.5)).result()
    model = load_plain(shaped(kind))
    sums = []
    for item in items:
        for sequence, places in zip(item.sequences, item.trained, strict=True):
            ids = torch.from_numpy(sequence)
            logprobs = model(ids[None], use_cache=False).logits[0].log_softmax(-1)
            sums.append(logprobs[places - 1, ids[places]].sum())
    based = np.add.reduceat(reference, batch.offsets[:-1])
    margins = torch.stack([(sums[n] - based[n]) - (sums[n + 1] - based[n + 1]) for n in (0, 2)])
    loss = torch.nn.functional.softplus(-0.1 * margins).sum()
    (0.5 * loss).backward()
    assert computed.value == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: each.grad.numpy() for name, each in model.named_parameters() if each.grad is not None}
    assert_same_gradients(gradients_of(engine), expected)


# -- earlier adapters ---------------------------------------------------------------------------------------------


def test_a_run_starts_from_earlier_adapters_in_order(shaped: Shaped, own_home: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    refs = []
    for number, keys in enumerate(({"also_train": ["norm"]}, {"rslora": True, "targets": ["q_proj", "lm_head"]})):
        engine = build_engine(shaped("mistral"), own_home, make_plan(keys=keys, seed=number), refs)
        train(engine, seed=number)
        refs.append(AdapterRef(save(engine, tmp_path / f"adapter_{number}")))
    after = logprobs_of(engine, TOKENS)
    model = load_plain(shaped("mistral"))
    for ref in refs:
        model = PeftModel.from_pretrained(model, ref.path).merge_and_unload()
    assert_near(plain_logprobs(model), after, 1e-4)
    again = build_engine(shaped("mistral"), own_home, make_plan(), refs)
    assert_near(logprobs_of(again, TOKENS), after, 1e-4)


@pytest.mark.parametrize("kept", [True, False])
def test_adapters_trained_over_nf4_are_added_to_the_values_of_nf4(
    kept: bool, shaped: Shaped, own_home: Path, tmp_path: Path
) -> None:
    refs: list[AdapterRef] = []
    after: np.ndarray | None = None
    for number in range(3):
        engine = build_engine(shaped("llama"), own_home, make_plan("qlora", keeps_dequantised=kept), refs)
        start = logprobs_of(engine, TOKENS)
        if after is None:
            before = start
        else:  # in 4 bits once more, so that it is only about where the last one ended
            assert np.linalg.norm(start - after) < 0.5 * np.linalg.norm(start - before)
        train(engine, 5, seed=number)
        after = logprobs_of(engine, TOKENS)
        refs.append(AdapterRef(save(engine, tmp_path / f"adapter_{number}"), quantised=True))
        over = build_engine(shaped("llama"), own_home, make_plan(), refs)
        assert_near(logprobs_of(over, TOKENS), after, 1e-4)


# -- models of more than text -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 that reads images too, as the larger ones on the hub do."""
    import transformers

    from tests.unit.engines.tiny import SIZES

    sight = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model(
        "gemma3",
        text_config={**SIZES, **SHAPES["gemma3_text"]},
        vision_config={**sight, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=150,
        boi_token_index=151,
        eoi_token_index=152,
    )
    folder = tmp_path_factory.mktemp("gemma3")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_a_model_that_sees_is_trained_on_text_alone(seeing: Path, own_home: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    from luthier.weights.tensors import read_model_shape

    planned = read_model_shape(seeing)
    engine = build_engine(seeing, own_home, make_plan(keys={"targets": planned.targets}))
    assert engine.facts.is_packed
    assert len(engine._loaded.adapters) == len(planned.linears) == 21
    train(engine)
    model = PeftModel.from_pretrained(load_plain(seeing), save(engine, tmp_path / "adapter")).eval()
    assert_near(plain_logprobs(model), logprobs_of(engine, TOKENS), 1e-4)


def test_recomputing_where_a_model_cannot_is_refused(
    shaped: Shaped, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setattr(transformers.LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(UnsupportedError, match="recompute"):
        build_engine(shaped("llama"), own_home, make_plan(compute={"recompute": "always"}))
