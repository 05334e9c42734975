"""Safetensors files tensor by tensor: bfloat16 exactly, headers that lie refused, models of several files whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from luthier.errors import LuthierError, ModelError, UnsupportedError
from luthier.weights.shards import (
    TensorEntry,
    from_floats,
    read_model_files,
    read_tensor_file,
    to_floats,
    write_tensor_file,
)

VALUES = {"a": np.arange(12, dtype=np.float32).reshape(4, 3), "b": np.ones(3, np.float16), "c": np.array(7, np.int64)}


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def test_a_file_reads_as_safetensors_reads_it(tmp_path: Path) -> None:
    save_file(VALUES, tmp_path / "m", {"format": "pt"})
    file = read_tensor_file(tmp_path / "m")
    assert file.metadata == {"format": "pt"}
    assert np.array_equal(file.read_floats("a"), VALUES["a"])
    assert np.array_equal(file.read_floats("a", slice(1, 3)), VALUES["a"][1:3])
    assert b"".join(file.read_blocks("b")) == VALUES["b"].tobytes()
    with pytest.raises(UnsupportedError, match="`c` is I64"):
        file.read_floats("c")


def test_a_file_written_is_byte_for_byte_the_library_s(tmp_path: Path) -> None:
    save_file(VALUES, tmp_path / "theirs", {"format": "pt"})
    layout = {name: TensorEntry(kind, VALUES[name].shape) for name, kind in (("b", "F16"), ("c", "I64"), ("a", "F32"))}
    write_tensor_file(tmp_path / "ours", layout, lambda name: [VALUES[name].tobytes()], {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_content_of_the_wrong_size_is_caught(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="came to 4 bytes"):
        write_tensor_file(tmp_path / "m", {"a": TensorEntry("F32", (2,))}, lambda _: [b"1234"], {})


@pytest.mark.torch
@given(st.lists(st.floats(width=32) | st.sampled_from([1.00390625, 1.01171875, 3.4e38, -0.0, 1e-40]), min_size=1))
def test_bfloat16_rounds_as_torch_does(values: list[float]) -> None:
    import torch

    ours = np.array(values, np.float32)
    theirs = torch.from_numpy(ours.copy()).to(torch.bfloat16)
    encoded = from_floats(ours, "BF16")
    np.testing.assert_array_equal(to_floats(encoded, "BF16"), theirs.float().numpy())
    is_number = ~np.isnan(ours)
    assert np.array_equal(encoded[is_number], theirs.view(torch.uint16).numpy()[is_number])


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF])
def test_no_kind_of_nan_becomes_a_number(bits: int) -> None:
    values = np.array([bits, 0], np.uint32).view(np.float32)
    assert np.isnan(to_floats(from_floats(values, "BF16"), "BF16")).tolist() == [True, False]


def test_fp16_that_overflows_is_infinite() -> None:
    assert np.isinf(from_floats(np.array([1e5], np.float32), "F16")).all()


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "named"),
    [
        (b"", b"", "not one of safetensors"),
        (b"[]", b"", "not one of safetensors"),
        (b"{", b"", "not one of safetensors"),
        ({"a": {}}, b"", "not one of safetensors"),
        ({"a": {**ENTRY, "shape": [-2]}}, bytes(8), "not one of safetensors"),
        ({"a": {**ENTRY, "shape": [2.0]}}, bytes(8), "not one of safetensors"),
        ({"a": ENTRY}, bytes(7), "bytes where its header says"),
        ({"a": ENTRY}, bytes(9), "bytes where its header says"),
        ({"a": ENTRY, "b": ENTRY}, bytes(8), "does not lie where"),
        ({"a": {**ENTRY, "data_offsets": [0, 4]}}, bytes(4), "does not lie where"),
        ({"a": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12), "does not lie where"),
        ({"a": {**ENTRY, "dtype": "F4"}}, bytes(8), "type F4"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, data: bytes, named: str) -> None:
    with pytest.raises(LuthierError, match=named):
        read_tensor_file(write_raw(tmp_path / "m", header, data))


@pytest.mark.parametrize("length", [1 << 40, 200])
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(ModelError, match="cut off"):
        read_tensor_file(write_raw(tmp_path / "m", {"a": ENTRY}, bytes(8), length))


def test_every_shortening_of_a_file_is_found(tmp_path: Path) -> None:
    save_file(VALUES, tmp_path / "m")
    whole = (tmp_path / "m").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "m").write_bytes(whole[:size])
        with pytest.raises(ModelError):
            read_tensor_file(tmp_path / "m")


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("version https://git-lfs.example/spec/v1\noid sha256:0\n")
    with pytest.raises(ModelError, match="git-lfs") as caught:
        read_tensor_file(tmp_path / "m")
    assert caught.value.hint == "run: git lfs pull"


def shard(folder: Path, parts: dict[str, list[str]], places: dict[str, str]) -> Path:
    for name, tensors in parts.items():
        save_file({each: VALUES[each] for each in tensors}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


ONE, TWO = "one.safetensors", "two.safetensors"


def test_a_model_of_several_files(tmp_path: Path) -> None:
    shard(tmp_path, {ONE: ["a"], TWO: ["b", "c"]}, {"a": ONE, "b": TWO, "c": TWO})
    files = read_model_files(tmp_path)
    assert {name: sorted(file.entries) for name, file in files.items()} == {ONE: ["a"], TWO: ["b", "c"]}


@pytest.mark.parametrize(
    ("parts", "places", "named"),
    [
        ({ONE: ["a"], TWO: ["b"]}, {"a": ONE, "b": TWO, "c": TWO}, "`c` is not in two"),
        ({ONE: ["a"], TWO: ["b"]}, {"a": TWO, "b": ONE}, "`a` is not in two"),
        ({ONE: ["a"], TWO: ["a", "b"]}, {"a": ONE, "b": TWO}, "`a` is in one.safetensors and in two"),
        ({ONE: ["a"]}, {"a": ONE, "b": TWO}, "not there"),
        ({ONE: ["a"]}, {"a": "../one.safetensors"}, "beside it"),
    ],
)
def test_an_index_that_lies_is_refused(
    tmp_path: Path, parts: dict[str, list[str]], places: dict[str, str], named: str
) -> None:
    with pytest.raises(ModelError, match=named):
        read_model_files(shard(tmp_path, parts, places))


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    layout = {"a": TensorEntry("F32", (4, 3))}
    write_tensor_file(tmp_path / "m", layout, lambda _: [VALUES["a"].tobytes()], {"format": "pt"})
    with safe_open(tmp_path / "m", "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert np.array_equal(load_file(tmp_path / "m")["a"], VALUES["a"])
