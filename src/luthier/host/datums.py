"""What a Tinker client asks to be computed and what it is told: read and written in protobuf and in JSON.

Between the server, the command log and the host a request is always the protobuf that clients of today send, and a
result the protobuf that they read; JSON is for clients before 0.25.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from luthier.errors import CallError, UnsupportedError
from luthier.host.protobuf import (
    Message,
    write_bytes,
    write_double,
    write_entries,
    write_int,
    write_packed,
    write_text,
)
from luthier.host.tensors import (
    BFLOAT16,
    FLOAT32,
    INT32,
    INT64,
    MOST_CELLS,
    AnyTensor,
    Array,
    SparseRows,
    array_bytes,
    dtype_of,
    read_array,
    read_numbers_json,
    read_tensor,
    read_tensor_json,
    tensor_json,
    write_tensor,
)

Ints = npt.NDArray[np.int64]
Floats32 = npt.NDArray[np.float32]

LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro")
_LOW, _HIGH = 0.8, 1.2
_BOUNDS = ("clip_low_threshold", "clip_high_threshold")
_CONFIG: Mapping[str, tuple[str, ...]] = {"ppo": _BOUNDS, "cispo": _BOUNDS, "dro": ("beta",)}
_POLICY_INPUTS = ("logprobs", "advantages")
_RECORD = "ArrayRecord"
_NO_LOGPROB = -99999.0


@dataclass(frozen=True)
class Datum:
    """One sequence of tokens and the arrays that its loss needs, sparse ones made dense."""

    tokens: Ints
    inputs: Mapping[str, Array]


@dataclass(frozen=True)
class LossRequest:
    """What is to be computed over some data: a loss, and its gradients unless `forward_only`."""

    model: str
    seq: int
    data: tuple[Datum, ...]
    loss: str
    config: Mapping[str, float | str] = field(default_factory=dict)
    forward_only: bool = False


@dataclass(frozen=True)
class LossOutput:
    """What came of it: arrays for each datum, and metrics named `name:reduction`."""

    outputs: tuple[Mapping[str, Array], ...]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class TopK:
    """The K likeliest tokens of each place; rows without any are filled with token 0 and -99999."""

    tokens: Ints
    logprobs: Floats32

    @classmethod
    def empty(cls, places: int, k: int) -> TopK:
        """All filled in."""
        return cls(np.zeros((places, k), np.int64), np.full((places, k), _NO_LOGPROB, np.float32))

    def lists(self) -> list[list[tuple[int, float]] | None]:
        """As lists, without what was filled in."""
        rows = zip(self.tokens.tolist(), self.logprobs.tolist(), strict=True)
        kept = [[pair for pair in zip(*row, strict=True) if pair != (0, _NO_LOGPROB)] for row in rows]
        return [row or None for row in kept]


@dataclass(frozen=True)
class SampledSequence:
    """One sequence that was drawn, and why it ended: `stop` or `length`."""

    tokens: Ints
    logprobs: Floats32 | None = None
    stop_reason: str = "stop"
    topk: TopK | None = None


@dataclass(frozen=True)
class SampleOutput:
    """What came of a sampling request; a NaN among the prompt's log-probabilities means there is none."""

    sequences: tuple[SampledSequence, ...]
    prompt_logprobs: Floats32 | None = None
    topk_prompt: TopK | None = None
    target_prompt_logprobs: AnyTensor | None = None
    prompt_alt_tokens: tuple[Ints, Floats32] | None = None
    prompt_cache_hit_tokens: int = 0


def read_loss_request(body: bytes) -> LossRequest:
    """A `ForwardBackwardRequest`; raises CallError that names the field."""
    message = Message(body)
    config: dict[str, float | str] = {key: each.double(2) for key, each in message.entries(5, "loss_fn_config").items()}
    for key, each in message.entries(7, "loss_fn_config").items():
        value = each.message(2, "value")
        config[key] = value.text(2) if value.last_of(1, 2) == 2 else value.double(1)
    room = _Room()
    return LossRequest(
        message.text(1, "model_id"),
        message.int32(2),
        tuple(_read_datum(each, room) for each in message.messages(3, "data")),
        message.text(4, "loss_fn"),
        config,
        bool(message.unsigned(6)),
    )


