"""A GGUF file says what the model says: transformers' own reader gives the same logits and the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.adapters import gguf as writing
from luthier.adapters.gguf import GgufFacts, write_gguf
from luthier.adapters.gguf_layout import build_metadata, read_settings, rope_factors, rotary_order
from luthier.adapters.gguf_vocabulary import BYTE, CONTROL, UNKNOWN, UNUSED, USER_DEFINED, read_vocabulary
from luthier.adapters.merge import Stopped
from luthier.errors import CallError, ModelError, ProofError, UnsupportedError
from luthier.runs.resolve import practice_folder
from luthier.weights.shards import TensorFile, read_model_files
from luthier.weights.tensors import read_config
from tests.unit.adapters.whole import KINDS, TEXTS, save_model, save_tokenizer

quiet = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
NAME = "model.gguf"


def logits(model: Any, size: int) -> np.ndarray:
    import torch

    with torch.no_grad():
        found: np.ndarray = model.eval()(torch.arange(min(size, 200))[None]).logits[0].float().numpy()
    return found


def load(folder: Path, **options: Any) -> Any:
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def read(path: Path) -> Any:
    import gguf

    return gguf.GGUFReader(path)


def numbers(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file as the package's own quantisers read it."""
    import gguf

    return {each.name: gguf.dequantize(each.data, each.tensor_type) for each in read(path).tensors}


def facts_of(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in read(path).fields.items()}


# -- against transformers --------------------------------------------------------------------------------------------


@quiet
@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_same_model_from_the_file_alone(tmp_path: Path, kind: str) -> None:
    import transformers

    model = save_model(tmp_path / "model", kind)
    facts = write_gguf(model, tmp_path / NAME, "f32", name="a name")
    size = read_config(model)["vocab_size"]
    # This reader takes it that a Llama has no biases, and would leave them out.
    told = {"config": transformers.AutoConfig.from_pretrained(model)} if "biases" in kind else {}
    expected, found = logits(load(model), size), logits(load(tmp_path, gguf_file=NAME, **told), size)
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()
    assert np.abs(expected).max() > 0.5
    assert (facts.kind, set(facts.types)) == ("f32", {"f32"})


@quiet
@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_same_tokens_from_the_file_alone(tmp_path: Path, kind: str) -> None:
    import transformers

    model = save_model(tmp_path / "model", kind)
    write_gguf(model, tmp_path / NAME)
    ours = transformers.AutoTokenizer.from_pretrained(model)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=NAME)
    for text in TEXTS:
        assert theirs(text).input_ids == ours(text).input_ids, text
    assert (theirs.bos_token, theirs.eos_token) == (ours.bos_token, ours.eos_token)
    assert theirs.chat_template == ours.chat_template


@quiet
@pytest.mark.torch
@pytest.mark.parametrize("kind", ["own", "f32", "bf16", "q8_0"])
def test_the_practice_model_is_the_same_behind_the_file(tmp_path: Path, kind: str) -> None:
    import transformers

    facts = write_gguf(practice_folder(), tmp_path / NAME, kind)
    config = transformers.AutoConfig.from_pretrained(practice_folder())  # this reader knows no head_dim of Qwen 3
    expected = logits(load(practice_folder()), 200)
    found = logits(load(tmp_path, gguf_file=NAME, config=config), 200)
    assert np.abs(found - expected).max() <= (0.03 if kind == "q8_0" else 0.0) * np.abs(expected).max()
    assert facts.kind == ("bf16" if kind == "own" else kind)
    assert facts.types == {kind: 46} if kind == "f32" else {facts.kind: 29, "f32": 17}
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=NAME)
    ours = transformers.AutoTokenizer.from_pretrained(practice_folder())
    for text in (*TEXTS, "<|im_start|>user\n<think>hi</think><|im_end|>\n"):
        assert theirs(text).input_ids == ours(text).input_ids, text


@pytest.mark.torch
def test_rope_factors_are_those_of_llama_3() -> None:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = transformers.LlamaConfig(rope_parameters=rope, head_dim=128, max_position_embeddings=131072)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 500000.0 ** (np.arange(0, 128, 2) / 128)
    found = rope_factors(read_settings(config.to_dict()))
    assert found is not None
    np.testing.assert_allclose(found, plain / scaled.numpy(), rtol=1e-5)
    assert (found.min(), found.max()) == (1.0, 8.0)


@quiet
@pytest.mark.torch
def test_llama_3_s_factors_are_in_the_file(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 128}
    model = save_model(tmp_path / "model", "llama", rope_parameters=rope, rope_theta=500000.0)
    write_gguf(model, tmp_path / NAME)
    assert numbers(tmp_path / NAME)["rope_freqs.weight"].shape == (8,)


