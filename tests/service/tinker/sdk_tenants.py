"""Eight clients of the Tinker SDK with adapters of their own: `python sdk_tenants.py URL KEY MODEL`.

It prints the digests of what each trains alone, and of what they train all at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier
from typing import Any

import numpy as np
import tinker

STEPS = 2
WEIGHTS = "adapter_model.safetensors"
SECONDS = 60


@dataclass(frozen=True)
class Tenant:
    """What one client trains."""

    rank: int
    lengths: tuple[int, ...]
    loss: str = "cross_entropy"
    layers: str = "mlp attn unembed"

    def data(self, step: int) -> list[Any]:
        """The rows of a step: other tokens in each, and of the lengths given."""
        chance = np.random.default_rng([self.rank, step])
        return [self._datum(chance, length) for length in self.lengths]

    def _datum(self, chance: np.random.Generator, length: int) -> Any:
        tokens = chance.integers(5, 2000, length + 1)
        inputs: dict[str, Any] = {"target_tokens": tokens[1:].astype(np.int64)}
        if self.loss == "cross_entropy":
            inputs["weights"] = chance.random(length, np.float32)
        else:
            inputs["logprobs"] = -chance.random(length, np.float32)
            inputs["advantages"] = chance.standard_normal(length, np.float32)
        return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1].tolist()), loss_fn_inputs=inputs)


TENANTS = (
    Tenant(1, (3, 20)),
    Tenant(3, (17,), layers="mlp"),
    Tenant(5, (9, 9, 9), loss="importance_sampling"),
    Tenant(8, (64,), layers="attn"),
    Tenant(12, (1, 31), loss="ppo"),
    Tenant(16, (40, 2), layers="mlp attn"),
    Tenant(24, (5,), loss="cispo", layers="attn unembed"),
    Tenant(64, (25, 30)),
)


def train(url: str, key: str, model: str, tenant: Tenant, started: Barrier) -> str:
    """The digest of the adapter that a client of its own trains, once all have made their models."""
    service: Any = tinker.ServiceClient(base_url=url, api_key=key)
    layers = {f"train_{name}": name in tenant.layers.split() for name in ("mlp", "attn", "unembed")}
    training = service.create_lora_training_client(model, rank=tenant.rank, seed=tenant.rank, **layers).result()
    started.wait(SECONDS)
    sent: list[Any] = []
    for step in range(STEPS):
        # One chunk before, one after: gradients of two calls are summed.
        sent.append(training.forward_backward(tenant.data(step), tenant.loss))
        sent.append(training.forward_backward(tenant.data(step + 100), tenant.loss))
        sent.append(training.optim_step(tinker.AdamParams(learning_rate=1e-3, grad_clip_norm=1.0)))
    for each in sent:
        each.result(SECONDS)
    rest = tinker.RestClient(base_url=url, api_key=key)
    saved = training.save_weights_external("trained").result(SECONDS).path
    address = rest.get_external_weights_urls(saved).result(SECONDS).urls[WEIGHTS]
    service.close("success").result(SECONDS)
    with urllib.request.urlopen(address, timeout=SECONDS) as answer:
        return hashlib.sha256(answer.read()).hexdigest()


def main(url: str, key: str, model: str) -> dict[str, list[str]]:
    """The digests, in the order of the tenants."""
    alone = [train(url, key, model, tenant, Barrier(1)) for tenant in TENANTS]
    all_made = Barrier(len(TENANTS))
    with ThreadPoolExecutor(len(TENANTS)) as threads:
        together = list(threads.map(lambda tenant: train(url, key, model, tenant, all_made), TENANTS))
    return {"alone": alone, "together": together}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:4])), flush=True)
    os._exit(0)  # the threads of the SDK's transport may abort an interpreter that ends under them
