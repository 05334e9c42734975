"""What a run takes, reckoned from the model's shape, and what earlier runs of its kind really took."""

from __future__ import annotations

import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import orjson

from luthier.errors import StorageError
from luthier.weights.tensors import ModelShape

MEMORY_FILE = "memory.json"
SPEED_FILE = "speed.json"
_LIBRARY_BYTES = {"cpu": 450_000_000, "cuda": 1_000_000_000, "metal": 500_000_000}
_QUANTISER_BYTES = 150_000_000
_LOGIT_ROWS = {"cpu": 512, "cuda": 4096, "metal": 4096}
_NUMBER_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_MOMENT_BYTES = {"adamw": 8, "adam": 8, "adamw_8bit": 2, "adafactor": 0}
# Operations a second that a whole run reaches: half of what products alone do on the machines measured.
_CORE_FLOPS = {"fp32": 5e10, "bf16": 2e11, "fp16": 2e10}
_CUDA_FLOPS = 4e14
# Of a processor with MLX's own products, one core, and of a Mac's accelerator, a cautious guess until one is measured.
_MLX_FLOPS = {"cpu": 3e9, "metal": 4e12}
_LAYER_SECONDS = {"cpu": 2e-3, "cuda": 3e-4, "metal": 3e-4}
_START_SECONDS = 8.0
_CORRECTIONS = (0.25, 4.0)


@dataclass(frozen=True)
class Trainable:
    """How many weights are trained: those of adapters, and those of modules trained whole."""

    adapter: int
    whole: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.adapter + self.whole


@dataclass(frozen=True)
class Layout:
    """Everything beside the model's shape that decides what a run takes."""

    method: Literal["full", "lora", "qlora"]
    precision: str
    optimizer: str
    device: Literal["cpu", "cuda", "metal"]
    tokens: int
    """Tokens that one process computes at once."""
    recompute: bool = False
    keeps_dequantised: bool = False
    double_quant: bool = True
    processes: int = 1
    mlx_bits: int | None = None
    """Bits of a base that mlx_lm's quantiser holds, the embeddings among it."""
    engine: str = "torch"


def estimate_memory(model: ModelShape, trainable: Trainable, layout: Layout) -> dict[str, int]:
    """Bytes by what they are for: on the device, and on CPU for all processes together."""
    number = _NUMBER_BYTES[layout.precision]
    # A trained weight has an fp32 master; where products use fp32 the weight is its own.
    master = 4 if number < 4 else 0
    own_copy = 0 if layout.method == "full" else trainable.whole * number
    items = {
        "weights": _base_bytes(model, layout, number) + own_copy + 4 * trainable.adapter,
        "gradients": 4 * trainable.total,
        "optimizer": _MOMENT_BYTES[layout.optimizer] * trainable.total + master * trainable.whole,
        "activations": _activation_bytes(model, layout, number),
        "logits": min(_LOGIT_ROWS[layout.device], layout.tokens) * model.vocab_size * 6,
        "overhead": _overhead_bytes(model, trainable, layout),
    }
    times = layout.processes if layout.device == "cpu" else 1
    return {name: round(size) * times for name, size in items.items()}


def _is_packed(layout: Layout) -> bool:
    return layout.method == "qlora" and not layout.keeps_dequantised


def _base_bytes(model: ModelShape, layout: Layout, number: int) -> float:
    if layout.mlx_bits is not None:
        # A scale and an offset of 16 bits for each 64 weights.
        return model.total_parameters * (layout.mlx_bits + 0.5) / 8
    if not _is_packed(layout):
        return model.total_parameters * number
    linear = sum(out * into for out, into in model.linears.values())
    # 4 bits, and a constant for each 64 weights: 32 bits, or 8 and a little when it is quantised as well.
    packed = (4.127 if layout.double_quant else 4.5) / 8
    return linear * packed + (model.total_parameters - linear) * number


def _activation_bytes(model: ModelShape, layout: Layout, number: int) -> float:
    """What the forward pass keeps, and what the backward pass of one layer takes beside it.

    The factors were measured on a CPU with the engine itself: 390 kB a token for 4 layers of width 1024, and 240 kB
    when they are computed again.
    """
    wide = model.intermediate_size * max(1, model.experts_per_token if model.experts else 1)
    layer = (16 * model.hidden_size + 6 * wide + 4 * model.heads * model.head_dim) * number
    if layout.recompute:
        return layout.tokens * (model.layers * model.hidden_size * number + 3 * layer)
    return layout.tokens * (model.layers + 1) * layer


def _overhead_bytes(model: ModelShape, trainable: Trainable, layout: Layout) -> float:
    """Libraries, the copy that a checkpoint is written from, and room to unpack one layer."""
    copied = 0 if layout.method == "full" else 12 * trainable.total
    unpacked = 2 * max((out * into for out, into in model.linears.values()), default=0) if _is_packed(layout) else 0
    quantiser = _QUANTISER_BYTES if layout.method == "qlora" and layout.engine != "mlx" else 0
    return _LIBRARY_BYTES[layout.device] + quantiser + copied + unpacked


@dataclass(frozen=True)
class Work:
    """What a run computes: tokens trained on, tokens only looked at, and micro-batches."""

    train_tokens: float
    forward_tokens: float
    micro_batches: float


def estimate_seconds(model: ModelShape, layout: Layout, work: Work, cores: int) -> float:
    """Seconds of a run from its operations alone; right within a factor of a few, until a speed is remembered."""
    size = model.computed_parameters
    factor = (6 if layout.method == "full" else 4) + (2 if layout.recompute else 0)
    operations = size * (factor * work.train_tokens + 2 * work.forward_tokens)
    is_cuda = layout.device == "cuda"
    speed = _CUDA_FLOPS * layout.processes if is_cuda else _CORE_FLOPS[layout.precision] * cores
    if layout.engine == "mlx":
        speed = _MLX_FLOPS["metal" if layout.device == "metal" else "cpu"]
    calls = work.micro_batches * model.layers * _LAYER_SECONDS[layout.device] / (layout.processes if is_cuda else 1)
    return _START_SECONDS + operations / speed + calls


def read_correction(home: Path, key: str) -> float:
    """What runs of this kind took, divided by what was predicted for them; 1.0 when none is remembered."""
    return _read(home / MEMORY_FILE).get(key, 1.0)


def remember_correction(home: Path, key: str, predicted: float, measured: float) -> None:
    """Remember what a run took; `predicted` is the sum of the items, before any correction."""
    if predicted > 0 and measured > 0:
        low, high = _CORRECTIONS
        _remember(home / MEMORY_FILE, key, min(high, max(low, measured / predicted)))


def read_speed(home: Path, key: str) -> float | None:
    """Tokens a second of earlier runs of this kind; None when there were none."""
    return _read(home / SPEED_FILE).get(key)


def remember_speed(home: Path, key: str, tokens_per_second: float) -> None:
    """Remember how fast a run was."""
    if tokens_per_second > 0:
        _remember(home / SPEED_FILE, key, tokens_per_second)


def _read(path: Path) -> dict[str, float]:
    """The numbers of a file; what cannot be read is as good as not remembered."""
    try:
        found = orjson.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: float(value) for key, value in found.items() if isinstance(value, int | float) and value > 0}


def _remember(path: Path, key: str, value: float) -> None:
    """Half of what was known, half of what is new; the file is whole at every moment."""
    numbers = _read(path)
    numbers[key] = (numbers[key] + value) / 2 if key in numbers else value
    draft = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(orjson.dumps(numbers, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS))
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from None
