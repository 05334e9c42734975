"""The tensors of a model folder by their headers: names, types and shapes, without reading a single weight."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from luthier.errors import ModelError, UnsupportedError
from luthier.extras import import_extra
from luthier.weights.header import PICKLED, read_header

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_OTHER_TOWER = re.compile(r"(?:^|[._])(?:vision|visual|audio|speech|image)(?:[._]|$)|multi_modal|mm_projector")
_NOT_LINEAR = re.compile(r"norm|embed|(?:^|\.)ln_|relative_attention_bias|rotary|conv")
_EXPERT = re.compile(r"\.experts(?:\.|$)")
_ROUTERS = ("gate", "router", "shared_expert_gate")
_HEADS = ("lm_head", "embed_out", "output")
_EMBEDDINGS = re.compile(r"(?:^|\.)(?:embed_tokens|wte|tok_embeddings|word_embeddings|embed_in)\.weight$")


@dataclass(frozen=True)
class TensorInfo:
    """Type and shape of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelShape:
    """How large a model is, and where an adapter can go."""

    architecture: str
    """`model_type` of its config."""
    hidden_size: int
    layers: int
    vocab_size: int
    heads: int
    head_dim: int
    intermediate_size: int
    is_tied: bool
    """Whether the head is the embedding table."""
    total_parameters: int
    embedding_parameters: int
    linears: Mapping[str, tuple[int, int]]
    """Linear layers of the decoder by module path, as (out, in); neither head nor experts."""
    mlx_bits: int | None = None
    """Bits of each weight where mlx_lm's quantiser holds them; the sizes here are those of the full weights."""
    expert_parameters: int = 0
    """Weights of mixture-of-experts layers, which are no linear layers and take no adapter."""
    expert_names: tuple[str, ...] = ()
    experts: int = 0
    experts_per_token: int = 0
    modules: Mapping[str, int] = field(default_factory=dict)
    """Parameters of each module that has its own, by module path."""

    @property
    def targets(self) -> list[str]:
        """The last names of all linear layers: what `auto` adapts."""
        return sorted({name.rpartition(".")[2] for name in self.linears})

    @property
    def key(self) -> str:
        """Names the architecture and its size, for what is remembered of it."""
        return f"{self.architecture}-{self.layers}x{self.hidden_size}"

    @property
    def computed_parameters(self) -> int:
        """Weights that each token is multiplied by: linears, head and its share of the experts."""
        head = self.vocab_size * self.hidden_size
        share = self.experts_per_token / self.experts if self.experts and self.experts_per_token else 1.0
        return sum(out * into for out, into in self.linears.values()) + head + round(self.expert_parameters * share)


def layer_number(name: str) -> int | None:
    """The number of the decoder layer a module or tensor belongs to."""
    match = _LAYER.search(name + ".")
    return int(match[1]) if match else None


def is_adaptable(module: str, *, has_experts: bool) -> bool:
    """Whether a linear layer of that path takes an adapter: it is of the decoder, no expert and no router."""
    *parents, leaf = module.split(".")
    if layer_number(module) is None or _OTHER_TOWER.search(module) or _EXPERT.search(module):
        return False
    return not _NOT_LINEAR.search(leaf) and "router" not in parents and not (has_experts and leaf in _ROUTERS)


def is_of_experts(parameter: str) -> bool:
    """Whether a parameter belongs to the experts of a mixture."""
    return bool(_EXPERT.search(parameter))


def is_in_last_layers(module: str, count: int | None, layers: int) -> bool:
    """Whether a module is in the last `count` of the decoder's layers, or outside of them all."""
    number = layer_number(module)
    return count is None or number is None or number >= layers - count


def is_named(module: str, name: str) -> bool:
    """Whether `name` is the module's path or its last part, as targets are given."""
    return module == name or module.endswith("." + name)


