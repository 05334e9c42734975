"""A small model with square layers, runs that were really trained on it, and faults to plant in what they made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from luthier.adapters.merge import merge_adapter
from luthier.runs.layout import FINAL_LORA_WEIGHTS, MERGED_MODEL
from luthier.runs.manifest import MANIFEST, seal
from luthier.runs.resolve import practice_folder
from luthier.runs.run import Run
from luthier.training.session import train
from tests.unit.training.works import make_work

SQUARE = "model.layers.1.self_attn.q_proj.weight"
CHANGES: dict[str, Any] = {
    "method.targets": ["q_proj", "o_proj", "down_proj"],
    "optim.steps": 4,
    "optim.learning_rate": 2e-2,
    "method.dropout": 0.0,
}
Tensors = dict[str, Any]
Fault = Callable[[Path], None]


def save_model(folder: Path, *, seed: int = 0) -> Path:
    """Three layers 32 wide, so that its attention's matrices are square, with the practice model's tokenizer."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        vocab_size=json.loads((practice_folder() / "config.json").read_bytes())["vocab_size"],
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=True,
        eos_token_id=2041,
        pad_token_id=2039,
    )
    transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(practice_folder() / name, folder / name)
    return folder


def train_run(folder: Path, base: str | Path, changes: Mapping[str, Any] | None = None) -> Run:
    """A run of a few steps over a base."""
    work = make_work(folder, {**CHANGES, "model.base": str(base), **(changes or {})})
    assert train(work).outcome.is_done
    return work.run


def merge_plainly(run: Run, base: Path, adapter: Path | None = None) -> Path:
    """The merged model in the run folder, with nothing checked."""
    merge_adapter(base, [adapter or run.folder / FINAL_LORA_WEIGHTS], run.folder / MERGED_MODEL)
    return run.folder / MERGED_MODEL


def read_tensors(folder: Path, name: str = "model.safetensors") -> Tensors:
    from safetensors.torch import load_file

    found: Tensors = load_file(folder / name)
    return found


def change(folder: Path, fault: Fault) -> None:
    """Plant a fault in a sealed folder, and seal it as if nothing had happened."""
    facts = {key: value for key, value in json.loads((folder / MANIFEST).read_bytes()).items() if key != "sha256"}
    facts.pop("files")

    def write(draft: Path) -> None:
        shutil.copytree(folder, draft, dirs_exist_ok=True)
        (draft / MANIFEST).unlink()
        fault(draft)

    seal(folder, write, facts)


def with_tensors(edit: Callable[[Tensors], object], name: str = "model.safetensors") -> Fault:
    """A fault in the weights."""

    def plant(folder: Path) -> None:
        from safetensors.torch import save_file

        tensors = read_tensors(folder, name)
        edit(tensors)
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, {"format": "pt"})

    return plant


def with_json(name: str, edit: Callable[[dict[str, Any]], object]) -> Fault:
    """A fault in a table beside them."""

    def plant(folder: Path) -> None:
        table = json.loads((folder / name).read_bytes())
        edit(table)
        (folder / name).write_text(json.dumps(table))

    return plant


def add_again(base: Path, scale: float, only: str = "", *, turned: bool = False) -> Fault:
    """The update of the merged weights with another scale, of all tensors or of one; or turned around."""

    def edit(before: Tensors, tensors: Tensors) -> None:
        for name in tensors:
            if name in before and only in name and (tensors[name] != before[name]).any():
                update = tensors[name].float() - before[name].float()
                update = update.T if turned else update
                tensors[name] = (before[name].float() + scale * update).to(tensors[name].dtype)

    return with_tensors(partial(edit, read_tensors(base)))
