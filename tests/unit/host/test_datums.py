"""Our reader and writer of the Tinker messages against the descriptors and converters of the SDK itself."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from luthier.errors import CallError, UnsupportedError
from luthier.host import protobuf, tensors
from luthier.host.datums import (
    Datum,
    LossOutput,
    LossRequest,
    SampledSequence,
    SampleOutput,
    TopK,
    check_loss_request,
    loss_output_json,
    read_loss_output,
    read_loss_request,
    read_loss_request_json,
    read_sample_output,
    sample_output_json,
    write_loss_output,
    write_loss_request,
    write_sample_output,
)
from luthier.host.tensors import SparseRows

tinker = pytest.importorskip("tinker")
from tinker.proto import tinker_public_pb2 as pb  # noqa: E402
from tinker.proto.request_conv import forward_backward_request_to_proto  # noqa: E402
from tinker.proto.response_conv import (  # noqa: E402
    deserialize_forward_backward_output,
    deserialize_sample_response,
)
from tinker.types.forward_backward_input import ForwardBackwardInput  # noqa: E402
from tinker.types.forward_backward_request import ForwardBackwardRequest  # noqa: E402

TOKENS = st.integers(0, 2**31 - 1)
FLOATS = st.floats(width=32)
NAMES = st.text("abc_", min_size=1, max_size=6)


def arrays(dtype: str, shape: tuple[int, ...], elements: Any) -> st.SearchStrategy[Any]:
    return npst.arrays(dtype, shape, elements=elements)


@st.composite
def data(draw: st.DrawFn) -> Datum:
    length = draw(st.integers(0, 5))
    shape = draw(st.sampled_from([(length,), (length, 1), (length, 3)]))
    return Datum(
        draw(arrays("int64", (length,), TOKENS)),
        {
            "target_tokens": draw(arrays("int64", shape, st.integers(-(2**63), 2**63 - 1))),
            **draw(st.dictionaries(NAMES, arrays("float32", shape, FLOATS), max_size=2)),
        },
    )


REQUESTS = st.builds(
    LossRequest,
    st.text(max_size=8),
    st.integers(0, 2**31 - 1),
    st.lists(data(), max_size=3).map(tuple),
    st.text("abc", max_size=5),
    st.dictionaries(NAMES, st.floats(allow_nan=False) | st.text(max_size=4), max_size=3),
    st.booleans(),
)


def same(first: Any, second: Any) -> None:
    np.testing.assert_array_equal(first, second)
    assert np.asarray(first).dtype == np.asarray(second).dtype


def same_requests(first: LossRequest, second: LossRequest) -> None:
    assert replace(first, data=()) == replace(second, data=())
    for one, other in zip(first.data, second.data, strict=True):
        same(one.tokens, other.tokens)
        assert one.inputs.keys() == other.inputs.keys()
        for name in one.inputs:
            same(one.inputs[name], other.inputs[name])


@given(REQUESTS)
def test_a_request_comes_back_and_is_the_message_of_the_sdk(request: LossRequest) -> None:
    body = write_loss_request(request)
    same_requests(read_loss_request(body), request)
    theirs = pb.ForwardBackwardRequest.FromString(body)
    assert (theirs.model_id, theirs.seq_id, theirs.loss_fn) == (request.model, request.seq, request.loss)
    assert theirs.forward_only == request.forward_only
    assert dict(theirs.loss_fn_config) == {k: v for k, v in request.config.items() if not isinstance(v, str)}
    same_requests(read_loss_request(theirs.SerializeToString()), request)


@given(st.lists(data(), min_size=1, max_size=3), st.dictionaries(NAMES, st.floats(allow_nan=False), max_size=2))
def test_what_the_sdk_sends_is_read(found: list[Datum], config: dict[str, float]) -> None:
    sent = [tinker.Datum(tinker.ModelInput.from_ints(datum.tokens.tolist()), dict(datum.inputs)) for datum in found]
    request = ForwardBackwardRequest(ForwardBackwardInput(sent, "cross_entropy", config), "model", 7)
    body = forward_backward_request_to_proto(request).SerializeToString()
    same_requests(read_loss_request(body), LossRequest("model", 7, tuple(found), "cross_entropy", config))


def test_sparse_targets_of_the_sdk_are_made_dense() -> None:
    torch = pytest.importorskip("torch")
    targets = torch.zeros(6, 50, dtype=torch.int64)
    weights = torch.zeros(6, 50)
    targets[1, 2], targets[5, 49], weights[1, 2], weights[5, 49] = 9, 4, 0.5, -1.0
    datum = tinker.Datum(tinker.ModelInput.from_ints([1] * 6), {"target_tokens": targets, "weights": weights})
    assert datum.loss_fn_inputs["weights"].sparse_crow_indices is not None
    body = forward_backward_request_to_proto(
        ForwardBackwardRequest(ForwardBackwardInput([datum], "cross_entropy"), "m", 1)
    ).SerializeToString()
    (found,) = read_loss_request(body).data
    same(found.inputs["target_tokens"], targets.numpy())
    same(found.inputs["weights"], weights.numpy())


def test_half_precision_tensors_are_read() -> None:
    message = pb.ForwardBackwardRequest()
    tensor = message.data.add().loss_fn_inputs["weights"]
    tensor.dense, tensor.dtype = np.array([0x3F80, 0xC000], "<u2").tobytes(), pb.DTYPE_BFLOAT16
    same(read_loss_request(message.SerializeToString()).data[0].inputs["weights"], np.array([1, -2], np.float32))


@given(REQUESTS.map(write_loss_request), st.data())
def test_broken_bytes_are_refused_and_nothing_else(body: bytes, draw: st.DataObject) -> None:
    broken = bytearray(body[: draw.draw(st.integers(0, len(body)))])
    for place in draw.draw(st.lists(st.integers(0, max(0, len(broken) - 1)), max_size=3)):
        if broken:
            broken[place] = draw.draw(st.integers(0, 255))
    for read in (read_loss_request, read_loss_output, read_sample_output):
        with suppress(CallError, UnsupportedError):
            read(bytes(broken))
    try:
        pb.ForwardBackwardRequest.FromString(bytes(broken))
    except Exception:  # their parser's own error: what it refuses, ours refuses too
        with pytest.raises((CallError, UnsupportedError)):
            read_loss_request(bytes(broken))


@given(st.binary(max_size=40))
def test_noise_is_refused_and_nothing_else(noise: bytes) -> None:
    for read in (read_loss_request, read_loss_output, read_sample_output):
        with suppress(CallError, UnsupportedError):
            read(noise)


@st.composite
def loss_outputs(draw: st.DrawFn) -> LossOutput:
    shapes = draw(st.lists(st.sampled_from([(3,), (1,), (2, 2), (2, 5)]), max_size=5))
    outputs = tuple({"logprobs": draw(arrays("float32", shape, FLOATS))} for shape in shapes)
    return LossOutput(outputs, draw(st.dictionaries(NAMES, st.floats(allow_nan=False), max_size=3)))


@given(loss_outputs())
def test_a_loss_output_is_read_by_the_sdk_and_by_us(output: LossOutput) -> None:
    body = write_loss_output(output)
    theirs, ours = deserialize_forward_backward_output(body), read_loss_output(body)
    assert theirs.loss_fn_output_type == "ArrayRecord"
    assert theirs.metrics == ours.metrics == output.metrics
    assert len(theirs.loss_fn_outputs) == len(output.outputs)
    for told, again, shown in zip(output.outputs, ours.outputs, theirs.loss_fn_outputs, strict=True):
        same(again["logprobs"], told["logprobs"])
        same(shown["logprobs"].to_numpy(), told["logprobs"])
        assert shown["logprobs"].shape == list(told["logprobs"].shape)
    assert pb.ForwardBackwardOutput.FromString(body).SerializeToString(deterministic=True)


def a_topk(rows: list[list[tuple[int, float]] | None]) -> TopK:
    """Two of each row, which may have fewer."""
    found = TopK.empty(len(rows), 2)
    for place, row in enumerate(rows):
        for rank, (token, logprob) in enumerate(row or []):
            found.tokens[place, rank], found.logprobs[place, rank] = token, logprob
    return found


TOPKS = st.builds(
    a_topk,
    st.lists(st.none() | st.lists(st.tuples(st.integers(1, 9), st.floats(-9, 0, width=32)), min_size=1, max_size=2)),
)
SEQUENCES = st.integers(1, 4).flatmap(
    lambda n: st.builds(
        SampledSequence,
        arrays("int64", (n,), TOKENS),
        st.none() | arrays("float32", (n,), st.floats(-9, 0, width=32)),
        st.sampled_from(["stop", "length"]),
        st.none() | TOPKS,
    )
)
SPARSE = SparseRows(np.array([-1.0, -2.0], np.float32), np.array([0, 1, 1, 2]), np.array([3, 0]), (3, 4))
OUTPUTS = st.builds(
    SampleOutput,
    st.lists(SEQUENCES, max_size=3).map(tuple),
    st.none() | arrays("float32", (3,), st.just(np.nan) | st.floats(-9, 0, width=32)),
    st.none() | TOPKS,
    st.none() | st.just(SPARSE) | arrays("float32", (2, 3), FLOATS),
    st.none() | st.tuples(arrays("int64", (2, 3), TOKENS), arrays("float32", (2, 3), FLOATS)),
    st.integers(0, 99),
)


@given(OUTPUTS)
def test_a_sample_output_is_read_by_the_sdk_and_by_us(output: SampleOutput) -> None:
    body = write_sample_output(output)
    ours, theirs = read_sample_output(body), deserialize_sample_response(body)
    assert write_sample_output(ours) == body
    shown = sample_output_json(output)
    assert theirs.prompt_cache_hit_tokens == output.prompt_cache_hit_tokens
    assert theirs.prompt_logprobs == shown["prompt_logprobs"]
    if output.topk_prompt is not None and len(output.topk_prompt.tokens):
        assert theirs.topk_prompt_logprobs == output.topk_prompt.lists() == shown["topk_prompt_logprobs"]
    for told, found in zip(output.sequences, theirs.sequences, strict=True):
        assert found.tokens == told.tokens.tolist()
        assert found.stop_reason == told.stop_reason
        assert found.logprobs == (None if told.logprobs is None else told.logprobs.tolist())
        if told.topk is not None and len(told.topk.tokens):
            assert found.topk_logprobs == told.topk.lists()
    if isinstance(output.target_prompt_logprobs, SparseRows):
        assert theirs.target_prompt_logprobs.sparse_crow_indices == SPARSE.rows.tolist()
        assert theirs.target_prompt_logprobs.sparse_col_indices == SPARSE.columns.tolist()
    if output.prompt_alt_tokens is not None:
        same(theirs.prompt_alt_tokens.tokens.to_numpy(), output.prompt_alt_tokens[0])
        same(theirs.prompt_alt_tokens.logprobs.to_numpy(), output.prompt_alt_tokens[1])


def json_request(**changes: object) -> dict[str, Any]:
    tensor = {"data": [2, 3], "dtype": "int64", "shape": [2]}
    datum = {
        "model_input": {"chunks": [{"tokens": [1], "type": "encoded_text"}, {"tokens": [2], "type": "encoded_text"}]},
        "loss_fn_inputs": {"target_tokens": tensor, "weights": {"data": [1, 0.5], "dtype": "float32"}},
    }
    inner = {"data": [datum], "loss_fn": "cross_entropy", **changes}
    return {"forward_backward_input": inner, "model_id": "m", "seq_id": 4}


def test_json_of_old_clients_is_the_same_request() -> None:
    found = read_loss_request_json(json_request(), forward_only=False)
    tokens, weights = np.array([1, 2]), np.array([1, 0.5], np.float32)
    datum = Datum(tokens, {"target_tokens": np.array([2, 3]), "weights": weights})
    same_requests(found, LossRequest("m", 4, (datum,), "cross_entropy"))
    old = json_request()
    old["forward_input"] = old.pop("forward_backward_input")
    assert read_loss_request_json(old, forward_only=True).forward_only


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"data": 3}, "data"),
        ({"data": [{"model_input": {"chunks": [{"tokens": ["a"]}]}}]}, "data[0].model_input.chunks[0].tokens"),
        ({"data": [{"model_input": {"chunks": [{"tokens": [2**70]}]}}]}, "data[0].model_input.chunks[0].tokens"),
        ({"data": [{"model_input": {"chunks": [{"tokens": [[1], [2, 3]]}]}}]}, "data[0].model_input.chunks[0].tokens"),
        ({"data": [{"model_input": {"chunks": [{"type": "image"}]}}]}, "data[0].model_input.chunks[0]"),
        ({"data": [{"model_input": {"chunks": []}}]}, "data[0].loss_fn_inputs"),
        ({"loss_fn": None}, "loss_fn"),
        ({"loss_fn_config": {"beta": []}}, "loss_fn_config.beta"),
    ],
)
def test_what_is_wrong_in_json_is_named(changes: dict[str, object], where: str) -> None:
    with pytest.raises((CallError, UnsupportedError)) as raised:
        read_loss_request_json(json_request(**changes), forward_only=False)
    assert raised.value.where == where
    assert raised.value.message.startswith(where)


@pytest.mark.parametrize(
    ("rows", "columns", "shape"),
    [
        ([0, 2], [0, 0], [1, 3]),
        ([0, 2], [1, 0], [1, 3]),
        ([0, 2], [0, 3], [1, 3]),
        ([0, 1], [0, 1], [1, 3]),
        ([1, 2], [0, 1], [1, 3]),
        ([0, 1, 2], [0, 1], [1, 3]),
        ([0, 2, 1, 2], [0, 1], [3, 3]),
        ([0, 2], [0, 1], [1 << 30, 1 << 30]),
        ([0, 2], [0, 1], [2]),
    ],
)
def test_sparse_tensors_that_do_not_hold_are_refused(rows: list[int], columns: list[int], shape: list[int]) -> None:
    facts = json_request()
    facts["forward_backward_input"]["data"][0]["loss_fn_inputs"]["weights"] = {
        "data": [1, 2], "dtype": "float32", "shape": shape,
        "sparse_crow_indices": rows, "sparse_col_indices": columns,
    }  # fmt: skip
    with pytest.raises(CallError, match="weights"):
        read_loss_request_json(facts, forward_only=False)


def test_small_requests_cannot_unfold_to_more_than_memory_holds() -> None:
    wide = {
        "data": [], "dtype": "float32", "shape": [1, 1 << 23],
        "sparse_crow_indices": [0, 0], "sparse_col_indices": [],
    }  # fmt: skip
    facts = json_request()
    datum = {"model_input": {"chunks": []}, "loss_fn_inputs": {"weights": wide}}
    facts["forward_backward_input"]["data"] = [datum] * 3
    with pytest.raises(CallError, match=r"data\[2\]\.loss_fn_inputs\.weights"):
        read_loss_request_json(facts, forward_only=False)


def a_datum(**inputs: object) -> Datum:
    found = {"target_tokens": [2, 3], "weights": [1.0, 0.5], **inputs}
    return Datum(np.array([1, 2]), {name: np.asarray(value) for name, value in found.items() if value is not None})


POLICY = {"weights": None, "logprobs": [-1.0, -1.0], "advantages": [0.5, 1.0]}


@pytest.mark.parametrize(
    ("request_", "where"),
    [
        (LossRequest("m", 1, (), "cross_entropy"), "data"),
        (LossRequest("m", 1, (a_datum(),), "gspo"), "loss_fn"),
        (LossRequest("m", 1, (a_datum(),), "cross_entropy", {"beta": 1.0}), "loss_fn_config.beta"),
        (LossRequest("m", 1, (a_datum(**POLICY),), "dro"), "loss_fn_config.beta"),
        (
            LossRequest("m", 1, (a_datum(**POLICY),), "ppo", {"clip_low_threshold": 1.5}),
            "loss_fn_config.clip_low_threshold",
        ),
        (
            LossRequest("m", 1, (a_datum(**POLICY),), "ppo", {"clip_high_threshold": "x"}),
            "loss_fn_config.clip_high_threshold",
        ),
        (LossRequest("m", 1, (a_datum(), Datum(np.array([], int), {})), "cross_entropy"), "data[1].model_input"),
        (LossRequest("m", 1, (Datum(np.array([1, 99]), {}),), "cross_entropy"), "data[0].model_input[1]"),
        (LossRequest("m", 1, (Datum(np.arange(11), {}),), "cross_entropy"), "data[0].model_input"),
        (
            LossRequest("m", 1, (a_datum(target_tokens=None),), "cross_entropy"),
            "data[0].loss_fn_inputs.target_tokens",
        ),
        (
            LossRequest("m", 1, (a_datum(target_tokens=[2, -100]),), "cross_entropy"),
            "data[0].loss_fn_inputs.target_tokens[1]",
        ),
        (
            LossRequest("m", 1, (a_datum(target_tokens=[[2], [99]], weights=[[1.0], [1.0]]),), "cross_entropy"),
            "data[0].loss_fn_inputs.target_tokens[1][0]",
        ),
        (
            LossRequest("m", 1, (a_datum(target_tokens=np.ones((2, 51), int), weights=None),), "cross_entropy"),
            "data[0].loss_fn_inputs.target_tokens",
        ),
        (
            LossRequest("m", 1, (a_datum(target_tokens=[1.0, 2.0]),), "cross_entropy"),
            "data[0].loss_fn_inputs.target_tokens",
        ),
        (LossRequest("m", 1, (a_datum(weights=[1.0]),), "cross_entropy"), "data[0].loss_fn_inputs.weights"),
        (LossRequest("m", 1, (a_datum(weights=[1.0, np.nan]),), "cross_entropy"), "data[0].loss_fn_inputs.weights[1]"),
        (LossRequest("m", 1, (a_datum(),), "ppo"), "data[0].loss_fn_inputs.logprobs"),
        (LossRequest("m", 1, (a_datum(**{**POLICY, "mask": [1.0, 1.0]}),), "ppo"), "data[0].loss_fn_inputs.mask"),
        (
            LossRequest("m", 1, (a_datum(**{**POLICY, "target_tokens": [[1], [2]]}),), "ppo"),
            "data[0].loss_fn_inputs.target_tokens",
        ),
    ],
)
def test_what_cannot_be_computed_is_named(request_: LossRequest, where: str) -> None:
    with pytest.raises((CallError, UnsupportedError)) as raised:
        check_loss_request(request_, vocabulary=50, longest=10)
    assert raised.value.where == where
    assert raised.value.message.startswith(where)


def test_what_can_be_computed_passes() -> None:
    wide = a_datum(target_tokens=[[2, 3], [3, 4]], weights=[[0.5, 0.5], [-1.0, 2.0]], anything=[1.0])
    check_loss_request(LossRequest("m", 1, (a_datum(weights=None), wide), "cross_entropy"), vocabulary=50, longest=2)
    clip: dict[str, float | str] = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}
    check_loss_request(LossRequest("m", 1, (a_datum(**POLICY),), "ppo", clip), vocabulary=50, longest=2)
    check_loss_request(LossRequest("m", 1, (a_datum(**POLICY),), "dro", {"beta": 0.05}), vocabulary=50, longest=2)


def test_json_of_results_for_old_clients() -> None:
    output = LossOutput(({"logprobs": np.array([[-1, -2]], np.float32)},), {"loss:sum": 3.0})
    assert loss_output_json(output) == {
        "loss_fn_output_type": "ArrayRecord",
        "loss_fn_outputs": [{"logprobs": {"data": [-1.0, -2.0], "dtype": "float32", "shape": [1, 2]}}],
        "metrics": {"loss:sum": 3.0},
    }


def test_a_shape_that_no_array_can_have_and_a_message_of_too_many_fields_are_refused() -> None:
    empty = protobuf.Message(protobuf.write_int(3, 1) + protobuf.write_packed(4, [0, 2**62, 4]), "data[0]")
    with pytest.raises(CallError, match="has a shape of"):
        tensors.read_tensor(empty)
    with pytest.raises(CallError, match="more than 200,000 fields"):
        protobuf.Message(b"\x08\x01" * 200_001)
