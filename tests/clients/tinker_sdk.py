"""What a user of the Tinker SDK does, with any SDK from 0.11 to 0.38: `python tinker_sdk.py URL KEY MODEL`.

It imports nothing of this project and asks for no version: what a version offers is seen on its classes. It prints one
JSON object; an AssertionError names the part that does not hold.
"""

from __future__ import annotations

import inspect
import io
import json
import logging
import math
import os
import sys
import tarfile
import time
import urllib.request
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import tinker
from tinker import types

SUMS = [f"{a} + {b} = {a + b}" for a in range(1, 5) for b in range(2, 6)]
RATE = types.AdamParams(learning_rate=4e-3)
SOON_SECONDS = 20
MANY = 520
CLOSE = 2e-3


def main(url: str, key: str, model: str) -> dict[str, Any]:
    """The whole flow, part by part; each part says how long it took."""
    warnings.simplefilter("ignore")
    logging.getLogger("tinker").setLevel(logging.CRITICAL)
    service = tinker.ServiceClient(base_url=url, api_key=key, user_metadata={"made_by": tinker.__version__})
    rest = make_rest(service, url, key)
    took: dict[str, float] = {}

    def part(check: Callable[..., Any], *given: Any) -> Any:
        began = time.monotonic()
        result = check(*given)
        took[check.__name__.removeprefix("check_")] = round(time.monotonic() - began, 2)
        return result

    part(check_capabilities, service, model)
    first = settle(service.create_lora_training_client(model, rank=8, seed=3, user_metadata={"wave": "one"}))
    part(check_info, first, model)
    data = [datum(first.get_tokenizer().encode(text)) for text in SUMS]
    losses = part(check_training, first, data)
    part(check_other_layout, service, model, data)
    part(check_chunks, service, model, data)
    part(check_losses, first, data)
    custom = part(check_custom_loss, first, data)
    part(check_two_dimensions, first, data)
    part(check_errors, first, data)
    part(check_refused_creations, service, model)
    state = part(check_state, service, first, data)
    sampler = part(check_sampler, service, first, data, model)
    downloaded = part(check_download, rest, first, sampler)
    part(check_lists, rest, first, model, state, sampler)
    part(check_checkpoint_changes, rest, first)
    part(check_end, service, url, key)
    return {
        "sdk": tinker.__version__,
        "losses": losses,
        "custom_loss": custom,
        "state": state,
        "sampler": sampler,
        "downloaded": downloaded,
        "seconds": took,
    }


def make_rest(service: Any, url: str, key: str) -> Any:
    """The client that reads and changes what is stored; newer versions need no session for it."""
    rest = getattr(tinker, "RestClient", None)
    if rest is not None and "base_url" in inspect.signature(rest).parameters:
        return rest(base_url=url, api_key=key)
    return service.create_rest_client()


def settle(given: Any) -> Any:
    """A result: newer versions answer with a future where older ones wait."""
    while hasattr(given, "result"):
        given = given.result()
    return given


def datum(tokens: list[int], **inputs: Any) -> Any:
    """A text that is learned whole, or with inputs of its own, each a list of floats."""
    count = len(tokens) - 1
    tensors = inputs or {"weights": [1.0] * count}
    made = {"target_tokens": types.TensorData(data=list(tokens[1:]), dtype="int64", shape=[count])}
    for name, values in tensors.items():
        made[name] = types.TensorData(data=[float(each) for each in values], dtype="float32", shape=[count])
    return types.Datum(model_input=types.ModelInput.from_ints(list(tokens[:-1])), loss_fn_inputs=made)


def targets(given: Any) -> list[int]:
    """The tokens that a datum teaches."""
    return [int(each) for each in given.loss_fn_inputs["target_tokens"].data]


def tokens_of(given: Any) -> list[int]:
    """All tokens of a datum."""
    return [*given.model_input.to_ints(), targets(given)[-1]]


def logprobs(output: Any) -> list[list[float]]:
    """What the learner gave to each target of each datum."""
    return [[float(each) for each in one["logprobs"].data] for one in output.loss_fn_outputs]