# -- numbers ---------------------------------------------------------------------------------------------------------


@quiet
@pytest.mark.torch
@pytest.mark.parametrize(("kind", "unit"), [("f32", 0.0), ("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 254)])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_every_number_is_within_the_error_of_its_type(tmp_path: Path, name: str, kind: str, unit: float) -> None:
    model = save_model(tmp_path / "model", name)
    write_gguf(model, tmp_path / "exact.gguf", "f32")
    write_gguf(model, tmp_path / NAME, kind)
    exact, found = numbers(tmp_path / "exact.gguf"), numbers(tmp_path / NAME)
    assert exact.keys() == found.keys()
    for key, values in exact.items():
        if values.ndim == 1:
            assert np.array_equal(found[key], values), key
            continue
        # Of q8_0 half a step of the block's scale, which is itself a rounded f16; of the others half a last place.
        blocks = np.abs(values.reshape(-1, 32)).max(1, keepdims=True).repeat(32, 1).reshape(values.shape)
        bound = unit * (blocks * 1.13 if kind == "q8_0" else np.abs(values)) + 1e-7
        assert (np.abs(found[key] - values) <= bound).all(), key


@pytest.mark.parametrize("kind", ["own", "f16", "q8_0"])
@pytest.mark.parametrize("number", [0, -1])
def test_a_file_that_holds_something_else_is_found(
    tmp_path: Path, kind: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    quantize, asked = gguf.quants.quantize, []

    def wrong_once(values: np.ndarray, type_: Any) -> np.ndarray:
        asked.append(values.shape)
        if len(asked) == 9:
            values = values.copy()
            values.flat[number] += 0.05 * np.abs(values).max()
        return quantize(values, type_)

    monkeypatch.setattr(gguf.quants, "quantize", wrong_once)
    with pytest.raises(ProofError, match=r"does not hold the model .* 1 numbers of `[\w.]+` are not the model's"):
        write_gguf(practice_folder(), tmp_path / NAME, kind)


@quiet
@pytest.mark.torch
def test_queries_and_keys_are_permuted_and_norms_are_offset(tmp_path: Path) -> None:
    llama, gemma = save_model(tmp_path / "llama", "llama"), save_model(tmp_path / "gemma", "gemma2")
    for folder in (llama, gemma):
        write_gguf(folder, folder / NAME, "f32")
    stored = {name: file for file in read_model_files(llama).values() for name in file.entries}
    query = stored["model.layers.1.self_attn.q_proj.weight"].read_floats("model.layers.1.self_attn.q_proj.weight")
    found = numbers(llama / NAME)
    order = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]
    assert rotary_order(16, 16).tolist() == order
    assert np.array_equal(found["blk.1.attn_q.weight"][:16], query[order])
    assert np.array_equal(found["blk.1.attn_q.weight"][16:32], query[16:32][order])
    value = stored["model.layers.1.self_attn.v_proj.weight"].read_floats("model.layers.1.self_attn.v_proj.weight")
    assert np.array_equal(found["blk.1.attn_v.weight"], value)
    norms = {name: file for file in read_model_files(gemma).values() for name in file.entries}
    for source, name in (("model.norm", "output_norm"), ("model.layers.0.pre_feedforward_layernorm", "blk.0.ffn_norm")):
        values = norms[f"{source}.weight"].read_floats(f"{source}.weight")
        assert np.array_equal(numbers(gemma / NAME)[f"{name}.weight"], values + 1)


@quiet
@pytest.mark.torch
@pytest.mark.parametrize("kind", ["q8_0", "bf16"])
def test_a_few_rows_at_a_time_give_the_same_file(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model", "llama with biases")
    write_gguf(model, tmp_path / "whole.gguf", kind)
    largest = 0
    original = TensorFile.read_floats

    def watched(self: TensorFile, name: str, rows: slice | None = None) -> Any:
        nonlocal largest
        found = original(self, name, rows)
        largest = max(largest, found.size)
        return found

    monkeypatch.setattr(writing, "_BLOCK_VALUES", 1000)
    monkeypatch.setattr(TensorFile, "read_floats", watched)
    write_gguf(model, tmp_path / NAME, kind)
    assert (tmp_path / NAME).read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert largest <= 32 * 64  # one head, the least that can change places


@quiet
@pytest.mark.torch
def test_rows_that_the_quantiser_cannot_divide_are_f16_and_said(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama", intermediate_size=72)
    facts = write_gguf(model, tmp_path / NAME, "q8_0")
    assert facts.types["f16"] == 2
    assert any("no multiple of 32" in note for note in facts.notes)


@quiet
@pytest.mark.torch
def test_a_number_beyond_f16_is_an_error_and_not_infinite(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    model = save_model(tmp_path / "model", "llama")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ModelError, match="f16 cannot hold"):
        write_gguf(model, tmp_path / NAME, "f16")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = np.nan
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ModelError, match="not finite"):
        write_gguf(model, tmp_path / NAME, "f32")


def test_asked_to_stop_it_stops(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        write_gguf(practice_folder(), tmp_path / NAME, should_stop=lambda: True)
    with pytest.raises(CallError, match="no such type of GGUF: q4_k"):
        write_gguf(practice_folder(), tmp_path / NAME, "q4_k")


# -- metadata --------------------------------------------------------------------------------------------------------


def test_the_practice_model_s_metadata(tmp_path: Path) -> None:
    written: GgufFacts = write_gguf(practice_folder(), tmp_path / NAME, name="the name")
    facts = facts_of(tmp_path / NAME)
    wanted = {
        "general.architecture": "qwen3",
        "general.name": "the name",
        "qwen3.context_length": 4096,
        "qwen3.attention.key_length": 64,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.rope.freq_base": 10000.0,
        "qwen3.vocab_size": 2048,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eos_token_id": 2041,
        "tokenizer.ggml.padding_token_id": 2039,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: facts[key] for key in wanted} == wanted
    assert "tokenizer.ggml.bos_token_id" not in facts
    assert facts["tokenizer.chat_template"].startswith("{%- if tools %}")
    assert "output.weight" not in numbers(tmp_path / NAME)
    assert any("NFC" in note for note in written.notes)


GEMMA = {"model_type": "gemma2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
GEMMA |= {"intermediate_size": 96, "max_position_embeddings": 128, "vocab_size": 100, "head_dim": 32}


def test_caps_windows_and_both_rotary_bases_of_gemma() -> None:
    found, _ = build_metadata(read_settings({**GEMMA, "sliding_window": 16}))
    assert found["gemma2.attn_logit_softcapping"] == 50.0
    assert found["gemma2.final_logit_softcapping"] == 30.0
    assert found["gemma2.attention.sliding_window"] == 16
    rope = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6}}
    rope["sliding_attention"] = {"rope_type": "default", "rope_theta": 3e4}
    third = {"model_type": "gemma3", "text_config": {**GEMMA, "model_type": "gemma3_text", "rope_parameters": rope}}
    found, _ = build_metadata(read_settings(third))
    assert (found["gemma3.rope.freq_base"], found["gemma3.rope.freq_base_swa"]) == (2e6, 3e4)
    assert (found["gemma3.rope.scaling.type"], found["gemma3.rope.scaling.factor"]) == ("linear", 8.0)
    assert not any("softcapping" in key for key in found)
    older = {**GEMMA, "model_type": "gemma3_text", "rope_local_base_freq": 1e4, "rope_scaling": {"type": "linear"}}
    older["rope_scaling"]["factor"] = 4.0
    found, _ = build_metadata(read_settings(older))
    assert (found["gemma3.rope.freq_base"], found["gemma3.rope.scaling.factor"]) == (1e6, 4.0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "phi3"}, "`phi3`"),
        ({"hidden_activation": "relu"}, "relu"),
        ({"query_pre_attn_scalar": 7}, "query_pre_attn_scalar = 7"),
        ({"layer_types": ["full_attention", "full_attention"]}, "sliding windows"),
        ({"tie_word_embeddings": False}, "head of its own"),
        ({"attn_logit_softcapping": None}, "attn_logit_softcapping"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "longrope"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 3}}, "beta_fast"),
        ({"use_bidirectional_attention": True}, "both directions"),
    ],
)
def test_what_llama_cpp_would_compute_differently_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UnsupportedError, match=told) as caught:
        build_metadata(read_settings({**GEMMA, **changes}))
    assert "--to merged" in caught.value.hint


