"""A client of its own process that does everything once by the SDK, and tells what it found as JSON.

`python client_tour.py URL KEY`
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import tinker

warnings.simplefilter("ignore")

LENGTH = 24
ADAM = tinker.AdamParams(learning_rate=3e-3)


def main(url: str, key: str) -> None:
    service = tinker.ServiceClient(base_url=url, api_key=key)
    training = service.create_lora_training_client(base_model="practice", rank=8, seed=3).result()
    found: dict[str, Any] = {"tokenizer": training.get_info().model_data.tokenizer_id}
    found["losses"] = [step(training, 0) for _ in range(6)]
    found["refused"] = [category(act) for act in refused(training)]
    found["after_refusals"] = step(training, 0)
    chunks = training.forward_backward([datum(place, 1) for place in range(1100)], "cross_entropy").result()
    found["chunked_tokens"] = chunks.metrics["tokens:sum"]
    training.optim_step(ADAM).result()
    found |= go_on(service, training) | draw(service, training)
    found["custom"] = training.forward_backward_custom([datum(1)], squared).result().metrics["squared"]
    training.optim_step(ADAM).result()
    print(json.dumps(found), flush=True)


def go_on(service: Any, training: Any) -> dict[str, Any]:
    """From a saved state: in place, and as new models with the optimizer's state and without it."""
    path = training.save_state("middle").result().path
    straight = [step(training, 1) for _ in range(3)]
    training.load_state_with_optimizer(path).result()
    loaded = [step(training, 1) for _ in range(3)]
    twin = service.create_training_client_from_state_with_optimizer(path).result()
    fresh = service.create_training_client_from_state(path).result()
    return {
        "straight": straight,
        "loaded": loaded,
        "twin": [step(twin, 1) for _ in range(3)],
        "fresh": [step(fresh, 1) for _ in range(3)],
        "taken": category(lambda: training.save_state("middle").result()),
        "overwritten": training.save_state("middle", overwrite=True).result().path == path,
    }


def draw(service: Any, training: Any) -> dict[str, Any]:
    """Samples of saved weights, which stay as they were while the model is trained on."""
    row = datum(7)
    tokens = row.model_input.to_ints()
    path = training.save_weights_for_sampler("named").result().path
    named = service.create_sampling_client(model_path=path)
    unnamed = training.save_weights_and_get_sampling_client()
    inflight = training.save_weights_and_get_sampling_client(kind="inflight")
    own = training.forward([row], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data
    before = [each.compute_logprobs(row.model_input).result() for each in (named, unnamed, inflight)]
    samples = [sample(named, seed) for seed in (1, 1, 2)]
    for _ in range(3):
        step(training, 2)
    training.save_weights_and_get_sampling_client(kind="inflight").result()
    after = [each.compute_logprobs(row.model_input).result() for each in (named, unnamed, inflight)]
    base = service.create_sampling_client(base_model="practice").compute_logprobs(row.model_input).result()
    return {
        "path": path,
        "num_tokens": len(tokens),
        "own": [float(each) for each in own],
        "before": before,
        "after": after,
        "base": base,
        "samples": samples,
    }


def sample(sampler: Any, seed: int) -> list[list[int]]:
    params = tinker.SamplingParams(max_tokens=6, seed=seed, temperature=1.0, stop=[])
    prompt = tinker.ModelInput.from_ints([5, 6, 7])
    return [list(each.tokens) for each in sampler.sample(prompt, 2, params).result().sequences]


def step(training: Any, seed: int) -> float:
    passed = training.forward_backward([datum(seed), datum(seed + 100, 9)], "cross_entropy")
    training.optim_step(ADAM).result()
    return float(passed.result().metrics["loss:sum"])


def refused(training: Any) -> list[Callable[[], Any]]:
    """Requests with a fault each."""
    wrong = datum(1, target=10**6)
    return [
        lambda: training.forward_backward([wrong], "cross_entropy").result(),
        lambda: training.forward_backward([datum(1)], "gspo").result(),
        lambda: training.load_state("tinker://somebody:train:0/weights/elses").result(),
        lambda: training.save_state("no/slashes").result(),
    ]


def category(act: Callable[[], Any]) -> str:
    try:
        act()
    except tinker.RequestFailedError as error:
        return str(error.category.value)
    except tinker.APIStatusError as error:
        return str(error.status_code)
    return "no error"


def squared(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
    loss = sum((each**2).sum() for each in logprobs)
    return loss, {"squared": float(loss)}


def datum(seed: int, length: int = LENGTH, *, target: int | None = None) -> Any:
    tokens = np.random.default_rng(seed).integers(5, 2000, length + 1)
    targets = tokens[1:].astype(np.int64)
    if target is not None:
        targets[-1] = target
    inputs = {"target_tokens": targets, "weights": np.ones(length, np.float32)}
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1].tolist()), loss_fn_inputs=inputs)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
    sys.stdout.flush()
    os._exit(0)  # the threads of the SDK's transport may abort an interpreter that ends under them