def total(output: Any) -> float:
    """The summed loss of a call."""
    return float(output.metrics["loss:sum"])


def near(first: Any, second: Any, tolerance: float = CLOSE) -> bool:
    """Whether two nests of numbers are as good as the same."""
    return bool(np.allclose(np.concatenate(first), np.concatenate(second), atol=tolerance, rtol=0))


def step(client: Any, data: list[Any], loss: str = "cross_entropy", rate: Any = RATE) -> Any:
    """A forward_backward and an optim_step, both sent before either is read."""
    sent = client.forward_backward(data, loss)
    stepped = client.optim_step(rate)
    output = sent.result()
    stepped.result()
    return output


def read(client: Any, data: list[Any]) -> list[list[float]]:
    """What the client's model gives to each target now."""
    return logprobs(client.forward(data, "cross_entropy").result())


def check_capabilities(service: Any, model: str) -> None:
    names = [each.model_name for each in service.get_server_capabilities().supported_models]
    assert model in names, names


def check_info(client: Any, model: str) -> None:
    info = client.get_info()
    assert (info.is_lora, info.lora_rank, info.model_data.model_name) == (True, 8, model), info
    assert info.model_id == client.model_id, info


def check_training(client: Any, data: list[Any]) -> list[float]:
    """The loss is the sum that the log-probabilities say, changes nothing by itself, and falls by steps."""
    before = client.forward(data, "cross_entropy").result()
    assert len(before.loss_fn_outputs) == len(data)
    assert math.isclose(total(before), -sum(map(sum, logprobs(before))), rel_tol=1e-4), before.metrics
    assert near(read(client, data), logprobs(before), 1e-6)
    losses = [total(step(client, data)) for _ in range(8)]
    assert math.isclose(losses[0], total(before), rel_tol=1e-4), (losses, before.metrics)
    assert losses[-1] < 0.5 * losses[0], losses
    return [round(each, 4) for each in losses]


def check_other_layout(service: Any, model: str, data: list[Any]) -> None:
    """A rank that is no multiple of eight, on the MLP alone, beside the first adapter."""
    other = settle(service.create_lora_training_client(model, rank=5, seed=9, train_attn=False, train_unembed=False))
    assert other.get_info().lora_rank == 5
    losses = [total(step(other, data)) for _ in range(3)]
    assert losses[-1] < losses[0], losses


def check_chunks(service: Any, model: str, data: list[Any]) -> None:
    """A call of more data than go into one request steps as the same data with their weights added up."""
    whole = settle(service.create_lora_training_client(model, rank=4, seed=21))
    parts = settle(service.create_lora_training_client(model, rank=4, seed=21))
    two = data[:2]
    shares = [datum(tokens_of(each), weights=[1 / MANY] * len(targets(each))) for each in two]
    parted = step(parts, [shares[0]] * MANY + [shares[1]] * MANY)
    assert len(parted.loss_fn_outputs) == 2 * MANY
    assert math.isclose(total(parted), total(step(whole, two)), rel_tol=1e-3), parted.metrics
    assert near(read(parts, two), read(whole, two))