def write_loss_request(request: LossRequest) -> bytes:
    """The other side of `read_loss_request`; numbers of the config are written for old readers too."""
    numbers = {key: float(value) for key, value in request.config.items() if not isinstance(value, str)}
    config = {key: write_bytes(2, _config_value(value)) for key, value in request.config.items()}
    return b"".join(
        [
            write_text(1, request.model),
            write_int(2, request.seq),
            *(write_bytes(3, _datum_bytes(each)) for each in request.data),
            write_text(4, request.loss),
            write_entries(5, {key: write_double(2, value) for key, value in numbers.items()}),
            write_int(6, request.forward_only),
            write_entries(7, config),
        ]
    )


def read_loss_request_json(facts: Mapping[str, Any], *, forward_only: bool) -> LossRequest:
    """The JSON of clients before 0.25, from `forward` or `forward_backward`."""
    name = "forward_input" if forward_only and "forward_input" in facts else "forward_backward_input"
    inner = facts.get(name)
    if not isinstance(inner, Mapping):
        raise CallError(f"{name}: is missing or not an object", where=name)
    data, config = inner.get("data"), inner.get("loss_fn_config")
    if not isinstance(data, list):
        raise CallError("data: is missing or not a list", where="data")
    if config is not None and not isinstance(config, Mapping):
        raise CallError("loss_fn_config: is not an object", where="loss_fn_config")
    room = _Room()
    return LossRequest(
        _told(facts, "model_id", str),
        int(facts["seq_id"]) if isinstance(facts.get("seq_id"), int) else 0,
        tuple(_read_datum_json(each, f"data[{place}]", room) for place, each in enumerate(data)),
        _told(inner, "loss_fn", str),
        {str(key): _config_json(key, value) for key, value in (config or {}).items()},
        forward_only,
    )


def write_loss_output(output: LossOutput) -> bytes:
    """A `ForwardBackwardOutput`: neighbours whose arrays have one layout share a record."""
    records = (_record(list(group)) for _, group in groupby(output.outputs, key=_layout))
    metrics = {key: write_double(2, float(value)) for key, value in output.metrics.items()}
    return b"".join(
        [write_text(1, _RECORD), *(write_bytes(2, record) for record in records), write_entries(3, metrics)]
    )


def read_loss_output(body: bytes) -> LossOutput:
    """The other side of `write_loss_output`."""
    message = Message(body)
    outputs = [each for record in message.messages(2, "loss_fn_outputs") for each in _read_record(record)]
    metrics = {key: each.double(2) for key, each in message.entries(3, "metrics").items()}
    return LossOutput(tuple(outputs), metrics)


def loss_output_json(output: LossOutput) -> dict[str, object]:
    """For clients before 0.25."""
    return {
        "loss_fn_output_type": _RECORD,
        "loss_fn_outputs": [{name: tensor_json(array) for name, array in each.items()} for each in output.outputs],
        "metrics": dict(output.metrics),
    }


def write_sample_output(output: SampleOutput) -> bytes:
    """A `SampleResponse`."""
    parts = [write_bytes(1, _sequence_bytes(each)) for each in output.sequences]
    if output.prompt_logprobs is not None:
        parts.append(write_bytes(2, array_bytes(output.prompt_logprobs)))
    if output.topk_prompt is not None:
        parts.append(write_bytes(3, _topk_bytes(output.topk_prompt)))
    parts.append(write_int(4, output.prompt_cache_hit_tokens))
    if output.target_prompt_logprobs is not None:
        parts.append(write_bytes(5, write_tensor(output.target_prompt_logprobs)))
    if output.prompt_alt_tokens is not None:
        tokens, logprobs = output.prompt_alt_tokens
        inner = write_bytes(1, write_tensor(tokens, int32=True)) + write_bytes(2, write_tensor(logprobs))
        parts.append(write_bytes(6, inner))
    return b"".join(parts)


