"""What the training benchmarks train on and from: tokenizers, rows and model shapes that they make for themselves.

The words are numbers and the weights are random; how fast they are trained does not depend on what they mean. This
module imports no torch, so that the process that starts the measurements stays small.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

CONTROL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
_ROLES = ["user", "assistant", "system"]
# Plain ChatML. A tokenizer that splits at spaces drops the newlines, so a turn is: start, role, words, end.
TEMPLATE = (
    "{%- for turn in messages %}{{- '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content ~ '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class Shape:
    """A model of Qwen 3's architecture."""

    layers: int
    width: int
    inner_width: int
    heads: int
    key_heads: int
    head_width: int
    words: int
    is_tied: bool = True

    @property
    def adapter_weights_a_rank(self) -> int:
        """Adapter weights for each unit of rank, with every linear layer but the head adapted."""
        wide, narrow = self.heads * self.head_width, self.key_heads * self.head_width
        sides = 2 * (self.width + wide) + 2 * (self.width + narrow) + 3 * (self.width + self.inner_width)
        return self.layers * sides

    @property
    def computed_weights(self) -> int:
        """Weights that a token is multiplied with: the linear layers and the head."""
        wide, narrow = self.heads * self.head_width, self.key_heads * self.head_width
        each = self.width * (2 * wide + 2 * narrow + 3 * self.inner_width)
        return self.layers * each + self.width * self.words

    def config(self) -> dict[str, Any]:
        """The contents of its config.json."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "eos_token_id": CONTROL.index("<|im_end|>"),
            "pad_token_id": CONTROL.index("<|pad|>"),
            "head_dim": self.head_width,
            "hidden_act": "silu",
            "hidden_size": self.width,
            "initializer_range": 0.02,
            "intermediate_size": self.inner_width,
            "max_position_embeddings": 40960,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.key_heads,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000,
            "tie_word_embeddings": self.is_tied,
            "dtype": "bfloat16",
            "vocab_size": self.words,
        }


# The first is four layers of the second with a smaller vocabulary: 96 million weights.
SMALL = Shape(4, 1024, 3072, 16, 8, 128, 32_000)
QWEN3_06B = Shape(28, 1024, 3072, 16, 8, 128, 151_936)
QWEN3_17B = Shape(28, 2048, 6144, 16, 8, 128, 151_936)
QWEN3_8B = Shape(36, 4096, 12288, 32, 8, 128, 151_936, is_tied=False)
TINY = Shape(2, 128, 256, 4, 2, 32, 2_000)


def write_text_files(folder: Path, shape: Shape) -> None:
    """Everything of a model folder but its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))
    words = [*CONTROL, *_ROLES, *_words(shape.words)]
    added = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, token in enumerate(CONTROL)
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate(words)},
            "unk_token": CONTROL[0],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    named = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "unk_token": CONTROL[0]}
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 40960, **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def _words(count: int) -> list[str]:
    return [f"w{number}" for number in range(count - len(CONTROL) - len(_ROLES))]


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths in words, cut at both ends, and the share of a row that is its prompt."""

    median: int
    sigma: float
    least: int = 16
    most: int = 512
    prompt_share: float = 0.4

    def draw(self, dice: random.Random) -> tuple[int, int]:
        """Words of a prompt and of an answer."""
        drawn = self.median * 2.718281828 ** (self.sigma * dice.gauss(0, 1))
        count = max(self.least, min(self.most, round(drawn)))
        prompt = max(2, round(count * self.prompt_share))
        return prompt, max(2, count - prompt)


def write_rows(path: Path, *, count: int, lengths: Lengths, words: int, seed: int, is_paired: bool = False) -> None:
    """Rows of words with frequencies as Zipf has them, so that there is something to learn in a few steps."""
    dice = random.Random(seed)
    known = _words(words)
    weights = list(accumulate(1 / (rank + 2.7) for rank in range(len(known))))
    order = list(known)
    random.Random(1).shuffle(order)

    def text(length: int, common: int = 0) -> str:
        drawn = dice.choices(order, cum_weights=weights, k=length)
        # Answers of a pair differ in a word that tells them apart, or preferring one could not be learnt.
        return " ".join(known[common] if place % 3 == 0 and common else word for place, word in enumerate(drawn))

    with path.open("w") as file:
        for _ in range(count):
            prompt, answer = lengths.draw(dice)
            asked = text(prompt)
            row: dict[str, Any]
            if is_paired:
                row = {"prompt": asked, "chosen": text(answer, 11), "rejected": text(answer, 12)}
            else:
                turns = (("user", asked), ("assistant", text(answer)))
                row = {"messages": [{"role": role, "content": said} for role, said in turns]}
            file.write(json.dumps(row) + "\n")


def describe(shape: Shape) -> str:
    """The shape in one line."""
    millions = shape.computed_weights / 1e6
    return f"{shape.layers} layers, width {shape.width}, {shape.words:,} words, {millions:,.0f}M weights a token"