def check_losses(client: Any, data: list[Any]) -> None:
    """At equal probabilities each policy loss has a value that is known beforehand."""
    given = read(client, data[:4])
    advantages = [[(-1.0) ** place * 0.5 for place, _ in enumerate(each)] for each in given]
    rollouts = [
        datum(tokens_of(each), logprobs=q, advantages=a) for each, q, a in zip(data, given, advantages, strict=False)
    ]
    gain = sum(map(sum, advantages))
    expected = {"importance_sampling": -gain, "ppo": -gain}
    weighted = -sum(
        p * a for row, gains in zip(given, advantages, strict=True) for p, a in zip(row, gains, strict=True)
    )
    expected |= {"cispo": weighted, "dro": weighted}
    configs = {"ppo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}, "dro": {"beta": 0.1}}
    for name, value in expected.items():
        output = client.forward_backward(rollouts, name, configs.get(name)).result()
        assert math.isclose(total(output), value, abs_tol=CLOSE), (name, output.metrics, value)
        assert near(logprobs(output), given)
    client.optim_step(types.AdamParams(learning_rate=0.0)).result()
    assert near(read(client, data[:4]), given)


def check_custom_loss(client: Any, data: list[Any]) -> float | None:
    """A loss of the client's own: its metrics come back, and steps lower it."""
    try:
        import torch
    except ImportError:
        return None

    def distance(_: Any, given: list[Any]) -> Any:
        loss = sum(((each + 0.5) ** 2).sum() for each in given)
        return loss, {"distance:sum": float(loss)}

    values = []
    for _ in range(4):
        output = settle(client.forward_backward_custom(data, distance))
        client.optim_step(types.AdamParams(learning_rate=2e-3)).result()
        values.append(output.metrics["distance:sum"])
    assert torch.isfinite(torch.tensor(values)).all()
    assert values[-1] < values[0], values
    return float(values[-1])


def check_two_dimensions(client: Any, data: list[Any]) -> None:
    """Targets [N, K]: the weighted sum over each place's targets."""
    tokens = tokens_of(data[0])
    count = len(tokens) - 1
    pairs = [each for token in tokens[1:] for each in (token, (token + 1) % 50)]
    made = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=pairs, dtype="int64", shape=[count, 2]),
            "weights": types.TensorData(data=[0.75, 0.25] * count, dtype="float32", shape=[count, 2]),
        },
    )
    output = client.forward([made], "cross_entropy").result()
    given = np.array(output.loss_fn_outputs[0]["logprobs"].data).reshape(count, 2)
    assert np.allclose(given[:, 0], read(client, data[:1])[0], atol=CLOSE), given
    assert math.isclose(total(output), -float((given @ [0.75, 0.25]).sum()), rel_tol=1e-4), output.metrics


def refused(call: Callable[[], Any], *words: str) -> None:
    """The call raises soon, and its message has each word."""
    began = time.monotonic()
    raised: Any = None
    try:
        settle(call())
    except Exception as error:  # its class differs from version to version
        raised = error
    took = time.monotonic() - began
    assert raised is not None, f"nothing raised; expected {words}"
    assert took < SOON_SECONDS, f"{took:.0f} seconds until {raised!r}"
    said = f"{raised} {getattr(raised, 'body', '')}"
    assert all(word in said for word in words), f"{said!r} lacks one of {words}"


def check_errors(client: Any, data: list[Any]) -> None:
    """A bad request is told by its field, at once, and the client goes on."""
    before = read(client, data[:1])
    bad = datum([*tokens_of(data[0])[:-1], 10**7])
    refused(lambda: client.forward_backward([data[1], bad], "cross_entropy"), "target_tokens", "[1]")
    short = datum(tokens_of(data[0]), logprobs=[0.0] * len(targets(data[0])))
    refused(lambda: client.forward_backward([short], "importance_sampling"), "advantages")
    refused(lambda: client.save_state("no/such name"), "path")
    client.optim_step(types.AdamParams(learning_rate=0.0)).result()
    assert near(read(client, data[:1]), before, 1e-6)


def check_refused_creations(service: Any, model: str) -> None:
    refused(lambda: service.create_lora_training_client("nobody/no-model", rank=8), "nobody/no-model")
    refused(lambda: service.create_lora_training_client(model, rank=100_000), "rank")
    refused(lambda: service.create_sampling_client(model_path="tinker://none/sampler_weights/none"), "none")


def check_state(service: Any, client: Any, data: list[Any]) -> str:
    """From a saved state, with the optimizer's, the same step comes out; without, another."""
    saved = client.save_state("halfway").result().path
    assert saved == f"tinker://{client.model_id}/weights/halfway", saved
    then = read(client, data)
    step(client, data)
    after = read(client, data)
    kept = settle(service.create_training_client_from_state_with_optimizer(saved))
    assert kept.model_id != client.model_id
    assert near(read(kept, data), then, 1e-5)
    step(kept, data)
    assert near(read(kept, data), after, 1e-5)
    fresh = settle(service.create_training_client_from_state(saved))
    assert near(read(fresh, data), then, 1e-5)
    step(fresh, data)
    assert not near(read(fresh, data), after)
    settle(client.load_state(saved))
    assert near(read(client, data), then, 1e-5)
    if hasattr(client, "load_state_with_optimizer"):
        settle(client.load_state_with_optimizer(saved))
        step(client, data)
        assert near(read(client, data), after, 1e-5)
    return str(saved)