def read_shapes(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a model folder, from the headers of its safetensors files."""
    shapes: dict[str, TensorInfo] = {}
    for path in list_weight_files(folder):
        shapes |= {name: TensorInfo(each.dtype, each.shape) for name, each in read_header(path).entries.items()}
    return shapes


def has_weights(folder: Path) -> bool:
    """Whether all safetensors files of a model lie in the folder; a model of the hub may lack them until it trains."""
    index = folder / INDEX
    if index.is_file():
        return all((folder / name).is_file() for name in _read_weight_map(index).values())
    return (folder / WHOLE).is_file()


def fetch_shapes(name: str, revision: str | None) -> dict[str, TensorInfo]:
    """Every tensor of a model on the hub: the headers are fetched, and nothing of the weights."""
    hub = import_extra("huggingface_hub", "torch")
    try:
        files = hub.get_safetensors_metadata(name, revision=revision).files_metadata.values()
    except Exception as error:  # no network, no right to it, no safetensors: the client's own words tell
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{name}: its weights are not on this machine, and the hub did not say their shapes: {said}",
            hint="check the network, or name a folder with .safetensors files",
        ) from None
    return {key: TensorInfo(str(each.dtype), tuple(each.shape)) for file in files for key, each in file.tensors.items()}


def list_weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model; ModelError where there are none or one is missing."""
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(_read_weight_map(index).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{folder}: {INDEX} names {missing[0]}, which is not there ({len(missing)} of {len(names)} missing)",
                hint="fetch the model again",
            )
        return [folder / name for name in names]
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    pickled = sorted(
        path.name for path in folder.glob("*.*") if path.suffix in PICKLED and "training_args" not in path.name
    )
    if pickled:
        raise ModelError(
            f"{folder}: its weights are pickled ({pickled[0]}), and reading those can run code",
            hint="use a revision of the model with .safetensors files, or convert it elsewhere",
        )
    raise ModelError(f"{folder}: no weights: no {WHOLE} and no {INDEX}", hint="fetch the model again, or name another")


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        found = orjson.loads(index.read_bytes())["weight_map"]
        names = {str(key): str(value) for key, value in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: not an index of weights: {error}") from None
    for name in names.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index}: {name!r} is no safetensors file beside it")
    return names


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder}: no config.json", hint="a model folder has config.json beside its weights")
    try:
        found = orjson.loads(path.read_bytes())
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: expected a table")
    return found


def read_model_shape(folder: Path) -> ModelShape:
    """Size and layers of the model in `folder`."""
    return build_model_shape(read_shapes(folder), read_config(folder), name=folder.name)


def build_model_shape(shapes: Mapping[str, TensorInfo], config: Mapping[str, Any], *, name: str) -> ModelShape:
    """Size and layers of a model, from its tensors and its config."""
    mlx_bits = find_mlx_bits(config)
    if mlx_bits is not None:
        shapes = unpack_shapes(shapes, config)
    else:
        _refuse_quantised(shapes, config, name)
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    ours = {key: info for key, info in shapes.items() if "F" in info.dtype and not _OTHER_TOWER.search(key)}
    embedding = next((info for key, info in ours.items() if _EMBEDDINGS.search(key)), None)
    vocab, hidden = embedding.shape if embedding and len(embedding.shape) == 2 else (0, 0)
    vocab, hidden = _number(text, "vocab_size") or vocab, _number(text, "hidden_size", "n_embd") or hidden
    numbers = [found for key in ours if (found := layer_number(key)) is not None]
    if not numbers or not hidden:
        raise ModelError(f"{name}: no decoder layers among its tensors", hint="Luthier trains causal language models")
    is_tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", True)))
    heads_of = [key for key in ours if key.removesuffix(".weight").rpartition(".")[2] in _HEADS]
    heads_of = [key for key in heads_of if layer_number(key) is None]
    is_tied = is_tied or not heads_of
    counted = {key: info for key, info in ours.items() if not (is_tied and key in heads_of)}
    expert_names = sorted(key for key in counted if _EXPERT.search(key) and layer_number(key) is not None)
    linears = _find_linears(counted, has_experts=bool(expert_names))
    heads = _number(text, "num_attention_heads", "n_head") or 1
    return ModelShape(
        architecture=str(text.get("model_type") or config.get("model_type") or "unknown"),
        hidden_size=hidden,
        layers=max(numbers) + 1,
        vocab_size=vocab,
        heads=heads,
        head_dim=_number(text, "head_dim") or hidden // heads,
        intermediate_size=_number(text, "intermediate_size", "n_inner", "ffn_dim") or _widest(linears, hidden),
        is_tied=is_tied,
        total_parameters=sum(info.size for info in counted.values()),
        embedding_parameters=embedding.size if embedding else 0,
        linears=linears,
        mlx_bits=mlx_bits,
        expert_parameters=sum(counted[key].size for key in expert_names),
        expert_names=tuple(expert_names),
        experts=_number(text, "num_experts", "num_local_experts", "n_routed_experts") or 0,
        experts_per_token=_number(text, "num_experts_per_tok", "experts_per_token") or 0,
        modules=_modules(ours, is_tied, vocab * hidden),
    )


