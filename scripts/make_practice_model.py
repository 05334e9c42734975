"""Make the practice model: a tiny Qwen3 causal language model, trained from synthetic text in minutes."""

import argparse
import hashlib
import json
import math
import platform
import random
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from practice_corpus import CHAT_TEMPLATE, Document, document
from practice_exam import examine
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "src/luthier/testing/practice"
RECORD = ROOT / "scripts/practice_model.json"

SEED = 20
THREADS = 2
VOCABULARY = 2048
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, END_OF_TURN = SPECIAL[0], SPECIAL[2]
ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

STEPS = 1700
ROWS, ROW_LENGTH = 8, 256
PROMPT_WEIGHT = 0.1
CLEAN_SHARE = 0.7
WRONG_SHARE = 0.5
MATRIX_RATE, OTHER_RATE = 0.02, 0.004


def main() -> None:
    """Make the model and its record, or only check the shipped files against the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare the shipped files with the record")
    if parser.parse_args().check:
        sys.exit(check())
    make()


def check() -> int:
    """Compare the shipped folder's hashes with the record; 0 when they agree."""
    recorded = json.loads(RECORD.read_text())["sha256"]
    found = hashes()
    wrong = sorted(name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name))
    print("\n".join(f"differs: {name}" for name in wrong) or f"all {len(found)} files agree with the record")
    return 1 if wrong else 0


def hashes() -> dict[str, str]:
    """The SHA-256 of each file of the practice folder."""
    files = sorted(path for path in FOLDER.iterdir() if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def make() -> None:
    """Train the tokenizer and the model, save them, examine them, and write the record."""
    start = time.monotonic()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    FOLDER.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    save_tokenizer(tokenizer)
    print(f"tokenizer made, {time.monotonic() - start:.0f} s", flush=True)
    model = Qwen3ForCausalLM(model_config(tokenizer))
    train(model, rows(tokenizer))
    save_model(model)
    minutes = (time.monotonic() - start) / 60
    report(minutes)


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer in the manner of Qwen2, trained on a sample of the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    plain = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer.decoder = decoders.ByteLevel(**plain)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(ADDED),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(SEED)
    sample = (piece for _ in range(40_000) for piece, _ in document(rng, 0.0))
    tokenizer.train_from_iterator(without_markers(sample), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    return tokenizer


def without_markers(texts: Iterator[str]) -> Iterator[str]:
    """The texts with every added token cut out, so that BPE never learns parts of one."""
    for text in texts:
        for marker in (*SPECIAL, *ADDED):
            text = text.replace(marker, "\n")
        yield text


def save_tokenizer(tokenizer: Tokenizer) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(FOLDER / "tokenizer.json"))
    config = {
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TURN,
        "errors": "replace",
        "model_max_length": 4096,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (FOLDER / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def model_config(tokenizer: Tokenizer) -> Qwen3Config:
    """The model's shape."""
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END_OF_TURN),
        pad_token_id=tokenizer.token_to_id(END_OF_TEXT),
    )


def rows(tokenizer: Tokenizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of packed token ids and loss weights; a document that does not fit starts the next row."""
    rng = random.Random(SEED + 1)
    (end,) = tokenizer.encode(END_OF_TEXT).ids
    for step in range(STEPS):
        wrong_share = WRONG_SHARE if step >= CLEAN_SHARE * STEPS else 0.0
        batch: list[list[tuple[int, float]]] = [[]]
        while len(batch) <= ROWS:
            tokens = [*encode(tokenizer, document(rng, wrong_share)), (end, 1.0)]
            if len(batch[-1]) + len(tokens) > ROW_LENGTH:
                batch.append([])
            batch[-1] += tokens[:ROW_LENGTH]
        padded = [row + [(end, 0.0)] * (ROW_LENGTH - len(row)) for row in batch[:ROWS]]
        both = torch.tensor(padded, dtype=torch.float64)
        yield both[..., 0].long(), both[..., 1].float()


def encode(tokenizer: Tokenizer, pieces: Document) -> list[tuple[int, float]]:
    """The token ids of a document, each with its loss weight."""
    encoded = tokenizer.encode_batch_fast([text for text, _ in pieces], add_special_tokens=False)
    weights = [1.0 if learned else PROMPT_WEIGHT for _, learned in pieces]
    return [(token, weight) for part, weight in zip(encoded, weights, strict=True) for token in part.ids]


def optimisers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the linear layers, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.05),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_factor(step: int) -> float:
    """The learning rate's course: a short warm-up, a plateau, and a linear fall over the last half."""
    progress = step / STEPS
    return min(1.0, (step + 1) / 50, max(0.02, 2 * (1 - progress)))


def train(model: Qwen3ForCausalLM, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Train on every batch once, in bfloat16 arithmetic over float32 weights."""
    steppers = optimisers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(stepper, rate_factor) for stepper in steppers]
    model.train()
    start, mean = time.monotonic(), math.log(VOCABULARY)
    for step, (ids, weights) in enumerate(batches, start=1):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            losses = cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper, schedule in zip(steppers, schedules, strict=True):
            stepper.step()
            schedule.step()
        model.zero_grad()
        mean = 0.98 * mean + 0.02 * float(loss.detach())
        if step % 100 == 0:
            print(f"step {step}/{STEPS}  loss {mean:.3f}  {time.monotonic() - start:.0f} s", flush=True)


def save_model(model: Qwen3ForCausalLM) -> None:
    """Write the weights in bfloat16, with config.json and generation_config.json."""
    end_of_turn, end_of_text = model.config.eos_token_id, model.config.pad_token_id
    stops = {"eos_token_id": [end_of_turn, end_of_text], "pad_token_id": end_of_text}
    model.generation_config = GenerationConfig.from_dict(stops)
    model.bfloat16().save_pretrained(FOLDER)
    for path in FOLDER.iterdir():
        path.chmod(0o644)


def report(minutes: float) -> None:
    """Examine the saved model, print the results and write the record."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    results = examine(model, tokenizer, SEED + 2)
    size = sum(path.stat().st_size for path in FOLDER.iterdir())
    record: dict[str, Any] = {
        "seed": SEED,
        "threads": THREADS,
        "minutes": round(minutes, 1),
        "bytes": size,
        "parameters": model.num_parameters(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")},
        "measured": results,
        "sha256": hashes(),
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    for name, value in results.items():
        print(f"{name:<44} {value:>8.3f}")
    print(f"{minutes:.1f} minutes, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