def read_sample_output(body: bytes) -> SampleOutput:
    """The other side of `write_sample_output`."""
    message = Message(body)
    alternatives = message.message(6, "prompt_alt_tokens")
    return SampleOutput(
        tuple(_read_sequence(each) for each in message.messages(1, "sequences")),
        read_array(message.bytes(2), FLOAT32, "prompt_logprobs") if message.has(2) else None,
        _read_topk(message.message(3, "topk_prompt_logprobs")) if message.has(3) else None,
        read_tensor(message.message(5, "target_prompt_logprobs")) if message.has(5) else None,
        (
            _dense(read_tensor(alternatives.message(1, "tokens"))),
            _dense(read_tensor(alternatives.message(2, "logprobs"))),
        )
        if message.has(6)
        else None,
        message.int32(4),
    )


def sample_output_json(output: SampleOutput) -> dict[str, object]:
    """For clients before 0.25."""
    shown: dict[str, object] = {
        "type": "sample",
        "sequences": [_sequence_json(each) for each in output.sequences],
        "prompt_logprobs": None
        if output.prompt_logprobs is None
        else [None if math.isnan(each) else each for each in output.prompt_logprobs.tolist()],
        "topk_prompt_logprobs": None if output.topk_prompt is None else output.topk_prompt.lists(),
        "prompt_cache_hit_tokens": output.prompt_cache_hit_tokens,
    }
    if output.target_prompt_logprobs is not None:
        shown["target_prompt_logprobs"] = tensor_json(output.target_prompt_logprobs)
    if output.prompt_alt_tokens is not None:
        tokens, logprobs = output.prompt_alt_tokens
        shown["prompt_alt_tokens"] = {"tokens": tensor_json(tokens), "logprobs": tensor_json(logprobs)}
    return shown


def read_prompt_json(facts: object, where: str = "prompt") -> Ints:
    """The tokens of a `ModelInput` in JSON, whose chunks must be text."""
    chunks = facts.get("chunks") if isinstance(facts, Mapping) else None
    if not isinstance(chunks, list):
        raise CallError(f"{where}: is not an object with a list of `chunks`", where=where)
    parts = []
    for place, chunk in enumerate(chunks):
        at = f"{where}.chunks[{place}]"
        if not isinstance(chunk, Mapping):
            raise CallError(f"{at}: is not an object", where=at)
        kind = chunk.get("type", "encoded_text")
        if kind != "encoded_text":
            raise _no_text(at, kind)
        parts.append(read_numbers_json(chunk.get("tokens"), f"{at}.tokens"))
    return np.concatenate([np.empty(0, np.int64), *parts])


def check_loss_request(request: LossRequest, *, vocabulary: int, longest: int) -> None:
    """Raise CallError or UnsupportedError that names the field, where the request cannot be computed."""
    _check_loss(request)
    if not request.data:
        raise CallError("data: is empty; send at least one datum", where="data")
    for place, datum in enumerate(request.data):
        where = f"data[{place}]"
        _check_tokens(datum.tokens, f"{where}.model_input", vocabulary)
        if not 0 < len(datum.tokens) <= longest:
            found = f"has {len(datum.tokens):,} tokens; the model takes 1 to {longest:,}"
            raise CallError(f"{where}.model_input: {found}", where=f"{where}.model_input")
        _check_inputs(request.loss, datum, f"{where}.loss_fn_inputs", vocabulary)


