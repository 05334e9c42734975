"""Tiny models of many architectures, plans and batches for them, that the tests of engines share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from luthier.data.cache import write_array
from luthier.data.prepared import Prepared
from luthier.engines.verbs import Batch
from luthier.runs.resolve import AdapterRef, ResolvedModel
from luthier.spec.plan import Memory, RunPlan
from luthier.spec.run import RunSpec
from luthier.training.batches import Item, build_batch

VOCAB = 160
WINDOW = 6
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_WINDOWED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_QWEN = {**_WINDOWED, "use_sliding_window": True, "max_window_layers": 1}
_CAPPED = {"query_pre_attn_scalar": 6, "tie_word_embeddings": True, **_WINDOWED}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "tie_word_embeddings": True},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {**_CAPPED, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma3_text": _CAPPED,
    "phi3": {"sliding_window": WINDOW},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 2.0},
}
HYBRIDS: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 1,
    },
}
PICTURES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**SIZES, **_CAPPED, "sliding_window": 64},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": 5,
    }
}
"""Models that read pictures too, of which the text part is trained."""
OLDER: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 3, "n_head": 4},
    "gptj": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "rotary_dim": 8, "n_positions": 128},
    "falcon": {"ffn_hidden_size": 48, "num_kv_heads": 1, "head_dim": None},
    "mamba": {"state_size": 8, "time_step_rank": 4},
}
"""Architectures that take no attention but their own, or have none."""


def save_shape(folder: Path, kind: str, *, dtype: str = "float32", seed: int = 0, **settings: Any) -> Path:
    """A model folder of an architecture, with random weights that are large enough to matter."""
    import torch
    import transformers

    known = {**SHAPES, **EXPERTS, **HYBRIDS, **OLDER}
    asked = PICTURES[kind] if kind in PICTURES else {**SIZES, **known.get(kind, {}), **settings}
    config = transformers.AutoConfig.for_model(kind, **{key: each for key, each in asked.items() if each is not None})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases that are not what every model starts with
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def load_plain(folder: Path, *, dtype: str = "float32", attention: str = "eager") -> Any:
    """The model as transformers gives it, with its own attention."""
    import torch
    import transformers

    kind = getattr(torch, dtype)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=kind, attn_implementation=attention).eval()


def make_plan(
    method: str = "lora", *, keys: dict[str, Any] | None = None, steps: int = 4, examples: int = 16, **tables: Any
) -> RunPlan:
    """A plan with nothing left to decide, on the CPU in fp32 and without dropout unless told."""
    chosen: dict[str, Any] = {"kind": method, **({} if method == "full" else {"rank": 4, "alpha": 8.0, "dropout": 0.0})}
    keeps = tables.pop("keeps_dequantised", False)
    spec = RunSpec.model_validate(
        {
            "model": {"base": "tiny"},
            "data": {"train": "rows.jsonl"},
            **tables,
            "method": {**chosen, **(keys or {})},
            "optim": {"learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0, "steps": steps, "batch": 4}
            | tables.get("optim", {}),
            "compute": {"precision": "fp32", "recompute": "never", "micro_batch_tokens": 256}
            | tables.get("compute", {}),
        }
    )
    return RunPlan(
        spec=spec,
        decisions=(),
        steps=steps,
        train_examples=examples,
        stream_end=None,
        tokens_per_epoch=0,
        trained_tokens_per_epoch=0,
        total_parameters=0,
        trainable_parameters=0,
        memory=Memory({}, 0, "cpu"),
        seconds=None,
        device="cpu",
        keeps_dequantised=keeps,
    )


def build_engine(base: Path, home: Path, plan: RunPlan | None = None, adapters: Sequence[AdapterRef] = ()) -> Any:
    """The torch engine of a plan over a base."""
    from luthier.engines.torch.engine import build

    return build(plan or make_plan(), ResolvedModel(base, tuple(adapters), name=str(base)), home)


def draw_items(*lengths: int | tuple[int, int, int], seed: int = 0, vocab: int = VOCAB) -> list[Item]:
    """Examples of random tokens: one sequence for a length, a pair for (shared prompt, chosen, rejected)."""
    draw = np.random.default_rng(seed)
    items = []
    for number, length in enumerate(lengths):
        if isinstance(length, int):
            sequences = (draw.integers(3, vocab, length),)
            trained = (np.arange(max(1, length // 3), length),)
        else:
            prompt = draw.integers(3, vocab, length[0])
            sequences = tuple(np.concatenate([prompt, draw.integers(3, vocab, each)]) for each in length[1:])
            sequences[1][length[0]] = (sequences[0][length[0]] + 1 - 3) % (vocab - 3) + 3
            trained = tuple(np.arange(length[0], len(each)) for each in sequences)
        items.append(Item(number, sequences, trained))
    return items


def apart(items: Sequence[Item]) -> list[Item]:
    """The same examples with nothing shared: each sequence as an item of its own."""
    return [
        Item(item.example, (sequence,), (places,))
        for item in items
        for sequence, places in zip(item.sequences, item.trained, strict=True)
    ]


def every_place(tokens: Sequence[int], vocab: int = VOCAB) -> Batch:
    """A batch that asks for the log-probability of every token at every place of one sequence."""
    ids = np.asarray(tokens, np.int64)
    whole = np.array([[0, len(ids)]])
    targets = np.broadcast_to(np.arange(vocab), (len(ids), vocab)).copy()
    ends = np.array([0, len(ids)])
    return Batch(ids, whole, np.zeros_like(whole), np.arange(len(ids)), targets, ends, np.zeros(1, np.int64))


def logprobs_of(engine: Any, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
    """What the engine says at every place of one sequence."""
    found: np.ndarray[Any, Any] = engine.forward(every_place(tokens)).result().logprobs
    return found


def write_prepared(folder: Path, items: Sequence[Item]) -> Prepared:
    """The examples as prepared data; all of them are for training."""
    folder.mkdir(parents=True, exist_ok=True)
    sequences = [sequence for item in items for sequence in item.sequences]
    ranges = [(int(places[0]), int(places[-1]) + 1) for item in items for places in item.trained]
    arrays = {
        "train.u64": np.arange(len(items)),
        "valid.u64": np.zeros(0, np.int64),
        "tokens.u32": np.concatenate(sequences),
        "offsets.u64": np.cumsum([0, *(len(each) for each in sequences)]),
        "ranges.u32": np.array(ranges).reshape(-1),
        "range_offsets.u64": np.arange(len(ranges) + 1),
        "first_sequences.u64": np.cumsum([0, *(len(item.sequences) for item in items)]),
        "rows.u64": np.arange(len(items)),
        "row_files.u32": np.zeros(len(items), np.int64),
        "row_lines.u32": np.arange(1, len(items) + 1),
    }
    for name, values in arrays.items():
        write_array(folder, name, values)
    (folder / "summary.json").write_bytes(orjson.dumps({"files": ["rows.jsonl"]}))
    return Prepared(folder)


def imitation(items: Sequence[Item], **changes: Any) -> tuple[Batch, Any]:
    """A batch and its cross-entropy, summed over the trained tokens."""
    from luthier.spec.objective import SftObjective
    from luthier.training.objectives import build_loss

    batch = build_batch(items, step=changes.get("step", 0))
    return batch, build_loss(SftObjective(), items, batch, scale=changes.get("scale", 1.0), references=None)


def assert_near(found: Any, expected: Any, share: float = 2e-5) -> None:
    """Equal but for the order of fp32 additions, as a share of the largest number."""
    one, other = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert one.shape == other.shape
    assert np.isfinite(one).all()
    assert np.abs(one - other).max(initial=0) <= share * max(np.abs(other).max(initial=0), 1e-12)


def gradients_of(engine: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The gradients gathered so far by name of the weight; they are forgotten after that."""
    masters = engine._masters
    named = zip(masters.names, masters.masters, strict=True)
    found = {name: master.grad.numpy().copy() for name, master in named if master.grad is not None}
    engine.discard_gradients()
    return found


def assert_same_gradients(found: dict[str, Any], expected: dict[str, Any], share: float = 1e-4) -> None:
    """Every weight has the same gradient, but for the order of fp32 additions."""
    assert set(found) == set(expected)
    largest = max(np.abs(each).max() for each in expected.values())
    assert largest > 0
    for name, each in expected.items():
        assert np.abs(found[name] - each).max() <= share * max(np.abs(each).max(), 1e-2 * largest), name


def start_update(engine: Any, seed: int = 5) -> None:
    """Let the adapter begin with an update that is not zero, so that both its sides have gradients."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, master in zip(engine._masters.names, engine._masters.masters, strict=True):
            if name.endswith("lora_B"):
                master.copy_(torch.randn(master.shape, generator=generator) * 0.1)
    engine._masters.publish()
