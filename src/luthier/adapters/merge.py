"""Merge adapters into their base: W + scale * B @ A, tensor by tensor, with one rounding and nothing held whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import orjson

from luthier.errors import CallError, ModelError
from luthier.runs.manifest import reserve_check, seal
from luthier.weights.header import TensorEntry
from luthier.weights.peft import AdapterConfig, read_adapter
from luthier.weights.shards import (
    FLOATS,
    Floats,
    Piece,
    TensorFile,
    from_floats,
    read_model_files,
    to_floats,
    write_tensor_file,
)
from luthier.weights.tensors import INDEX, WHOLE, read_config
from luthier.weights.text_files import copy_text_files

DTYPES = {"fp32": ("F32", "float32"), "bf16": ("BF16", "bfloat16"), "fp16": ("F16", "float16")}
# What a model folder has besides weights; the base's own card and code are not the merged model's.
_EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight", "word_embeddings.weight", "wte.weight")
HEADS = ("lm_head.weight", "embed_out.weight")
_BLOCK_VALUES = 2 * 1024 * 1024  # fewer make many small products, which wait for each other on busy cores

Dequantise = Callable[[str, Floats], Floats | None]
"""The weights as training saw them, by tensor name and stored weights; None where they were not quantised."""


class Stopped(Exception):
    """The merge was asked to stop; nothing was left behind."""


@dataclass(frozen=True)
class MergeFacts:
    """What a merge did; `changed_share` and `lost_share` say how much of the update the rounding left."""

    adapted: int
    replaced: int
    tensors: int
    size_bytes: int
    changed_share: float  # of the adapted tensors' numbers, those that differ from the base's
    lost_share: float  # the rounding's error over the update itself, both as root mean squares
    is_tied: bool


@dataclass
class _Tally:
    values: int = 0
    changed: int = 0
    error: float = 0.0
    update: float = 0.0

    def add(self, base: Floats, exact: Floats, rounded: Floats, differs: npt.NDArray[np.bool_]) -> None:
        """Count some rows of an adapted tensor."""
        self.values += base.size
        self.changed += int(np.count_nonzero(differs))
        update, error = exact - base, rounded - exact
        self.update += float(np.vdot(update, update))
        self.error += float(np.vdot(error, error))


@dataclass
class _Change:
    """What becomes of one tensor of the base: perhaps another one in its place, then low-rank updates."""

    whole: Floats | None = None
    updates: list[tuple[float, Floats, Floats]] = field(default_factory=list)

    def add_to(self, values: Floats, part: slice) -> Floats:
        """Some rows with the updates added, in fp32."""
        for scale, down, up in self.updates:
            update: Floats = np.multiply(up[part], scale, dtype=np.float32) @ down
            update += values
            values = update
        return values


@dataclass
class _Job:
    files: dict[str, TensorFile]
    changes: dict[str, _Change]
    dtype: str | None
    should_stop: Callable[[], bool]
    dequantise: Dequantise | None
    sources: dict[str, str] = field(default_factory=dict)  # tensors that the base lacks, and which they start from
    tally: _Tally = field(default_factory=_Tally)

    def place(self, name: str) -> tuple[str, TensorEntry]:
        """The file and entry that a tensor of the merged model starts from."""
        start = self.sources.get(name, name)
        return next((file, each.entries[start]) for file, each in self.files.items() if start in each.entries)

    def layout(self) -> dict[str, TensorEntry]:
        """Type and shape of every tensor of the merged model; what is no plain float keeps its type."""
        names = [*(name for file in self.files.values() for name in file.entries), *self.sources]
        entries = {name: self.place(name)[1] for name in names}
        return {
            name: TensorEntry(self.dtype if self.dtype and entry.dtype in FLOATS else entry.dtype, entry.shape)
            for name, entry in entries.items()
        }


def merge_adapter(
    base_folder: Path,
    adapters: Sequence[Path],
    out: Path,
    *,
    dtype: str | None = None,
    should_stop: Callable[[], bool] | None = None,
    dequantise: Dequantise | None = None,
    finish: Callable[[Path], None] | None = None,
) -> MergeFacts:
    """Write the base with the adapters applied in order as a whole model folder at `out`; it appears complete or not.

    `dtype` is fp32, bf16, fp16 or the base's own. `finish` is given the folder before it is sealed; where it raises,
    no folder appears.
    """
    if dtype is not None and dtype not in DTYPES:
        raise CallError(f"no such precision: {dtype}", hint=f"one of: {', '.join(DTYPES)}")
    if out.exists():
        raise CallError(f"{out}: already there", hint="name a folder that does not exist yet")
    config, files = read_config(base_folder), read_model_files(base_folder)
    changes = _collect(files, adapters)
    job = _Job(files, changes, DTYPES[dtype][0] if dtype else None, should_stop or (lambda: False), dequantise)
    head = _settle_head(job, says_tied=_says_tied(config))
    reserve_check(out.parent, sum(entry.size_bytes for entry in job.layout().values()))

    def write(draft: Path) -> None:
        copy_text_files(base_folder, draft)
        _write_config(draft, config, dtype, parts=head == "parted")
        _write_weights(job, draft)
        if finish:
            finish(draft)

    names = [folder.name for folder in adapters]
    seal(out, write, {"kind": "merged_model", "adapters": names, "nf4": dequantise is not None})
    return _facts(job, is_tied=head == "tied")


def _facts(job: _Job, *, is_tied: bool) -> MergeFacts:
    tally, layout = job.tally, job.layout()
    return MergeFacts(
        adapted=sum(bool(change.updates) for change in job.changes.values()),
        replaced=sum(change.whole is not None for change in job.changes.values()),
        tensors=len(layout),
        size_bytes=sum(entry.size_bytes for entry in layout.values()),
        changed_share=tally.changed / tally.values if tally.values else 0.0,
        lost_share=float(np.sqrt(tally.error / tally.update)) if tally.update else 0.0,
        is_tied=is_tied,
    )


# -- what changes ----------------------------------------------------------------------------------------------------


def _collect(files: Mapping[str, TensorFile], adapters: Sequence[Path]) -> dict[str, _Change]:
    """Every tensor that the adapters change, by the base's name for it; a tensor with no place is an error."""
    entries = {name: entry for file in files.values() for name, entry in file.entries.items()}
    changes: dict[str, _Change] = {}
    for folder in adapters:
        config, tensors = read_adapter(folder)
        left: list[str] = []
        for name in sorted(tensors):
            if name.endswith(".lora_B"):
                continue  # comes with its lora_A
            module, _, side = name.rpartition(".")
            wanted = f"{module}.weight" if side == "lora_A" else name
            found = find_place(wanted, entries)
            if found is None:
                left.append(name)
                continue
            change = changes.setdefault(found, _Change())
            shape = _shape_of(found, entries)
            if side == "lora_A":
                _add_update(folder, change, shape, (module, config, tensors))
            else:
                _replace(folder, change, shape, name, tensors[name])
        if left:
            raise _left_over(folder, config, left)
    return changes