def _check_loss(request: LossRequest) -> None:
    if request.loss not in LOSSES:
        raise UnsupportedError(
            f"loss_fn: {request.loss!r} is not computed here; its formula is not published",
            hint=f"use one of {', '.join(LOSSES)}, or write the loss yourself with `forward_backward_custom`",
            where="loss_fn",
        )
    known = _CONFIG.get(request.loss, ())
    for key, value in request.config.items():
        where = f"loss_fn_config.{key}"
        if key not in known:
            takes = f"takes {' and '.join(known)}" if known else "takes none"
            raise CallError(f"{where}: is not known; the loss {request.loss!r} {takes}", where=where)
        if isinstance(value, str) or not math.isfinite(value) or value < 0:
            raise CallError(f"{where}: is {value!r}; expected a number of 0 or more", where=where)
    if request.loss == "dro" and "beta" not in request.config:
        raise CallError(
            "loss_fn_config.beta: is missing; the loss 'dro' needs to know how strongly it pulls back",
            hint="pass loss_fn_config={'beta': 0.05}, or what suits the task",
            where="loss_fn_config.beta",
        )
    low, high = clip_bounds(request.config)
    if low > high:
        where = f"loss_fn_config.{_BOUNDS[0]}"
        raise CallError(f"{where}: {low:g} is above {_BOUNDS[1]}, {high:g}; both are bounds of the ratio", where=where)


def _check_inputs(loss: str, datum: Datum, where: str, vocabulary: int) -> None:
    for name in ("target_tokens", *(() if loss == "cross_entropy" else _POLICY_INPUTS)):
        if name not in datum.inputs:
            raise CallError(f"{where}.{name}: is missing; the loss {loss!r} needs it", where=f"{where}.{name}")
    targets = datum.inputs["target_tokens"]
    named = f"{where}.target_tokens"
    if targets.dtype.kind != "i":
        raise CallError(f"{named}: are not whole numbers but {targets.dtype}", where=named)
    widest = 2 if loss == "cross_entropy" else 1
    if targets.ndim == 2 and targets.shape[1] > vocabulary:
        found = f"name {targets.shape[1]:,} tokens at each place; the vocabulary has {vocabulary:,}"
        raise CallError(f"{named}: {found}", where=named)
    if not 1 <= targets.ndim <= widest or len(targets) != len(datum.tokens) or 0 in targets.shape:
        shapes = f"[{len(datum.tokens)}]" + (f" or [{len(datum.tokens)}, K]" if widest == 2 else "")
        found = f"have the shape {list(targets.shape)}; expected {shapes}, one place for each input token"
        raise CallError(f"{named}: {found}", where=named)
    _check_tokens(targets, named, vocabulary)
    for name in ("weights",) if loss == "cross_entropy" else _POLICY_INPUTS:
        if name in datum.inputs:
            _check_numbers(datum.inputs[name], targets, f"{where}.{name}")
    if loss != "cross_entropy":
        for name in datum.inputs.keys() - {"target_tokens", *_POLICY_INPUTS}:
            takes = f"the loss {loss!r} takes target_tokens, {', '.join(_POLICY_INPUTS)}"
            raise CallError(f"{where}.{name}: is not known; {takes}", where=f"{where}.{name}")


def _check_numbers(found: Array, targets: Array, where: str) -> None:
    if found.shape != targets.shape:
        shapes = f"have the shape {list(found.shape)}, and target_tokens {list(targets.shape)}"
        raise CallError(f"{where}: {shapes}; they must be one", where=where)
    if not np.isfinite(found).all():
        bad = np.argwhere(~np.isfinite(found))
        at = f"{where}{_place(bad[0])}"
        raise CallError(f"{at}: is {found[tuple(bad[0])]}, not a finite number", where=at)


def _check_tokens(tokens: Array, where: str, vocabulary: int) -> None:
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocabulary):
        bad = np.argwhere((tokens < 0) | (tokens >= vocabulary))
        at = f"{where}{_place(bad[0])}"
        raise CallError(f"{at}: token {tokens[tuple(bad[0])]} is not in the vocabulary of {vocabulary:,}", where=at)


def _place(index: Array) -> str:
    return "".join(f"[{each}]" for each in index.tolist())


def clip_bounds(config: Mapping[str, float | str]) -> tuple[float, float]:
    """The ratios between which a policy loss moves; the published default is 0.2 to either side."""
    return float(config.get(_BOUNDS[0], _LOW)), float(config.get(_BOUNDS[1], _HIGH))


