"""Merged = W + scale * B @ A with one rounding: against the equation, against PEFT, and nothing left over."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from safetensors.numpy import load_file, save_file

from luthier.adapters.merge import MergeFacts, Stopped, merge_adapter
from luthier.errors import CallError, DiskFullError, LuthierError, MissingPathError, ModelError, UnsupportedError
from luthier.runs.manifest import check_manifest
from luthier.runs.resolve import practice_folder
from luthier.weights.peft import AdapterConfig, write_adapter
from luthier.weights.shards import read_model_files, to_floats
from tests.unit.weights.tiny import (
    KINDS,
    TARGETS,
    VOCAB,
    apply_by_hand,
    assert_close,
    build_model,
    draw_adapter,
    load,
    logits,
    save_base,
    targets_of,
)

CONFIG = AdapterConfig("org/base", rank=2, alpha=8.0, targets=TARGETS)
Q0 = "model.layers.0.self_attn.q_proj"
quiet = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


# -- against the equation, without torch -----------------------------------------------------------------------------


def plain_base(folder: Path, *, tied: bool = True, dtype: Any = np.float32, **tensors: np.ndarray) -> Path:
    """A base of two tensors that is no real model, and a config and a tokenizer beside it."""
    draw = np.random.default_rng(0)
    weights = {
        "model.embed_tokens.weight": draw.normal(size=(6, 4)),
        f"{Q0}.weight": draw.normal(size=(5, 4)),
        "model.norm.weight": np.ones(4),
    }
    folder.mkdir()
    save_file({name: value.astype(dtype) for name, value in weights.items()} | tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes(orjson.dumps({"model_type": "llama", "tie_word_embeddings": tied}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def adapter(folder: Path, *, seed: int = 1, config: AdapterConfig | None = None, **whole: np.ndarray) -> Path:
    draw = np.random.default_rng(seed)
    config = config or replace(CONFIG, targets=("q_proj",))
    sides = {
        f"{Q0}.lora_A": draw.normal(size=(2, 4)).astype(np.float32),
        f"{Q0}.lora_B": draw.normal(size=(5, 2)).astype(np.float32),
    }
    named = {name.replace("__", "."): value for name, value in whole.items()}
    write_adapter(folder, replace(config, modules_to_save=tuple(name[:-7] for name in named)), sides | named)
    return folder


def update_of(folder: Path, scale: float = 4.0) -> np.ndarray:
    found = load_file(folder / "adapter_model.safetensors")
    prefix = f"base_model.model.{Q0}"
    return np.float32(scale) * (found[f"{prefix}.lora_B.weight"] @ found[f"{prefix}.lora_A.weight"])


def floats(folder: Path) -> dict[str, np.ndarray]:
    return {name: file.read_floats(name) for file in read_model_files(folder).values() for name in file.entries}


def test_only_the_adapted_tensor_changes_by_the_equation(tmp_path: Path) -> None:
    base, added, out = plain_base(tmp_path / "base"), adapter(tmp_path / "a"), tmp_path / "new" / "out"
    facts = merge_adapter(base, [added], out)
    before, after = floats(base), floats(out)
    assert before.keys() == after.keys()
    np.testing.assert_allclose(after[f"{Q0}.weight"], before[f"{Q0}.weight"] + update_of(added), rtol=1e-6)
    for name in set(before) - {f"{Q0}.weight"}:
        assert np.array_equal(before[name], after[name])
    assert facts == MergeFacts(1, 0, 3, 4 * (24 + 20 + 4), 1.0, facts.lost_share, True)
    assert facts.lost_share == 0
    assert sorted(path.name for path in tmp_path.rglob("*") if ".tmp-" in path.name) == []
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert set(check_manifest(out)["files"]) == {"model.safetensors", "config.json", "tokenizer.json"}


def test_adapters_apply_in_order_with_one_rounding(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", dtype=np.float16)
    first, second = adapter(tmp_path / "a"), adapter(tmp_path / "b", seed=2)
    merge_adapter(base, [first, second], tmp_path / "out")
    exact = floats(base)[f"{Q0}.weight"] + update_of(first) + update_of(second)
    assert np.array_equal(load_file(tmp_path / "out" / "model.safetensors")[f"{Q0}.weight"], exact.astype(np.float16))


def test_a_later_adapter_s_whole_module_replaces_what_was_there(tmp_path: Path) -> None:
    base, first = plain_base(tmp_path / "base"), adapter(tmp_path / "a", model__norm__weight=np.zeros(4, np.float32))
    second = adapter(tmp_path / "b", model__norm__weight=np.full(4, 3, np.float32))
    facts = merge_adapter(base, [first, second], tmp_path / "out")
    assert floats(tmp_path / "out")["model.norm.weight"].tolist() == [3.0] * 4
    assert (facts.adapted, facts.replaced) == (1, 1)


@pytest.mark.parametrize(("dtype", "kind", "named"), [("fp32", "F32", "float32"), ("bf16", "BF16", "bfloat16")])
def test_another_precision_is_written_and_said(tmp_path: Path, dtype: str, kind: str, named: str) -> None:
    base = plain_base(tmp_path / "base", dtype=np.float16, count=np.array([1, 2]))
    merge_adapter(base, [adapter(tmp_path / "a")], tmp_path / "out", dtype=dtype)
    (file,) = read_model_files(tmp_path / "out").values()
    assert {name: entry.dtype for name, entry in file.entries.items() if entry.dtype != kind} == {"count": "I64"}
    assert orjson.loads((tmp_path / "out" / "config.json").read_bytes())["dtype"] == named


def test_an_update_that_the_rounding_takes_away_shows_in_the_facts(tmp_path: Path) -> None:
    base, added = (
        plain_base(tmp_path / "base"),
        adapter(tmp_path / "a", config=replace(CONFIG, alpha=1e-4, targets=(Q0,))),
    )
    kept = merge_adapter(base, [added], tmp_path / "fp32")
    lost = merge_adapter(base, [added], tmp_path / "bf16", dtype="bf16")
    assert kept.changed_share == 1.0
    assert kept.lost_share < 0.01
    assert lost.changed_share < 0.2
    assert lost.lost_share > 0.5


def test_weights_are_taken_as_training_saw_them(tmp_path: Path) -> None:
    base, added, seen = plain_base(tmp_path / "base"), adapter(tmp_path / "a"), []

    def dequantise(name: str, weights: np.ndarray) -> np.ndarray | None:
        seen.append(name)
        return np.round(weights) if name.endswith("q_proj.weight") else None

    merge_adapter(base, [added], tmp_path / "out", dequantise=dequantise)
    assert sorted(seen) == [f"{Q0}.weight" if name == Q0 else name for name in ("model.embed_tokens.weight", Q0)]
    expected = np.round(floats(base)[f"{Q0}.weight"]) + update_of(added)
    np.testing.assert_allclose(floats(tmp_path / "out")[f"{Q0}.weight"], expected, rtol=1e-6)


def test_a_large_tensor_is_merged_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, added = plain_base(tmp_path / "base"), adapter(tmp_path / "a")
    merge_adapter(base, [added], tmp_path / "one")
    monkeypatch.setattr("luthier.adapters.merge._BLOCK_VALUES", 9)
    monkeypatch.setattr("luthier.weights.shards._BLOCK_BYTES", 7)
    merge_adapter(base, [added], tmp_path / "many")
    for name, values in floats(tmp_path / "one").items():
        np.testing.assert_allclose(floats(tmp_path / "many")[name], values, rtol=1e-6)


# -- embeddings and head ---------------------------------------------------------------------------------------------

HEAD, EMBED = "lm_head__weight", "model__embed_tokens__weight"
NEW, OTHER = np.full((6, 4), 2, np.float32), np.full((6, 4), 3, np.float32)


@pytest.mark.parametrize(
    ("whole", "stays_tied"),
    [({HEAD: NEW, EMBED: NEW}, True), ({HEAD: NEW}, False), ({EMBED: NEW}, False), ({HEAD: NEW, EMBED: OTHER}, False)],
    ids=["both alike", "head", "embeddings", "both unlike"],
)
@pytest.mark.parametrize("says", [True, None])
def test_a_change_of_one_matrix_parts_it(
    tmp_path: Path, whole: dict[str, np.ndarray], stays_tied: bool, says: bool | None
) -> None:
    base = plain_base(tmp_path / "base")
    if says is None:
        (base / "config.json").write_text("{}")
    before = floats(base)["model.embed_tokens.weight"]
    facts = merge_adapter(base, [adapter(tmp_path / "a", **whole)], tmp_path / "out")
    after, config = floats(tmp_path / "out"), orjson.loads((tmp_path / "out" / "config.json").read_bytes())
    assert facts.is_tied is stays_tied
    assert np.array_equal(after["model.embed_tokens.weight"], whole.get(EMBED, before))
    if stays_tied:
        assert facts.replaced == 1
        assert "lm_head.weight" not in after
        assert config.get("tie_word_embeddings") is says
    else:
        assert np.array_equal(after["lm_head.weight"], whole.get(HEAD, before))
        assert config["tie_word_embeddings"] is False


def test_a_low_rank_update_of_a_tied_head_leaves_the_embeddings(tmp_path: Path) -> None:
    base, ones = plain_base(tmp_path / "base"), np.ones((6, 2), np.float32)
    config = replace(CONFIG, targets=("lm_head",))
    write_adapter(tmp_path / "a", config, {"lm_head.lora_A": ones[:4].T.copy(), "lm_head.lora_B": ones})
    merge_adapter(base, [tmp_path / "a"], tmp_path / "out")
    before, after = floats(base), floats(tmp_path / "out")
    np.testing.assert_allclose(after["lm_head.weight"], before["model.embed_tokens.weight"] + 8, rtol=1e-6)
    assert np.array_equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_a_head_replaced_later_forgets_its_low_rank_update(tmp_path: Path) -> None:
    base, ones = plain_base(tmp_path / "base"), np.ones((6, 2), np.float32)
    sides = {"lm_head.lora_A": ones[:4].T.copy(), "lm_head.lora_B": ones}
    write_adapter(tmp_path / "a", replace(CONFIG, targets=("lm_head",)), sides)
    merge_adapter(base, [tmp_path / "a", adapter(tmp_path / "b", **{HEAD: NEW})], tmp_path / "out")
    assert np.array_equal(floats(tmp_path / "out")["lm_head.weight"], NEW)


# -- what is refused -------------------------------------------------------------------------------------------------


def rename(old: str, new: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda base: base.pop(f"{Q0}.weight"), f"one tensor of the adapter has no place in the base: {Q0}"),
        (
            lambda base: base.update({f"{Q0}.weight": np.ones((5, 5), np.float32)}),
            r"\[5, 4\] in the adapter and \[5, 5\]",
        ),
        (lambda base: base.update({"model.norm.weight": np.ones(5, np.float32)}), "`model.norm.weight` is"),
        (lambda base: base.update({f"{Q0}.weight": np.ones((5, 4), np.int8)}), "is I8"),
    ],
)
def test_an_adapter_of_another_base_is_refused(tmp_path: Path, change: Callable[[Any], Any], named: str) -> None:
    base = plain_base(tmp_path / "base")
    added = adapter(tmp_path / "a", model__norm__weight=np.ones(4, np.float32))
    weights = load_file(base / "model.safetensors")
    change(weights)
    save_file(weights, base / "model.safetensors")
    with pytest.raises((ModelError, UnsupportedError), match=named):
        merge_adapter(base, [added], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base", "home"]


def test_every_tensor_left_over_is_listed(tmp_path: Path) -> None:
    base, stray = plain_base(tmp_path / "base"), {"extra.weight": np.ones(2, np.float32)}
    added = adapter(tmp_path / "a", extra__weight=stray["extra.weight"], more__bias__x=np.ones(2, np.float32))
    with pytest.raises(ModelError, match="2 tensors of the adapter have no place") as caught:
        merge_adapter(base, [added], tmp_path / "out")
    assert caught.value.details == {"left_over": ["extra.weight", "more.bias.x"]}
    assert "org/base" in caught.value.hint


@pytest.mark.parametrize("prefix", ["layers", "model.model.layers", "language_model.model.layers"])
def test_a_base_that_names_its_layers_otherwise(tmp_path: Path, prefix: str) -> None:
    base, added = plain_base(tmp_path / "base"), adapter(tmp_path / "a")
    weights = load_file(base / "model.safetensors")
    other = f"{prefix}.0.self_attn.q_proj.weight"
    rename(f"{Q0}.weight", other)(weights)
    save_file(weights, base / "model.safetensors")
    if prefix.startswith("language_model"):
        tensors = load_file(added / "adapter_model.safetensors")
        save_file(
            {
                name.replace("model.model.layers", "model.model.language_model.layers"): value
                for name, value in tensors.items()
            },
            added / "adapter_model.safetensors",
        )
    merge_adapter(base, [added], tmp_path / "out")
    assert not np.array_equal(floats(tmp_path / "out")[other], weights[other])


def test_fp16_that_would_overflow_is_refused(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", dtype=np.float16)
    added = adapter(tmp_path / "a", config=replace(CONFIG, alpha=1e6, targets=("q_proj",)))
    with pytest.raises(ModelError, match=f"`{Q0}.weight` has numbers after the merge that F16 cannot hold"):
        merge_adapter(base, [added], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights[f"{Q0}.weight"][2, 1] = np.nan
    save_file(weights, base / "model.safetensors")
    with pytest.raises(ModelError, match="not finite after the merge"):
        merge_adapter(base, [adapter(tmp_path / "a")], tmp_path / "out")


@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_a_merge_that_is_stopped_leaves_nothing(tmp_path: Path, after: int) -> None:
    base, added, polls = plain_base(tmp_path / "base"), adapter(tmp_path / "a"), iter(range(100))
    total = len(floats(base))

    def should_stop() -> bool:
        return next(polls) >= after

    if after < total:
        with pytest.raises(Stopped):
            merge_adapter(base, [added], tmp_path / "out", should_stop=should_stop)
    else:
        merge_adapter(base, [added], tmp_path / "out", should_stop=should_stop)
    assert [path.name for path in tmp_path.iterdir() if ".tmp" in path.name] == []
    assert (tmp_path / "out").exists() is (after >= total)


def test_what_is_there_already_is_not_overwritten(tmp_path: Path) -> None:
    base, added = plain_base(tmp_path / "base"), adapter(tmp_path / "a")
    with pytest.raises(CallError, match="already there"):
        merge_adapter(base, [added], base)


def test_a_disk_without_room_is_told_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, added = plain_base(tmp_path / "base"), adapter(tmp_path / "a")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(DiskFullError):
        merge_adapter(base, [added], tmp_path / "out")


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda base, added: (base / "config.json").unlink(), ModelError),
        (lambda base, added: (base / "config.json").write_text("{"), ModelError),
        (lambda base, added: (base / "model.safetensors").unlink(), ModelError),
        (lambda base, added: (base / "model.safetensors").rename(base / "pytorch_model.bin"), ModelError),
        (lambda base, added: os.truncate(base / "model.safetensors", 200), ModelError),
        (lambda base, added: shutil.rmtree(base), LuthierError),
        (lambda base, added: shutil.rmtree(added), MissingPathError),
        (lambda base, added: os.truncate(added / "adapter_model.safetensors", 100), ModelError),
    ],
)
def test_broken_folders_are_named(tmp_path: Path, spoil: Callable[[Path, Path], Any], error: type[Exception]) -> None:
    base, added = plain_base(tmp_path / "base"), adapter(tmp_path / "a")
    spoil(base, added)
    with pytest.raises(error):
        merge_adapter(base, [added], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CallError, match="fp8"):
        merge_adapter(tmp_path, [], tmp_path / "out", dtype="fp8")


# -- against PEFT and transformers -----------------------------------------------------------------------------------


def merged_by_peft(base: Path, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(load(base), folder).merge_and_unload()


@quiet
@pytest.mark.torch
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_fp32_equals_peft_s_merge(tmp_path: Path, kind: str, rslora: bool) -> None:
    base, config = save_base(tmp_path / "base", kind), replace(CONFIG, rslora=rslora, targets=targets_of(kind))
    write_adapter(tmp_path / "a", config, draw_adapter(build_model(kind), config))
    merge_adapter(base, [tmp_path / "a"], tmp_path / "out")
    ours, theirs = load(tmp_path / "out"), merged_by_peft(base, tmp_path / "a")
    for name, values in theirs.state_dict().items():
        np.testing.assert_allclose(ours.state_dict()[name], values, rtol=1e-5, atol=1e-6, err_msg=name)
    assert_close(logits(ours), logits(theirs))


@quiet
@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_within_one_rounding_of_the_equation_and_of_peft_s(tmp_path: Path, kind: str) -> None:
    base, config = save_base(tmp_path / "base", kind, dtype="bfloat16"), replace(CONFIG, targets=targets_of(kind))
    tensors = draw_adapter(build_model(kind), config)
    write_adapter(tmp_path / "a", config, tensors)
    merge_adapter(base, [tmp_path / "a"], tmp_path / "out")
    ours, theirs = load(tmp_path / "out"), merged_by_peft(base, tmp_path / "a")
    exact = apply_by_hand(load(base).float(), config, tensors).state_dict()
    for name, values in theirs.state_dict().items():
        found, told = ours.state_dict()[name], exact[name].float()
        assert str(found.dtype) == "torch.bfloat16"
        error = (found.float() - told).abs()
        assert (error <= told.abs() * 2**-8 + 1e-8).all(), name  # half a unit in the last place
        assert float((values.float() - told).abs().mean()) >= float(error.mean()) * 0.999, name


@quiet
@pytest.mark.torch
def test_a_base_of_several_files_keeps_its_files(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", shard="8KB", tie_word_embeddings=False)
    config, model = replace(CONFIG, modules_to_save=("lm_head",)), build_model("llama")
    tensors = draw_adapter(model, config) | {"lm_head.weight": np.full((VOCAB, 16), 0.5, np.float32)}
    write_adapter(tmp_path / "a", config, tensors)
    merge_adapter(base, [tmp_path / "a"], tmp_path / "out")
    files = sorted(path.name for path in base.glob("model-*.safetensors"))
    assert len(files) > 2
    assert sorted(path.name for path in (tmp_path / "out").glob("model-*.safetensors")) == files
    assert_close(logits(load(tmp_path / "out")), logits(apply_by_hand(model, config, tensors)))


@quiet
@pytest.mark.torch
@pytest.mark.parametrize("tied", [True, False], ids=["one matrix", "parted"])
@pytest.mark.parametrize("shard", ["1GB", "4KB"])
def test_transformers_reads_embeddings_and_head_as_they_were_trained(tmp_path: Path, tied: bool, shard: str) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=True, shard=shard)
    matrix = np.random.default_rng(5).normal(size=(VOCAB, 16)).astype(np.float32)
    whole = {"model.embed_tokens.weight": matrix, "lm_head.weight": matrix} if tied else {"lm_head.weight": matrix}
    config = replace(CONFIG, modules_to_save=tuple(name[:-7] for name in whole), tied=tied)
    tensors = draw_adapter(build_model("llama"), config) | whole
    write_adapter(tmp_path / "a", config, tensors)
    assert merge_adapter(base, [tmp_path / "a"], tmp_path / "out").is_tied is tied
    expected = build_model("llama", tie_word_embeddings=True)
    untied = build_model("llama", tie_word_embeddings=False)
    untied.load_state_dict(expected.state_dict())
    found = load(tmp_path / "out")
    assert found.config.tie_word_embeddings is tied
    assert_close(logits(found), logits(apply_by_hand(untied, config, tensors)))


@quiet
@pytest.mark.torch
def test_the_practice_model_merges_and_runs(tmp_path: Path) -> None:
    base, config = practice_folder(), AdapterConfig("practice", rank=4, alpha=8.0, targets=TARGETS)
    tensors = draw_adapter(load(base), config)
    write_adapter(tmp_path / "a", config, tensors)
    facts = merge_adapter(base, [tmp_path / "a"], tmp_path / "out")
    assert (facts.adapted, facts.is_tied) == (12, True)
    assert facts.changed_share > 0.9
    names = {path.name for path in base.iterdir() if path.suffix in (".json", ".safetensors")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"manifest.json"}
    before, after = read_model_files(base), read_model_files(tmp_path / "out")
    assert before["model.safetensors"].entries == after["model.safetensors"].entries
    exact = logits(apply_by_hand(load(base).float(), config, tensors))
    assert_close(logits(load(tmp_path / "out").float()), exact, 0.05)
    assert np.abs(exact - logits(load(base).float())).max() > 0.5


def test_bf16_bytes_of_untouched_tensors_are_the_base_s(tmp_path: Path) -> None:
    added = tmp_path / "a"
    config = AdapterConfig("practice", rank=1, alpha=1.0, targets=(Q0,))
    sides = {f"{Q0}.lora_A": np.zeros((1, 192), np.float32), f"{Q0}.lora_B": np.zeros((256, 1), np.float32)}
    write_adapter(added, config, sides)
    facts = merge_adapter(practice_folder(), [added], tmp_path / "out")
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (practice_folder() / name).read_bytes()
    assert (facts.changed_share, facts.lost_share) == (0.0, 0.0)
    assert to_floats(np.array([0x3F80], np.uint16), "BF16").tolist() == [1.0]