def test_a_window_that_llama_cpp_leaves_out_is_a_note() -> None:
    config = {**GEMMA, "model_type": "mistral", "sliding_window": 64}
    found, notes = build_metadata(read_settings(config))
    assert found["llama.attention.sliding_window"] == 64
    assert "beyond the window of 64" in notes[0]
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e6}
    found, notes = build_metadata(read_settings({**GEMMA, "model_type": "qwen2", "rope_parameters": yarn}))
    assert found["qwen2.rope.scaling.original_context_length"] == 32
    assert notes == []


def test_weights_that_do_not_fit_their_config_are_refused(tmp_path: Path) -> None:
    for path in practice_folder().iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(ModelError, match="5 equal layers"):
        write_gguf(tmp_path, tmp_path / NAME)
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(ModelError, match=r"no tensor for output\.weight"):
        write_gguf(tmp_path, tmp_path / NAME)
    (tmp_path / "config.json").write_text(json.dumps(config))


# -- vocabularies ----------------------------------------------------------------------------------------------------


def test_tokens_have_their_types(tmp_path: Path) -> None:
    found = read_vocabulary(practice_folder(), 2050)
    by_token = dict(zip(found.tokens, found.types, strict=True))
    assert by_token["<|im_end|>"] == CONTROL
    assert by_token["<think>"] == USER_DEFINED
    assert by_token["[PAD2049]"] == UNUSED
    assert (found.pre, found.model, found.scores) == ("qwen2", "gpt2", None)
    size = save_tokenizer(tmp_path, "pieces")
    pieces = read_vocabulary(tmp_path, size)
    by_token = dict(zip(pieces.tokens, pieces.types, strict=True))
    assert (by_token["<unk>"], by_token["<s>"], by_token["<0x0A>"]) == (UNKNOWN, CONTROL, BYTE)
    assert (pieces.model, pieces.pre, pieces.merges) == ("llama", "default", None)
    assert (pieces.adds_bos, pieces.adds_eos) == (True, False)
    assert pieces.scores is not None
    scores = dict(zip(pieces.tokens, pieces.scores, strict=True))
    assert scores["\u2581l"] > scores["\u2581lo"] > scores["\u2581low"] > scores["q"]


