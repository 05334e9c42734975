"""Whole tiny models with tokenizers of their own kind, as the exports need them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from luthier.runs.resolve import practice_folder

WORDS = ("the", "hello", "world", "low", "lower", "newest", "and", "a", "is", "it")
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = (
    "hello world",
    "the lowest and  newest\n\nis it 12345?",
    " leading and trailing ",
    "caf\u00e9 \u4f60\u597d \U0001f600",
    "<s>hello</s>",
    "",
)
_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
_GEMMA: dict[str, Any] = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 6, "rms_norm_eps": 1e-5}
# Sizes that transformers' own reader takes from the file alone; what it does not read is at its default.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("pieces", {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 5000.0}),
    "llama with biases": ("level", {"attention_bias": True, "num_attention_heads": 4, "head_dim": 32}),
    "mistral": ("pieces", {"num_attention_heads": 4, "head_dim": 32, "sliding_window": None}),
    "qwen2": ("practice", {"rms_norm_eps": 1e-5, "tie_word_embeddings": False}),
    "qwen3": ("practice", {"head_dim": 128, "tie_word_embeddings": True}),
    "gemma2": ("gemma", _GEMMA),
    "gemma3_text": ("gemma", {**_GEMMA, "num_hidden_layers": 7}),
}


def save_model(folder: Path, kind: str, *, dtype: str = "float32", seed: int = 0, **settings: Any) -> Path:
    """A model folder with random weights, norms and biases among them, and its tokenizer."""
    import torch
    import transformers

    tokenizer, given = KINDS[kind]
    folder.mkdir(parents=True)
    size = save_tokenizer(folder, tokenizer)
    torch.manual_seed(seed)
    sizes = {**_COMMON, "vocab_size": size + 3, "bos_token_id": 1, "eos_token_id": 2, **given, **settings}
    config = transformers.AutoConfig.for_model(kind.split(" ")[0], **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for values in model.parameters():
            if values.ndim == 1:
                values += torch.randn_like(values) * 0.1
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, kind: str) -> int:
    """tokenizer.json and tokenizer_config.json of one of the kinds of tokenizer; how many tokens it has."""
    if kind in ("practice", "level"):
        facts = json.loads((practice_folder() / "tokenizer.json").read_bytes())
        config = json.loads((practice_folder() / "tokenizer_config.json").read_bytes())
        if kind == "level":
            facts["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = LLAMA3
            facts |= {"normalizer": None}
            facts["model"]["ignore_merges"] = True
            config["tokenizer_class"] = "TokenizersBackend"
        size = len(facts["model"]["vocab"]) + len(facts["added_tokens"])
    else:
        facts = _pieces(is_gemma=kind == "gemma")
        size = len(facts["model"]["vocab"])
        named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
        config = {
            **named,
            "add_bos_token": True,
            "tokenizer_class": f"{'Gemma' if kind == 'gemma' else 'Llama'}Tokenizer",
        }
    (folder / "tokenizer.json").write_text(json.dumps(facts))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return size


def _pieces(*, is_gemma: bool) -> dict[str, Any]:
    """A BPE over characters with a mark for spaces and bytes for the rest, its merges as SentencePiece makes them."""
    pieces = list(dict.fromkeys(f"\u2581{word}"[:end] for word in WORDS for end in range(2, len(word) + 2)))
    letters = sorted({"\u2581", *"".join(WORDS), *"bcfgjkmpquvxyz0123456789?.,"})
    special = ["<unk>", "<s>", "</s>"]
    vocab = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(pieces, key=len), *letters]
    known = set(vocab)
    merges = []
    for piece in sorted(pieces, key=len):
        cuts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [list(pair) for pair in cuts if set(pair) <= known]
    added = [
        {"id": number, "content": token, "special": True, "normalized": False, "single_word": False}
        | {"lstrip": False, "rstrip": False}
        for number, token in enumerate(special)
    ]
    bos = {"id": "<s>", "type_id": 0}
    post = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": bos}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
    facts = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False},
        "post_processor": post,
        "decoder": {
            "type": "Sequence",
            "decoders": [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}],
        },
        "model": {**model, "vocab": {token: number for number, token in enumerate(vocab)}, "merges": merges},
    }
    if is_gemma:
        split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
        facts |= {
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            "pre_tokenizer": split,
        }
    return facts