def check_sampler(service: Any, client: Any, data: list[Any], model: str) -> str:
    """The sampler has the adapter as it was saved, its seeds repeat, and its log-probabilities are the learner's."""
    saved = client.save_weights_for_sampler("first").result().path
    assert saved == f"tinker://{client.model_id}/sampler_weights/first", saved
    sampler = settle(service.create_sampling_client(model_path=saved))
    base = settle(service.create_sampling_client(base_model=model))
    learned = read(client, data[:1])[0]
    prompt = types.ModelInput.from_ints(tokens_of(data[0]))
    tuned, plain = (settle(each.compute_logprobs(prompt)) for each in (sampler, base))
    assert tuned[0] is None, tuned
    assert near([tuned[1:]], [learned], 1e-2), (tuned, learned)
    assert not near([plain[1:]], [learned], 1e-2)
    check_sampling(sampler, tokens_of(data[0]))
    step(client, data, rate=types.AdamParams(learning_rate=2e-2))
    assert settle(sampler.compute_logprobs(prompt)) == tuned
    newest = settle(client.save_weights_and_get_sampling_client())
    now = settle(newest.compute_logprobs(prompt))
    assert near([now[1:]], read(client, data[:1]), 1e-2)
    assert not near([now[1:]], [learned], 1e-2)
    return str(saved)


def check_sampling(sampler: Any, tokens: list[int]) -> None:
    prompt = types.ModelInput.from_ints(tokens[:4])

    def sample(count: int = 1, **more: Any) -> Any:
        extra = {name: more.pop(name) for name in ("include_prompt_logprobs", "topk_prompt_logprobs") if name in more}
        params = types.SamplingParams(**{"max_tokens": 6, "stop": [], **more})
        return sampler.sample(prompt=prompt, num_samples=count, sampling_params=params, **extra).result()

    twice = [[each.tokens for each in sample(3, seed=5).sequences] for _ in range(2)]
    assert twice[0] == twice[1], twice
    assert len({tuple(each) for each in twice[0]}) > 1, twice
    greedy = sample(temperature=0.0).sequences[0]
    assert (greedy.stop_reason, len(greedy.tokens), len(greedy.logprobs)) == ("length", 6, 6), greedy
    whole = types.ModelInput.from_ints([*tokens[:4], *greedy.tokens])
    again = settle(sampler.compute_logprobs(whole))
    assert near([again[4:]], [greedy.logprobs], 1e-2), (again, greedy)
    stop = greedy.tokens[2]
    stopped = sample(temperature=0.0, stop=[stop]).sequences[0]
    assert stopped.stop_reason == "stop", stopped
    assert len(stopped.tokens) <= 3, (stopped, greedy)
    told = sample(include_prompt_logprobs=True, topk_prompt_logprobs=3, seed=1)
    assert told.prompt_logprobs[0] is None, told
    assert near([told.prompt_logprobs[1:]], [again[1:4]], 1e-2), told
    best = told.topk_prompt_logprobs
    assert best[0] is None, best
    assert [len(each) for each in best[1:]] == [3, 3, 3], best
    assert all(each[0][1] >= each[1][1] >= each[2][1] for each in best[1:]), best
    narrow = sample(top_k=1, seed=3).sequences[0].tokens
    assert narrow == greedy.tokens, (narrow, greedy)


def check_download(rest: Any, client: Any, sampler: str) -> list[str]:
    """The adapter comes out in PEFT's format: as an archive before 0.36, file by file since."""
    if hasattr(rest, "get_external_weights_urls"):
        saved = client.save_weights_external("outside").result().path
        told = settle(rest.get_external_weights_urls(saved))
        files = {name: fetch(url) for name, url in told.urls.items()}
    else:
        told = settle(rest.get_checkpoint_archive_url_from_tinker_path(sampler))
        with tarfile.open(fileobj=io.BytesIO(fetch(told.url))) as archive:
            members = [each for each in archive.getmembers() if each.isfile()]
            files = {each.name.split("/")[-1]: archive.extractfile(each).read() for each in members}  # type: ignore[union-attr]
    assert json.loads(files["adapter_config.json"])["r"] == 8, files["adapter_config.json"]
    assert len(files["adapter_model.safetensors"]) > 1000
    return sorted(files)


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return bytes(answer.read())


