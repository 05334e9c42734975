"""What a GGUF file says of a model besides its numbers: architectures, metadata, and where each tensor goes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from luthier.errors import ModelError, UnsupportedError
from luthier.extras import import_extra
from luthier.weights.header import TensorEntry
from luthier.weights.shards import Floats, TensorFile

Value = bool | int | float | str

_OTHER_TOWER = re.compile(r"(?:^|[._])(?:vision|visual|audio)(?:[._]|$)|multi_modal_projector|mm_projector")
_BLOCK = re.compile(r"^blk\.(\d+)\.")
_ELSEWHERE = "`luthier export --to merged` writes a folder that other converters can read"


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp computes a model type where that is not how transformers does."""

    name: str
    permutes: bool = False  # rotary pairs lie side by side, not half a head apart
    offsets_norms: bool = False  # norms are stored with the one that transformers adds
    activation: str = "silu"
    window_period: int = 0  # every n-th layer sees everything, the others a window
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of transformers, where config.json leaves them out


_GEMMA: dict[str, Any] = {"head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096, "rms_norm_eps": 1e-6}
_GEMMA3 = Architecture(
    "gemma3",
    offsets_norms=True,
    activation="gelu_pytorch_tanh",
    window_period=6,
    defaults={
        **_GEMMA,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
    },
)
ARCHITECTURES = {
    "llama": Architecture("llama", permutes=True),
    "mistral": Architecture("llama", permutes=True, defaults={"max_position_embeddings": 131072}),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", defaults={"head_dim": 128}),
    "gemma2": Architecture(
        "gemma2",
        offsets_norms=True,
        activation="gelu_pytorch_tanh",
        window_period=2,
        defaults={**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
}


@dataclass(frozen=True)
class Placed:
    """One tensor of the file: its name there, where its numbers come from, and what is done to them."""

    name: str
    shape: tuple[int, ...]
    file: TensorFile | None = None
    source: str = ""
    head_dim: int = 0  # of rows whose rotary pairs are brought side by side; 0 leaves the order
    offset: float = 0.0
    values: Floats | None = None  # in place of a source


@dataclass(frozen=True)
class Settings:
    """The text model's config with what it leaves out filled in."""

    kind: str
    architecture: Architecture
    table: Mapping[str, Any]

    def number(self, key: str) -> int:
        """A whole number that has to be there."""
        value = self.table.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"config.json: `{key}` is {value!r}, where a number is needed")
        return value

    @property
    def heads(self) -> int:
        """Heads of the queries."""
        return self.number("num_attention_heads")

    @property
    def head_dim(self) -> int:
        """Numbers of one head."""
        return self.number("head_dim") if self.table.get("head_dim") else self.number("hidden_size") // self.heads

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding table."""
        return bool(self.table.get("tie_word_embeddings", False))

    def rope(self, kind: str = "full_attention") -> dict[str, Any]:
        """The rotary settings of a kind of layer, under the names that transformers gives them now."""
        table = self.table
        found = table.get("rope_parameters") or {}
        nested = found.get(kind) if isinstance(found.get("full_attention"), dict) else found
        old = dict(table.get("rope_scaling") or {}) if kind == "full_attention" else {}
        rope = {**old, **(nested or {})}
        rope.setdefault("rope_type", rope.get("type", "default"))
        is_local = kind == "sliding_attention"
        usual = 10_000.0 if is_local or self.architecture.name != "gemma3" else 1_000_000.0
        rope.setdefault("rope_theta", table.get("rope_local_base_freq" if is_local else "rope_theta", usual))
        return rope


def read_settings(config: Mapping[str, Any]) -> Settings:
    """The settings of a model that can be written as GGUF; UnsupportedError names what cannot."""
    inner = config.get("text_config")
    text = {**config, **inner} if isinstance(inner, dict) else dict(config)
    kind = str(text.get("model_type"))
    architecture = ARCHITECTURES.get(kind)
    if architecture is None:
        raise UnsupportedError(
            f"a model of type `{kind}` cannot be written as GGUF here; these can: {', '.join(ARCHITECTURES)}",
            hint=_ELSEWHERE,
        )
    settings = Settings(kind, architecture, {**architecture.defaults, **text})
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    """Refuse what llama.cpp would compute differently without a word."""
    table, architecture = settings.table, settings.architecture
    activation = table.get("hidden_activation") or table.get("hidden_act") or architecture.activation
    if activation not in (architecture.activation, "gelu" if architecture.offsets_norms else ""):
        raise _refused(f"the activation `{activation}`", f"{architecture.name} has {architecture.activation}")
    if table.get("use_bidirectional_attention"):
        raise _refused("attention in both directions", "a model that generates has none")
    if architecture.name == "gemma2" and not settings.is_tied:
        raise _refused("a head of its own", "gemma2 uses its embeddings")
    period, types = architecture.window_period, table.get("layer_types")
    if period and (given := table.get("sliding_window_pattern", period)) != period:
        raise _refused(f"a sliding window pattern of {given}", f"{architecture.name} has {period}")
    if period and types:
        usual = ["sliding_attention" if (number + 1) % period else "full_attention" for number in range(len(types))]
        if types != usual:
            raise _refused("its own pattern of sliding windows", f"{architecture.name} has one of {period}")
    scalar = table.get("query_pre_attn_scalar")
    by_width = (architecture.name, settings.number("num_hidden_layers")) in (("gemma2", 46), ("gemma3", 62))
    usual_scalar = settings.number("hidden_size") // settings.heads if by_width else settings.head_dim
    if scalar is not None and scalar != usual_scalar:
        raise _refused(f"query_pre_attn_scalar = {scalar}", f"llama.cpp takes {usual_scalar}")


def _refused(what: str, instead: str) -> UnsupportedError:
    return UnsupportedError(f"GGUF: the model has {what}, and {instead}", hint=_ELSEWHERE)


def build_metadata(settings: Settings) -> tuple[dict[str, Value], list[str]]:
    """The keys of the architecture, and notes on what they do not carry."""
    table, name, notes = settings.table, settings.architecture.name, list[str]()
    eps = table.get("rms_norm_eps", 1e-6)
    found: dict[str, Value] = {
        "context_length": settings.number("max_position_embeddings"),
        "embedding_length": settings.number("hidden_size"),
        "block_count": settings.number("num_hidden_layers"),
        "feed_forward_length": settings.number("intermediate_size"),
        "attention.head_count": settings.heads,
        "attention.head_count_kv": int(table.get("num_key_value_heads") or settings.heads),
        "attention.key_length": settings.head_dim,
        "attention.value_length": settings.head_dim,
        "attention.layer_norm_rms_epsilon": float(eps),
        "rope.freq_base": float(settings.rope()["rope_theta"]),
        "vocab_size": settings.number("vocab_size"),
    }
    if name == "llama":
        found["rope.dimension_count"] = settings.head_dim
    found |= _scaling(settings)
    window = table.get("sliding_window")
    if settings.architecture.window_period:
        found["attention.sliding_window"] = settings.number("sliding_window")
    elif window and (settings.kind == "mistral" or table.get("use_sliding_window")):
        found["attention.sliding_window"] = int(window)
        notes.append(f"llama.cpp attends to all tokens, beyond the window of {window} as well, in {name} models")
    if name == "gemma3":
        found["rope.freq_base_swa"] = float(settings.rope("sliding_attention")["rope_theta"])
    for key, place in (("attn_logit_softcapping", "attn"), ("final_logit_softcapping", "final")):
        cap = table.get(key)
        if not name.startswith("gemma"):
            continue
        if cap:
            found[f"{place}_logit_softcapping"] = float(cap)
        elif name == "gemma2":
            raise _refused(f"no {key}", "gemma2 has one")
    return {f"{name}.{key}": value for key, value in found.items()}, notes


def _scaling(settings: Settings) -> dict[str, Value]:
    rope = settings.rope()
    kind = rope["rope_type"]
    if kind in ("default", "llama3"):  # the latter is a tensor of factors
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        special = {"attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow"}
        if changed := sorted(special & {key for key, value in rope.items() if value is not None}):
            raise _refused(f"yarn with `{changed[0]}`", "only plain yarn is written")
        original = rope.get("original_max_position_embeddings") or settings.number("max_position_embeddings")
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": int(original),
        }
    raise _refused(f"rotary embeddings of the type `{kind}`", "default, linear, yarn and llama3 are written")


def rope_factors(settings: Settings) -> Floats | None:
    """What llama.cpp divides each rotary frequency by, for a model with Llama 3's long context; else None."""
    rope = settings.rope()
    if rope["rope_type"] != "llama3":
        return None
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(rope["original_max_position_embeddings"])
    powers = np.arange(0, settings.head_dim, 2, dtype=np.float64) / settings.head_dim
    lengths = 2 * math.pi * float(rope["rope_theta"]) ** powers
    smooth = (original / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(lengths < original / high, 1.0, np.where(lengths > original / low, factor, between))
    return factors.astype(np.float32)


def place_tensors(files: Mapping[str, TensorFile], settings: Settings) -> tuple[list[Placed], list[str]]:
    """Every tensor of the file in its order, and notes; a tensor without a place there is an error."""
    gguf = import_extra("gguf", "gguf")
    number = settings.number("num_hidden_layers")
    by_name = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(by_name[settings.architecture.name], number)
    placed: dict[str, Placed] = {}
    left_out = 0
    for file in files.values():
        for source, entry in file.entries.items():
            if _OTHER_TOWER.search(source):
                left_out += 1
                continue
            plain = _plain_name(source)
            if plain.endswith("rotary_emb.inv_freq") or (plain == "lm_head.weight" and settings.is_tied):
                continue
            name = names.get_name(plain, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise UnsupportedError(
                    f"`{source}` has no place in a GGUF file of {settings.architecture.name}", hint=_ELSEWHERE
                )
            placed[name] = _place(name, source, (file, entry), settings)
    _check_whole(placed, settings)
    if (factors := rope_factors(settings)) is not None:
        placed["rope_freqs.weight"] = Placed("rope_freqs.weight", factors.shape, values=factors)
    notes = [f"{left_out} tensors that are not of the language model are left out"] if left_out else []
    return [placed[name] for name in sorted(placed, key=_order)], notes


def _plain_name(source: str) -> str:
    """As a model of text alone names it."""
    for start, plain in (
        ("model.language_model.", "model."),
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
    ):
        if source.startswith(start):
            return plain + source.removeprefix(start)
    return source if source.startswith(("model.", "lm_head.")) else f"model.{source}"


def _place(name: str, source: str, found: tuple[TensorFile, TensorEntry], settings: Settings) -> Placed:
    file, entry = found
    permutes = settings.architecture.permutes and ".self_attn." in source
    is_rotary = permutes and source.rpartition(".")[0].endswith(("q_proj", "k_proj"))
    offset = 1.0 if settings.architecture.offsets_norms and source.endswith("norm.weight") else 0.0
    return Placed(name, entry.shape, file, source, settings.head_dim if is_rotary else 0, offset)


def _check_whole(placed: Mapping[str, Placed], settings: Settings) -> None:
    blocks: dict[int, set[str]] = {}
    for name in placed:
        if match := _BLOCK.match(name):
            blocks.setdefault(int(match[1]), set()).add(name[match.end() :])
    number = settings.number("num_hidden_layers")
    if sorted(blocks) != list(range(number)) or any(each != blocks[0] for each in blocks.values()):
        raise ModelError(f"the weights are not those of {number} equal layers, as config.json says")
    wanted = {"token_embd.weight", "output_norm.weight"} | (set() if settings.is_tied else {"output.weight"})
    if missing := sorted(wanted - set(placed)):
        raise ModelError(f"the weights have no tensor for {missing[0]}", hint="fetch or write the model again")
    rows, vocabulary = placed["token_embd.weight"].shape[0], settings.number("vocab_size")
    if rows != vocabulary:
        raise ModelError(f"the embeddings have {rows} rows, and config.json says vocab_size = {vocabulary}")


def _order(name: str) -> tuple[int, int, str]:
    match = _BLOCK.match(name)
    return (1, int(match[1]), name) if match else (2 if name == "output_norm.weight" else 0, 0, name)


def rotary_order(rows: int, head_dim: int) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Which row of a head's halves stands where, so that the two numbers of a rotary pair come side by side."""
    return np.arange(rows).reshape(-1, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def model_name(folder: Path, name: str) -> str:
    """What the file calls the model."""
    return " ".join(name.split()) or folder.name