def _left_over(folder: Path, config: AdapterConfig, left: list[str]) -> ModelError:
    count = f"{len(left)} tensors" if len(left) > 1 else "one tensor"
    return ModelError(
        f"{folder}: {count} of the adapter {'have' if len(left) > 1 else 'has'} no place in the base: {left[0]}",
        hint=f"merge it with the base that it was trained on: {config.base or 'its config does not name it'}",
        details={"left_over": left},
    )


def find_place(name: str, entries: Mapping[str, TensorEntry]) -> str | None:
    """The base's name for a tensor: files may lack the model's own prefix, or order it otherwise."""
    candidates = [name, f"model.{name}", name.partition(".")[2]]
    for one, other in (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")):
        for start, end in ((one, other), (other, one)):
            if name.startswith(start):
                candidates.append(end + name.removeprefix(start))
    found = next((each for each in candidates if each in entries), None)
    if found is None and name.endswith(HEADS) and find_embeddings(entries):
        return name  # the head of a tied model has no tensor of its own until it is changed
    return found


def find_embeddings(entries: Iterable[str]) -> str | None:
    found = [name for name in entries if name.endswith(_EMBEDDINGS)]
    return found[0] if len(found) == 1 else None


def _shape_of(name: str, entries: Mapping[str, TensorEntry]) -> tuple[int, ...]:
    start = name if name in entries else find_embeddings(entries)
    assert start is not None
    return entries[start].shape


def _add_update(
    folder: Path, change: _Change, shape: tuple[int, ...], source: tuple[str, AdapterConfig, dict[str, Floats]]
) -> None:
    module, config, tensors = source
    down, up = tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"]
    if shape != (up.shape[0], down.shape[1]):
        raise ModelError(
            f"{folder}: `{module}` is {[up.shape[0], down.shape[1]]} in the adapter and {list(shape)} in the base",
            hint=f"merge it with the base that it was trained on: {config.base}",
        )
    change.updates.append((config.scale, down, up))


def _replace(folder: Path, change: _Change, shape: tuple[int, ...], name: str, values: Floats) -> None:
    if values.shape != shape:
        raise ModelError(f"{folder}: `{name}` is {list(values.shape)} in the adapter and {list(shape)} in the base")
    change.whole, change.updates = values, []


# -- embeddings and head ---------------------------------------------------------------------------------------------


def _says_tied(config: Mapping[str, Any]) -> bool:
    places = [config, config.get("text_config")]
    return any(isinstance(each, dict) and bool(each.get("tie_word_embeddings")) for each in places)


def _settle_head(job: _Job, *, says_tied: bool) -> Literal["tied", "parted", "apart"]:
    """Whether embeddings and head stay one matrix; where a change parts them, the head gets a tensor of its own."""
    entries = {name for file in job.files.values() for name in file.entries}
    embeddings = find_embeddings(entries)
    heads = sorted(name for name in entries | set(job.changes) if name.endswith(HEADS))
    if embeddings is None or not (says_tied or entries.isdisjoint(heads)):
        return "apart"
    changes = [job.changes.get(name) for name in (embeddings, *heads)]
    if not any(changes):
        return "tied"
    if len(changes) > 1 and all(_is_same(changes[0], each) for each in changes[1:]):
        for head in set(heads) - entries:
            del job.changes[head]
        return "tied"
    for head in set(heads or ["lm_head.weight"]) - entries:
        job.sources[head] = embeddings
    return "parted"


def _is_same(one: _Change | None, other: _Change | None) -> bool:
    """Whether two tensors were replaced by equal ones."""
    if one is None or other is None or one.whole is None or other.whole is None:
        return False
    return not one.updates and not other.updates and np.array_equal(one.whole, other.whole)


# -- writing ---------------------------------------------------------------------------------------------------------


def _write_weights(job: _Job, draft: Path) -> None:
    """Each file of the base anew, under its name."""
    layout = job.layout()
    places = {name: job.place(name)[0] for name in layout}
    for file, source in job.files.items():
        part = {name: entry for name, entry in layout.items() if places[name] == file}
        content = partial(_render, job, part)
        write_tensor_file(draft / file, part, content, source.metadata or {"format": "pt"})
    if list(job.files) != [WHOLE]:
        size_bytes = sum(entry.size_bytes for entry in layout.values())
        index = {"metadata": {"total_size": size_bytes}, "weight_map": dict(sorted(places.items()))}
        (draft / INDEX).write_bytes(orjson.dumps(index, option=orjson.OPT_INDENT_2) + b"\n")


def _render(job: _Job, layout: Mapping[str, TensorEntry], name: str) -> Iterator[Piece]:
    """The bytes of one tensor of the merged model."""
    file, entry = job.place(name)
    source, start, dtype = job.files[file], job.sources.get(name, name), layout[name].dtype
    change = job.changes.get(name) or _Change()
    whole = change.whole
    if whole is None and job.dequantise and entry.dtype in FLOATS and len(entry.shape) == 2:
        whole = job.dequantise(start, source.read_floats(start))
    if whole is None and not change.updates and dtype == entry.dtype:
        for block in source.read_blocks(start):
            _poll(job)
            yield block
        return
    rows = entry.shape[0] if entry.shape else 1
    step = max(1, _BLOCK_VALUES // max(1, math.prod(entry.shape[1:])))
    for first in range(0, rows, step):
        _poll(job)
        part = slice(first, min(first + step, rows))
        if whole is None:
            stored = np.atleast_1d(source.read_numbers(start, part))
            values = to_floats(stored, entry.dtype)
        else:
            values = whole[part]
        exact = change.add_to(values, part)
        encoded = from_floats(exact, dtype)
        rounded = to_floats(encoded, dtype)
        _check_finite(name, exact, rounded, dtype)
        if change.updates:
            before = stored if whole is None and dtype == entry.dtype else from_floats(values, dtype)
            job.tally.add(values, exact, rounded, before != encoded)
        yield encoded.data


def _check_finite(name: str, exact: Floats, rounded: Floats, dtype: str) -> None:
    if np.isfinite(rounded).all():
        return
    if np.isfinite(exact).all():
        raise ModelError(
            f"`{name}` has numbers after the merge that {dtype} cannot hold", hint="merge with bf16 or fp32"
        )
    raise ModelError(
        f"`{name}` has numbers that are not finite after the merge",
        hint="train again from the last checkpoint that is finite",
    )


def _poll(job: _Job) -> None:
    if job.should_stop():
        raise Stopped


# -- the files beside the weights ------------------------------------------------------------------------------------


def _write_config(draft: Path, config: dict[str, Any], dtype: str | None, *, parts: bool) -> None:
    """The base's config, changed only where the weights now differ in kind."""
    if dtype is None and not parts:
        return
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict):
            continue
        if parts and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
        for key in ("dtype", "torch_dtype"):
            if dtype is not None and key in part:
                part[key] = DTYPES[dtype][1]
    if dtype is not None and "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = DTYPES[dtype][1]
    (draft / "config.json").write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2) + b"\n")