def check_lists(rest: Any, client: Any, model: str, state: str, sampler: str) -> None:
    """The run, its checkpoints and the session are listed and told of."""
    runs = settle(rest.list_training_runs(limit=100))
    listed = {each.training_run_id: each for each in runs.training_runs}
    run = listed[client.model_id]
    assert (run.base_model, run.is_lora, run.lora_rank, run.user_metadata) == (model, True, 8, {"wave": "one"}), run
    assert runs.cursor.total_count >= len(listed), runs.cursor
    assert settle(rest.get_training_run(client.model_id)).last_checkpoint.tinker_path == state
    assert settle(rest.get_training_run_by_tinker_path(sampler)).training_run_id == client.model_id
    mine = {each.tinker_path: each for each in settle(rest.list_checkpoints(client.model_id)).checkpoints}
    assert {state, sampler} <= set(mine), mine
    assert (mine[state].checkpoint_type, mine[sampler].checkpoint_type) == ("training", "sampler"), mine
    assert mine[state].checkpoint_id == "weights/halfway", mine
    assert mine[state].size_bytes > mine[sampler].size_bytes > 0, mine
    everywhere = {each.tinker_path for each in settle(rest.list_user_checkpoints(limit=100)).checkpoints}
    assert {state, sampler} <= everywhere, everywhere
    info = settle(rest.get_weights_info_by_tinker_path(state))
    assert (info.base_model, info.lora_rank, info.train_mlp) == (model, 8, True), info
    session = client.holder.get_session_id() if hasattr(client.holder, "get_session_id") else client.holder._session_id
    told = settle(rest.get_session(session))
    assert client.model_id in told.training_run_ids, told
    assert told.sampler_ids, told
    assert session in settle(rest.list_sessions(limit=100)).sessions
    assert settle(rest.get_sampler(told.sampler_ids[0])).base_model == model


def check_checkpoint_changes(rest: Any, client: Any) -> None:
    """A checkpoint is published and taken back, may expire, and is deleted; a name is taken once."""
    options = {"ttl_seconds": 7200} if "ttl_seconds" in inspect.signature(client.save_state).parameters else {}
    path = client.save_state("passing", **options).result().path

    def find() -> Any:
        return {each.tinker_path: each for each in settle(rest.list_checkpoints(client.model_id)).checkpoints}.get(path)

    assert bool(find().expires_at) == bool(options), find()
    settle(rest.publish_checkpoint_from_tinker_path(path))
    assert find().public
    settle(rest.unpublish_checkpoint_from_tinker_path(path))
    assert not find().public
    if hasattr(rest, "set_checkpoint_ttl_from_tinker_path"):
        settle(rest.set_checkpoint_ttl_from_tinker_path(path, None))
        assert find().expires_at is None, find()
    if "overwrite" in inspect.signature(client.save_state).parameters:
        assert client.save_state("passing", overwrite=True).result().path == path
    settle(rest.delete_checkpoint_from_tinker_path(path))
    assert find() is None
    refused(lambda: client.load_state(path), "passing")
    refused(lambda: rest.get_training_run("nobody:train:0"), "nobody:train:0")


def check_end(service: Any, url: str, key: str) -> None:
    """A wrong key is refused at once; a session can be finished."""
    if hasattr(service, "close") and "status" in inspect.signature(service.close).parameters:
        settle(service.close("success"))
    wrong = f"{key[:-6]}xxxxxx"
    os.environ["TINKER_API_KEY"] = wrong  # the oldest prefer it to what they are given
    refused(lambda: tinker.ServiceClient(base_url=url, api_key=wrong).get_server_capabilities(), "key")


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:4])))