def find_mlx_bits(config: Mapping[str, Any]) -> int | None:
    """Bits of each weight of a model that mlx_lm has quantised; None where it is none."""
    how = config.get("quantization")
    bits = how.get("bits") if isinstance(how, dict) else None
    return bits if isinstance(bits, int) else None


def unpack_shapes(shapes: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """The tensors of a model that mlx_lm has quantised, as they were before."""
    how = config["quantization"]
    found = {}
    for key, info in shapes.items():
        module, _, part = key.rpartition(".")
        if f"{module}.scales" not in shapes:
            found[key] = info
        elif part == "weight":
            own = how.get(module)
            bits = own["bits"] if isinstance(own, dict) else how["bits"]
            found[key] = TensorInfo(shapes[f"{module}.scales"].dtype, (*info.shape[:-1], info.shape[-1] * 32 // bits))
    return found


def _refuse_quantised(shapes: Mapping[str, TensorInfo], config: Mapping[str, Any], name: str) -> None:
    packed = sorted({info.dtype for info in shapes.values()} - {"F64", "F32", "F16", "BF16", "I64", "I32", "BOOL"})
    if config.get("quantization_config") or packed:
        found = f" ({', '.join(packed)})" if packed else ""
        raise UnsupportedError(
            f"{name}: its weights are quantised already{found}; Luthier starts from the full ones",
            hint='name the original model; method.kind = "qlora" quantises it to 4 bits',
        )


def _number(table: Mapping[str, Any], *keys: str) -> int | None:
    values = (table.get(key) for key in keys)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _find_linears(shapes: Mapping[str, TensorInfo], *, has_experts: bool) -> dict[str, tuple[int, int]]:
    found = {}
    for key, info in shapes.items():
        module = key.removesuffix(".weight")
        if key != module and len(info.shape) == 2 and is_adaptable(module, has_experts=has_experts):
            found[module] = (info.shape[0], info.shape[1])
    return found


def _widest(linears: Mapping[str, tuple[int, int]], hidden: int) -> int:
    """The width of the feed-forward part, where the config does not say."""
    return max((max(shape) for shape in linears.values()), default=4 * hidden)


def _modules(shapes: Mapping[str, TensorInfo], is_tied: bool, head_size: int) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for key, info in shapes.items():
        module = key.rpartition(".")[0]
        sizes[module] = sizes.get(module, 0) + info.size
    if is_tied:
        sizes.setdefault("lm_head", head_size)
    return sizes


def match_modules(modules: Iterable[str], names: Iterable[str]) -> dict[str, list[str]]:
    """For each of `names`, the modules it means."""
    listed = list(modules)
    return {name: [module for module in listed if is_named(module, name)] for name in names}