def changed(folder: Path, kind: str, **changes: Any) -> Path:
    save_tokenizer(folder, kind)
    facts = json.loads((folder / "tokenizer.json").read_bytes())
    model = changes.pop("model", {})
    facts = {**facts, **changes, "model": {**facts["model"], **model}}
    (folder / "tokenizer.json").write_text(json.dumps(facts))
    return folder


def test_a_tokenizer_without_a_name_at_llama_cpp_is_refused(tmp_path: Path) -> None:
    steps = [
        {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    odd = changed(tmp_path, "practice", pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
    with pytest.raises(UnsupportedError, match="no name for the pattern"):
        read_vocabulary(odd, 2048)
    lower = changed(tmp_path, "practice", normalizer={"type": "Lowercase"})
    with pytest.raises(UnsupportedError, match="normalizer Lowercase"):
        read_vocabulary(lower, 2048)
    skips = changed(tmp_path, "practice", model={"ignore_merges": True})
    with pytest.raises(UnsupportedError, match="skip the merges"):
        read_vocabulary(skips, 2048)


@pytest.mark.parametrize(
    ("step", "name"),
    [
        ({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}, "gpt-2"),
        (None, "smollm"),
    ],
)
def test_plain_byte_level_tokenizers_have_names(tmp_path: Path, step: dict[str, Any] | None, name: str) -> None:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]}
    folder = changed(tmp_path, "level", pre_tokenizer=step or digits, model={"ignore_merges": False})
    assert read_vocabulary(folder, 2048).pre == name


@pytest.mark.parametrize(
    ("before", "normalizer", "template", "adds"),
    [
        ("first", None, "", True),
        ("first", None, "{{ messages }}", False),
        ("always", None, "{{ messages }}", True),
        ("never", None, "", False),
        (None, {"type": "Prepend", "prepend": "\u2581"}, "{{ messages }}", True),
        (None, None, "", False),
    ],
)
def test_llama_cpp_adds_the_space_that_the_tokenizer_adds(
    tmp_path: Path, before: str | None, normalizer: dict[str, Any] | None, template: str, adds: bool
) -> None:
    size = save_tokenizer(tmp_path, "pieces")
    marks = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": before, "split": False}
    changed(tmp_path, "pieces", pre_tokenizer=marks if before else None, normalizer=normalizer)
    if template:
        (tmp_path / "chat_template.jinja").write_text(template)
    found = read_vocabulary(tmp_path, size)
    assert found.adds_space is adds
    assert bool(found.notes) == (before == "first")


def test_merges_that_sentencepiece_would_not_make_are_refused(tmp_path: Path) -> None:
    size = save_tokenizer(tmp_path, "pieces")
    merges = json.loads((tmp_path / "tokenizer.json").read_bytes())["model"]["merges"]
    with pytest.raises(UnsupportedError, match="not those of SentencePiece"):
        read_vocabulary(changed(tmp_path, "pieces", model={"merges": merges[:-1]}), size)
    with pytest.raises(ModelError, match=f"the embeddings have {size - 1} rows"):
        read_vocabulary(changed(tmp_path, "pieces"), size - 1)
