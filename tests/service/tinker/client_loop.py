"""A client of its own process: trains by the SDK, tells each step on its standard output, and at the end what it heard.

`python client_loop.py URL KEY [STEPS]`; without STEPS it goes on until a line comes on its standard input.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

import numpy as np
import tinker

SAVE_EVERY = 5


def main(url: str, key: str, steps: int | None) -> None:
    service = tinker.ServiceClient(base_url=url, api_key=key)
    training = service.create_lora_training_client(base_model="practice", rank=4, seed=11).result()
    enough = threading.Event()
    if steps is None:
        threading.Thread(target=lambda: (sys.stdin.readline(), enough.set()), daemon=True).start()
    told: list[Any] = []
    step = 0
    while not enough.is_set() if steps is None else step < steps:
        chunks = [training.forward_backward(data_of(step, part), "cross_entropy") for part in range(2)]
        stepped = training.optim_step(tinker.AdamParams(learning_rate=1e-3))
        saved = training.save_state(f"step_{step}") if step % SAVE_EVERY == 2 else None
        told += [describe(each.result()) for each in chunks]
        told.append(stepped.result().metrics)
        if saved:
            told.append(saved.result().path.rpartition("/")[2])
        if step % SAVE_EVERY == 3:
            told.append(draw(training, step))
        step += 1
        tell({"step": step})
    path = training.save_weights_external("final").result().path
    tell({"told": told, "path": path, "steps": step})


def draw(training: Any, seed: int) -> list[list[int]]:
    """Samples of the weights as they stand."""
    sampler = training.save_weights_and_get_sampling_client()
    params = tinker.SamplingParams(max_tokens=40, seed=seed, stop=[])
    found = sampler.sample(tinker.ModelInput.from_ints([5, 6, 7]), 2, params).result()
    return [list(each.tokens) for each in found.sequences]


def tell(facts: dict[str, Any]) -> None:
    print(json.dumps(facts), flush=True)


def data_of(step: int, part: int) -> list[Any]:
    chance = np.random.default_rng([step, part])
    tokens = chance.integers(5, 2000, 25)
    inputs = {"target_tokens": tokens[1:].astype(np.int64), "weights": chance.random(24, np.float32)}
    return [tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1].tolist()), loss_fn_inputs=inputs)]


def describe(output: Any) -> Any:
    logprobs = [float(each) for found in output.loss_fn_outputs for each in found["logprobs"].data]
    return [output.metrics, logprobs]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else None)
    sys.stdout.flush()
    os._exit(0)  # the threads of the SDK's transport may abort an interpreter that ends under them
