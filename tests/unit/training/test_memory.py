"""Memory follows from shapes by plain arithmetic; what runs really took is remembered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from luthier.errors import StorageError
from luthier.training.memory import (
    Layout,
    Trainable,
    Work,
    estimate_memory,
    estimate_seconds,
    read_correction,
    read_speed,
    remember_correction,
    remember_speed,
)
from tests.unit.training.plans import llama

MODEL = llama()
SIZE = MODEL.total_parameters
LINEAR = sum(out * into for out, into in MODEL.linears.values())
FULL = Layout("full", "bf16", "adamw", "cpu", 1000)
LORA = replace(FULL, method="lora")
QLORA = replace(FULL, method="qlora")
ADAPTER = Trainable(1_000_000, 0)


def test_full_training_has_a_master_gradients_and_moments() -> None:
    items = estimate_memory(MODEL, Trainable(0, SIZE), FULL)
    assert (items["weights"], items["gradients"], items["optimizer"]) == (2 * SIZE, 4 * SIZE, 12 * SIZE)
    items = estimate_memory(MODEL, Trainable(0, SIZE), replace(FULL, precision="fp32"))
    assert (items["weights"], items["gradients"], items["optimizer"]) == (4 * SIZE, 4 * SIZE, 8 * SIZE)


@pytest.mark.parametrize(("kind", "moments"), [("adamw", 8), ("adam", 8), ("adamw_8bit", 2), ("adafactor", 0)])
def test_the_optimizers_moments(kind: str, moments: int) -> None:
    items = estimate_memory(MODEL, ADAPTER, replace(LORA, optimizer=kind))
    assert items["optimizer"] == moments * ADAPTER.adapter


def test_an_adapter_costs_16_bytes_a_weight_over_a_frozen_base() -> None:
    items = estimate_memory(MODEL, ADAPTER, LORA)
    assert items["weights"] == 2 * SIZE + 4_000_000
    assert items["gradients"] == 4_000_000
    assert items["overhead"] == 450_000_000 + 12_000_000


def test_modules_trained_whole_have_a_copy_and_a_master() -> None:
    items = estimate_memory(MODEL, Trainable(0, 1_000_000), LORA)
    assert items["weights"] == 2 * SIZE + 2_000_000
    assert items["optimizer"] == 12_000_000


def test_four_bits_unless_held_dequantised() -> None:
    packed = estimate_memory(MODEL, ADAPTER, QLORA)["weights"]
    assert packed == pytest.approx(0.516 * LINEAR + 2 * (SIZE - LINEAR) + 4_000_000, rel=1e-3)
    plain = estimate_memory(MODEL, ADAPTER, replace(QLORA, double_quant=False))["weights"]
    assert plain - packed == pytest.approx(0.0466 * LINEAR, rel=1e-2)
    kept, lora = (estimate_memory(MODEL, ADAPTER, each) for each in (replace(QLORA, keeps_dequantised=True), LORA))
    assert kept["overhead"] == lora["overhead"] + 150_000_000
    assert {**kept, "overhead": 0} == {**lora, "overhead": 0}


def test_activations_grow_with_tokens_and_shrink_by_recomputing() -> None:
    once = estimate_memory(MODEL, ADAPTER, LORA)["activations"]
    assert estimate_memory(MODEL, ADAPTER, replace(LORA, tokens=2000))["activations"] == 2 * once
    assert estimate_memory(MODEL, ADAPTER, replace(LORA, recompute=True))["activations"] < once / 6


def test_activations_are_those_that_were_measured() -> None:
    """4 layers of width 1024 on a CPU in bf16: 386 kB a token by the process's peak, 239 kB when computed again."""
    model = llama(layers=4, vocab=32_000)
    plain, again = (
        estimate_memory(model, ADAPTER, replace(LORA, recompute=each))["activations"] / 1000 for each in (False, True)
    )
    assert plain == pytest.approx(386_000, rel=0.05)
    assert again == pytest.approx(239_000, rel=0.05)


def test_logits_are_those_of_one_chunk() -> None:
    assert estimate_memory(MODEL, ADAPTER, LORA)["logits"] == 512 * MODEL.vocab_size * 6
    assert estimate_memory(MODEL, ADAPTER, replace(LORA, tokens=100))["logits"] == 100 * MODEL.vocab_size * 6
    assert estimate_memory(MODEL, ADAPTER, replace(LORA, device="cuda"))["logits"] == 1000 * MODEL.vocab_size * 6


def test_processes_on_a_cpu_share_its_memory() -> None:
    one = estimate_memory(MODEL, ADAPTER, LORA)
    assert estimate_memory(MODEL, ADAPTER, replace(LORA, processes=3)) == {name: 3 * size for name, size in one.items()}
    on_gpu = replace(LORA, device="cuda")
    assert estimate_memory(MODEL, ADAPTER, replace(on_gpu, processes=3)) == estimate_memory(MODEL, ADAPTER, on_gpu)


def test_seconds_follow_operations() -> None:
    work = Work(train_tokens=1e6, forward_tokens=0, micro_batches=0)
    lora, full = (estimate_seconds(MODEL, each, work, cores=2) - 8 for each in (LORA, FULL))
    assert full == pytest.approx(1.5 * lora)
    assert lora == pytest.approx(4 * MODEL.computed_parameters * 1e6 / 4e11)
    assert estimate_seconds(MODEL, LORA, work, cores=4) - 8 == pytest.approx(lora / 2)
    assert estimate_seconds(MODEL, replace(LORA, recompute=True), work, cores=2) - 8 == pytest.approx(1.5 * lora)


def test_what_runs_took_is_remembered_by_halves(tmp_path: Path) -> None:
    home = tmp_path / "new"
    assert read_correction(home, "a") == 1.0
    remember_correction(home, "a", 100, 120)
    assert read_correction(home, "a") == 1.2
    remember_correction(home, "a", 100, 160)
    assert read_correction(home, "a") == pytest.approx(1.4)
    assert read_correction(home, "b") == 1.0
    assert [path.name for path in home.iterdir()] == ["memory.json"]


def test_a_wild_measurement_is_held_back(tmp_path: Path) -> None:
    remember_correction(tmp_path, "a", 1, 1000)
    remember_correction(tmp_path, "b", 0, 1000)
    assert read_correction(tmp_path, "a") == 4.0
    assert read_correction(tmp_path, "b") == 1.0


def test_speed_is_remembered(tmp_path: Path) -> None:
    assert read_speed(tmp_path, "a") is None
    remember_speed(tmp_path, "a", 500.0)
    remember_speed(tmp_path, "a", 0.0)
    assert read_speed(tmp_path, "a") == 500.0


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"a": "x"}', b'{"a": -1}'])
def test_a_broken_memory_is_no_memory(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "memory.json").write_bytes(content)
    assert read_correction(tmp_path, "a") == 1.0
    remember_correction(tmp_path, "a", 2, 3)
    assert read_correction(tmp_path, "a") == 1.5


def test_a_home_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(StorageError, match=r"memory\.json: cannot be written"):
        remember_correction(tmp_path / "file", "a", 1, 1)