class _Room:
    """How many cells the sparse tensors of one request may still unfold to."""

    def __init__(self) -> None:
        self._cells = MOST_CELLS

    def unfold(self, tensor: AnyTensor, where: str) -> Array:
        """The tensor, dense."""
        if isinstance(tensor, SparseRows):
            self._cells -= tensor.shape[0] * tensor.shape[1]
            if self._cells < 0:
                found = f"the sparse tensors of the request have more than {MOST_CELLS:,} cells"
                raise CallError(f"{where}: {found}", hint="send fewer data at once", where=where)
        return _dense(tensor)


def _dense(tensor: AnyTensor) -> Array:
    return tensor.dense() if isinstance(tensor, SparseRows) else tensor


def _read_datum(message: Message, room: _Room) -> Datum:
    parts = []
    for chunk in message.messages(1, "model_input.chunks"):
        kind = chunk.last_of(1, 2, 3)
        if kind in (2, 3):
            raise _no_text(chunk.where, "image" if kind == 2 else "dmel")
        parts.append(read_array(chunk.message(1, "encoded_text").bytes(1), INT32, chunk.where))
    inputs = {}
    for name, entry in message.entries(2, "loss_fn_inputs").items():
        value = entry.message(2, "")
        value.where = entry.where
        inputs[name] = room.unfold(read_tensor(value), entry.where)
    return Datum(np.concatenate([np.empty(0, np.int64), *parts]), inputs)


def _read_datum_json(facts: object, where: str, room: _Room) -> Datum:
    if not isinstance(facts, Mapping):
        raise CallError(f"{where}: is not an object", where=where)
    tokens = read_prompt_json(facts.get("model_input"), f"{where}.model_input")
    inputs = facts.get("loss_fn_inputs")
    if not isinstance(inputs, Mapping):
        raise CallError(f"{where}.loss_fn_inputs: is missing or not an object", where=f"{where}.loss_fn_inputs")
    named = ((str(name), f"{where}.loss_fn_inputs.{name}", value) for name, value in inputs.items())
    return Datum(tokens, {name: room.unfold(read_tensor_json(value, at), at) for name, at, value in named})


def _datum_bytes(datum: Datum) -> bytes:
    text = write_bytes(1, datum.tokens.astype("<i4").tobytes())
    inputs = {name: write_bytes(2, write_tensor(array)) for name, array in datum.inputs.items()}
    return write_bytes(1, write_bytes(1, text)) + write_entries(2, inputs)


def _config_value(value: float | str) -> bytes:
    return write_bytes(2, value.encode()) if isinstance(value, str) else write_double(1, float(value))


def _config_json(key: object, value: object) -> float | str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return float(value)
    raise CallError(f"loss_fn_config.{key}: is neither a number nor a text", where=f"loss_fn_config.{key}")


def _layout(output: Mapping[str, Array]) -> tuple[tuple[str, int, tuple[int, ...]], ...]:
    return tuple((name, dtype_of(array), array.shape[1:]) for name, array in sorted(output.items()))


def _record(outputs: list[Mapping[str, Array]]) -> bytes:
    fields = {}
    for name, dtype, trailing in _layout(outputs[0]):
        raw = [array_bytes(output[name]) for output in outputs]
        offsets = np.cumsum([0, *(len(each) for each in raw)]).astype("<i8")
        batched = (
            write_bytes(1, b"".join(raw))
            + write_bytes(2, offsets.tobytes())
            + write_int(3, dtype)
            + write_packed(4, trailing)
        )
        fields[name] = write_bytes(2, batched)
    return write_text(1, _RECORD) + write_entries(2, fields) + write_int(3, len(outputs))


def _read_record(record: Message) -> Iterator[dict[str, Array]]:
    columns = {name: _read_column(entry) for name, entry in record.entries(2, "fields").items()}
    count = record.int64(3) or max((len(each) for each in columns.values()), default=0)
    if count < 0 or count > MOST_CELLS or any(len(each) != count for each in columns.values()):
        raise CallError(f"{record.where}: has {count} data, and fields of other counts", where=record.where)
    return ({name: column[place] for name, column in columns.items()} for place in range(count))


