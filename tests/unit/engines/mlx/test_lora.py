"""Dropout drawn on the device, and layers: number for number what the hashes of `luthier.data` say."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.data.hashes import mix
from luthier.engines.drawing import dropout_starts, first_values, site_of

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")


def test_numbers_mixed_on_the_device_are_those_of_numpy() -> None:
    from luthier.engines.mlx.lora import mix_on_device

    words = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    for seed in (0, 1, 7, 2**63 + 5, 2**64 - 1):
        assert np.array_equal(np.array(mix_on_device(mx.array(words), seed)), mix(words, seed))


def test_masks_are_torch_s_in_whatever_shape_rows_lie() -> None:
    torch = pytest.importorskip("torch")
    from luthier.engines.mlx.lora import Dropout
    from luthier.engines.torch import lora

    rows, width, site = [(11, 5), (12, 7)], 37, site_of("layer")
    theirs = lora.Dropout(0.3, seed=4)
    theirs.start(rows)
    expected = theirs.mask(site, torch.ones(12, width)).numpy()
    places = np.array([[0, 1, 2, 3, 4, 0, 0], [5, 6, 7, 8, 9, 10, 11]])
    ours = Dropout(0.3, mx.array(dropout_starts(rows, 4)[places]))
    found = np.array(ours.apply(mx.ones((2, 7, width)), site))
    assert np.array_equal(found[1], expected[5:])
    assert np.array_equal(found[0, :5], expected[:5])
    assert 0.2 < (expected == 0).mean() < 0.4


def test_first_values_are_of_the_name_and_the_seed_alone() -> None:
    one = first_values(1, "model.layers.0.self_attn.q_proj", 4, 32)
    assert np.array_equal(one, first_values(1, "model.layers.0.self_attn.q_proj", 4, 32))
    assert not np.array_equal(one, first_values(2, "model.layers.0.self_attn.q_proj", 4, 32))
    assert not np.array_equal(one, first_values(1, "model.layers.1.self_attn.q_proj", 4, 32))
    many = first_values(3, "x", 64, 1024)
    bound = 1 / np.sqrt(1024)
    assert np.abs(many).max() <= bound
    assert many.mean() == pytest.approx(0, abs=bound / 100)
    assert many.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)


@pytest.mark.parametrize("quantised", [False, True])
def test_a_layer_is_its_base_and_its_update(quantised: bool) -> None:
    from luthier.engines.mlx.lora import Dropout, LoraLinear, linear_shape, whole_weight

    mx.set_default_device(mx.cpu)
    base = nn.Linear(64, 32)
    base = base.to_quantized(64, 4) if quantised else base
    layer = LoraLinear(base, 3, 0.5, Dropout(0.0), 0)
    layer.lora_A, layer.lora_B = mx.random.normal((3, 64)), mx.random.normal((32, 3))
    x = mx.random.normal((2, 5, 64))
    assert linear_shape(base) == (32, 64)
    expected = x @ (whole_weight(base) + 0.5 * layer.lora_B @ layer.lora_A).T + base.bias
    assert mx.abs(layer(x) - expected).max().item() < 1e-4
    assert mx.abs(layer.weight - (whole_weight(base) + 0.5 * layer.lora_B @ layer.lora_A)).max().item() < 1e-5
    assert set(layer.trainable_parameters()) == {"lora_A", "lora_B", "linear"}
    assert not layer.trainable_parameters()["linear"]