def _read_column(entry: Message) -> list[Array]:
    batched, where = entry.message(2, ""), entry.where
    dtype, trailing = batched.unsigned(3), batched.ints64(4)
    offsets = read_array(batched.bytes(2), INT64, where)
    data = batched.bytes(1)
    size = {FLOAT32: 4, INT64: 8, INT32: 4, BFLOAT16: 2}.get(dtype, 1)
    width = size * math.prod(trailing)
    steps = np.diff(offsets)
    if len(offsets) and (
        width <= 0 or min(trailing, default=0) < 0 or offsets[0] or offsets[-1] != len(data) or (steps < 0).any()
    ):
        raise CallError(f"{where}: its offsets do not divide its {len(data)} bytes", where=where)
    if width > 0 and (steps % width).any():
        raise CallError(f"{where}: its offsets are no multiples of {width} bytes", where=where)
    ends = offsets.tolist()
    parts = (read_array(data[start:stop], dtype, where) for start, stop in pairwise(ends))
    return [part.reshape(-1, *trailing) for part in parts]


def _sequence_bytes(sequence: SampledSequence) -> bytes:
    parts = [write_int(1, 0 if sequence.stop_reason == "stop" else 1)]
    parts.append(write_bytes(2, sequence.tokens.astype("<i4").tobytes()))
    if sequence.logprobs is not None:
        parts.append(write_bytes(3, array_bytes(sequence.logprobs)))
    if sequence.topk is not None:
        parts.append(write_bytes(4, _topk_bytes(sequence.topk)))
    return b"".join(parts)


def _read_sequence(message: Message) -> SampledSequence:
    reason = message.int32(1)
    if reason not in (0, 1):
        raise CallError(
            f"{message.where}.stop_reason: is {reason}; expected 0 or 1", where=f"{message.where}.stop_reason"
        )
    return SampledSequence(
        read_array(message.bytes(2), INT32, f"{message.where}.tokens"),
        read_array(message.bytes(3), FLOAT32, f"{message.where}.logprobs") if message.has(3) else None,
        ("stop", "length")[reason],
        _read_topk(message.message(4, "topk_sampled_logprobs")) if message.has(4) else None,
    )


def _sequence_json(sequence: SampledSequence) -> dict[str, object]:
    shown: dict[str, object] = {
        "tokens": sequence.tokens.tolist(),
        "logprobs": None if sequence.logprobs is None else sequence.logprobs.tolist(),
        "stop_reason": sequence.stop_reason,
    }
    if sequence.topk is not None:
        shown["topk_logprobs"] = sequence.topk.lists()
    return shown


def _topk_bytes(topk: TopK) -> bytes:
    length, k = topk.tokens.shape
    return (
        write_bytes(1, topk.tokens.astype("<i4").tobytes())
        + write_bytes(2, topk.logprobs.astype("<f4").tobytes())
        + write_int(3, k)
        + write_int(4, length)
    )


def _read_topk(message: Message) -> TopK:
    k, length = message.unsigned(3) & 0xFFFF_FFFF, message.unsigned(4) & 0xFFFF_FFFF
    tokens = read_array(message.bytes(1), INT32, f"{message.where}.token_ids")
    logprobs = read_array(message.bytes(2), FLOAT32, f"{message.where}.logprobs")
    if not len(tokens) == len(logprobs) == k * length:
        found = f"has {len(tokens)} tokens and {len(logprobs)} log-probabilities for {length} places of {k}"
        raise CallError(f"{message.where}: {found}", where=message.where)
    return TopK(tokens.reshape(length, k), logprobs.reshape(length, k))


def _told(facts: Mapping[str, Any], name: str, kind: type[str]) -> str:
    found = facts.get(name)
    if not isinstance(found, kind):
        raise CallError(f"{name}: is missing or not a text", where=name)
    return found


def _no_text(where: str, kind: object) -> UnsupportedError:
    return UnsupportedError(
        f"{where}: is of type {str(kind)!r}; this server's models read text only",
        hint="send chunks of type `encoded_text`",
        where=where,
    )
