"""Every public method of the Tinker SDK, called: `python sdk_methods.py URL KEY MODEL`.

It prints the SDK's version and, for each client class, what came of each method and the requests that it sent.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, get_args

import tinker
from tinker._base_client import AsyncAPIClient

SECONDS = 30
# What a client sends of itself, whichever method is called.
_OWN_REQUESTS = ("session_heartbeat", "telemetry", "client/config", "client/dynamic_config", "create_session")
_IDS = {"train": "{run}", "sample": "{sampler}"}
ANSWERED, LOCAL, REFUSED, NOT_OFFERED = "answered", "the SDK answers", "refused", "not offered"


@dataclass
class Asked:
    """Clients, a trained model with what it saved, and the requests that they sent."""

    url: str
    key: str
    model: str
    requests: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.service = self.new_service()
        self.rest = tinker.RestClient(base_url=self.url, api_key=self.key)
        self.training = self.service.create_lora_training_client(self.model, rank=4, seed=1).result()
        self.run = self.training.model_id
        self.session = self.run.split(":train:")[0]
        self.data = [self._datum([5, 6, 7, 8, 9])]
        self.state = self.training.save_state("state").result().path
        self.adapter = self.training.save_weights_for_sampler("adapter").result().path
        self.external = self.training.save_weights_external("external").result().path
        self.sampling = self.service.create_sampling_client(model_path=self.adapter).result()
        self.sampler = self.rest.get_session(self.session).result().sampler_ids[0]
        self.prompt = tinker.ModelInput.from_ints([5, 6, 7])
        self._names = 0

    def new_service(self, project: str | None = None) -> Any:
        """A client with a session of its own."""
        return tinker.ServiceClient(base_url=self.url, api_key=self.key, project_id=project)

    def name(self) -> str:
        """A name for a checkpoint that none has."""
        self._names += 1
        return f"name{self._names}"

    def passing(self) -> str:
        """The path of a checkpoint that may go."""
        return str(self.training.save_state(self.name()).result().path)

    @staticmethod
    def _datum(tokens: list[int]) -> Any:
        taught = tinker.TensorData(data=tokens[1:], dtype="int64", shape=[len(tokens) - 1])
        return tinker.Datum(
            model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": taught}
        )


def _squares(_: Any, given: list[Any]) -> Any:
    return sum((each**2).sum() for each in given), {}


def _traced(logprobs: Any, weights: Any) -> Any:
    loss = -(logprobs * weights).sum()
    return loss, {"custom/loss:sum": loss}


Call = Callable[[Asked], tuple[Any, ...]]
DAY = datetime(2026, 1, 2, tzinfo=UTC)
ADAM = tinker.AdamParams(learning_rate=1e-3)
FEW = tinker.SamplingParams(max_tokens=2, seed=1)
# Each method's positional arguments; made before the method is called. A twin `_async` takes the same.
CALLS: dict[str, dict[str, Call]] = {
    "ServiceClient": {
        "close": lambda w: ("success",),
        "copy_weights": lambda w: (w.adapter,),
        "create_custom_loss": lambda w: (_traced, {"logprobs": 1, "weights": 1}),
        "create_lora_training_client": lambda w: (w.model, 8),
        "create_rest_client": lambda w: (),
        "create_sampling_client": lambda w: (w.adapter,),
        "create_training_client_from_state": lambda w: (w.state,),
        "create_training_client_from_state_with_optimizer": lambda w: (w.state,),
        "get_console_url": lambda w: (),
        "get_server_capabilities": lambda w: (),
        "get_telemetry": lambda w: (),
    },
    "TrainingClient": {
        "create_sampling_client": lambda w: (w.adapter,),
        "forward": lambda w: (w.data, "cross_entropy"),
        "forward_backward": lambda w: (w.data, "cross_entropy"),
        "forward_backward_custom": lambda w: (w.data, _squares),
        "get_console_url": lambda w: (),
        "get_info": lambda w: (),
        "get_telemetry": lambda w: (),
        "get_tokenizer": lambda w: (),
        "load_state": lambda w: (w.state,),
        "load_state_with_optimizer": lambda w: (w.state,),
        "optim_step": lambda w: (ADAM,),
        "save_state": lambda w: (w.name(),),
        "save_weights_and_get_sampling_client": lambda w: (),
        "save_weights_external": lambda w: (w.name(),),
        "save_weights_for_sampler": lambda w: (w.name(),),
    },
    "SamplingClient": {
        "compute_logprobs": lambda w: (w.prompt,),
        "create": lambda w: (w.service.holder,),
        "from_sampler_handle": lambda w: (w.sampling.get_sampler_handle(),),
        "get_base_model": lambda w: (),
        "get_sampler_handle": lambda w: (),
        "get_telemetry": lambda w: (),
        "get_tokenizer": lambda w: (),
        "on_queue_state_change": lambda w: (w.training._queue_state_logger and _active(), None),
        "sample": lambda w: (w.prompt, 2, FEW),
    },
    "RestClient": {
        "assign_session_project": lambda w: (w.session, "project"),
        "copy_weights": lambda w: (w.adapter, "project"),
        "delete_checkpoint": lambda w: (w.run, w.passing().split("/", 3)[3]),
        "delete_checkpoint_from_tinker_path": lambda w: (w.passing(),),
        "export_session_trace": lambda w: (w.session,),
        "get_audit_log": lambda w: (),
        "get_billing_usage": lambda w: (DAY, DAY),
        "get_current_checkpoint_storage_usage": lambda w: (),
        "get_external_weights_urls": lambda w: (w.external,),
        "get_sampler": lambda w: (w.sampler,),
        "get_server_capabilities": lambda w: (),
        "get_session": lambda w: (w.session,),
        "get_telemetry": lambda w: (),
        "get_training_run": lambda w: (w.run,),
        "get_training_run_by_tinker_path": lambda w: (w.state,),
        "get_weights_info_by_tinker_path": lambda w: (w.state,),
        "list_checkpoints": lambda w: (w.run,),
        "list_sessions": lambda w: (),
        "list_training_runs": lambda w: (),
        "list_user_checkpoints": lambda w: (),
        "publish_checkpoint_from_tinker_path": lambda w: (w.adapter,),
        "search_sessions": lambda w: (tinker.types.SessionSearchRequest(),),
        "set_checkpoint_ttl_from_tinker_path": lambda w: (w.passing(), 7200),
        "unpublish_checkpoint_from_tinker_path": lambda w: (w.adapter,),
        "whoami": lambda w: (),
    },
}
# Keywords that a method needs beside its arguments.
MORE: dict[str, Callable[[Asked], dict[str, Any]]] = {
    "create": lambda w: {"base_model": w.model},
    "from_sampler_handle": lambda w: {"api_key": w.key},
}


def _active() -> Any:
    return tinker.lib.api_future_impl.QueueState.ACTIVE


@contextmanager
def noted(asked: Asked) -> Iterator[None]:
    """Every request that the clients send is noted."""
    request: Any = AsyncAPIClient.request

    async def note(self: Any, cast_to: Any, options: Any, **more: Any) -> Any:
        path = str(options.url).removeprefix("/api/v1/")
        if path not in _OWN_REQUESTS:
            asked.requests.append((options.method.upper(), path.split("?")[0]))
        return await request(self, cast_to, options, **more)

    AsyncAPIClient.request = note  # type: ignore[method-assign]
    yield


def public_methods(client: type) -> list[str]:
    """The methods a user may call, without the twins that are deprecated."""
    found = [name for name, member in inspect.getmembers(client, callable) if not name.startswith("_")]
    return [name for name in found if not (name.endswith("_async") and name.removesuffix("_async") in found)]


def settle(given: Any) -> Any:
    """The result of whatever a method gives: a value, a future or a coroutine."""
    if inspect.iscoroutine(given):
        given = asyncio.run(given)
    while isinstance(given, tinker.APIFuture) or hasattr(given, "result"):
        given = given.result(SECONDS)
    return given


def call(asked: Asked, client: str, method: str, name: str) -> tuple[str, str]:
    """What comes of a method, and its requests."""
    owner = {
        "ServiceClient": asked.service,
        "TrainingClient": asked.training,
        "SamplingClient": asked.sampling,
        "RestClient": asked.rest,
    }[client]
    if client == "ServiceClient" and name in ("close", "copy_weights"):
        owner = asked.new_service("project")
        assert owner.holder, "a session, so that one can end"
    given = CALLS[client][name](asked)
    more = MORE[name](asked) if name in MORE else {}
    asked.requests.clear()
    with ThreadPoolExecutor(1) as thread:
        sent = thread.submit(lambda: settle(getattr(owner, method)(*given, **more)))
        try:
            sent.result(SECONDS)
            said = ANSWERED if asked.requests else LOCAL
        except TimeoutError:
            raise AssertionError(f"{client}.{method} does not end: {asked.requests}") from None
        except Exception as error:  # an error is what comes of some methods
            said = describe(error, bool(asked.requests))
    return said, show_requests(asked)


def describe(error: Exception, was_sent: bool) -> str:
    """An error as the page shows it: what kind, and the sentence that the caller reads."""
    body = getattr(error, "body", None)
    sentence = str(error)
    if isinstance(body, dict):
        inner = body.get("error", body)
        sentence = str(inner.get("message", inner) if isinstance(inner, dict) else inner)
    sentence = re.sub(r"session-[a-z0-9]+", "{session}", " ".join(sentence.split()))
    if not was_sent:
        return f"{LOCAL}: {sentence}"
    assert getattr(error, "status_code", 400) < 500, f"{error!r} {body}"
    kind = NOT_OFFERED if getattr(error, "status_code", None) == 404 else REFUSED
    return f"{kind}: {sentence}"


def show_requests(asked: Asked) -> str:
    """The routes, each once, without the ids of this run."""
    shown: dict[str, None] = {}
    for verb, path in asked.requests:
        named = re.sub(r"session-[a-z0-9]+", "{session}", path)
        named = re.sub(r"{session}:(train|sample):\d+", lambda found: _IDS[found[1]], named)
        named = re.sub(r"(weights/)(name\d+|adapter|state|external)", r"\1{name}", named)
        shown[f"{verb} {named}"] = None
    return ", ".join(f"`{each}`" for each in shown)


def losses(asked: Asked) -> dict[str, str]:
    """What comes of each loss that the SDK names, on data that has every input."""
    count = 4
    texts = {"target_tokens": [6, 7, 8, 9]}
    numbers = {"logprobs": [-1.0] * count, "advantages": [1.0] * count}
    inputs = {name: tinker.TensorData(data=each, dtype="int64", shape=[count]) for name, each in texts.items()}
    inputs |= {name: tinker.TensorData(data=each, dtype="float32", shape=[count]) for name, each in numbers.items()}
    plain = tinker.Datum(model_input=tinker.ModelInput.from_ints([5, 6, 7, 8]), loss_fn_inputs=inputs)
    configs: dict[str, dict[str, Any]] = {"dro": {"beta": 0.1}, "custom": {"loss_id": "loss"}}
    found = {}
    for name in get_args(tinker.types.LossFnType):
        data = asked.data if name == "cross_entropy" else [plain]
        try:
            asked.training.forward_backward(data, name, configs.get(name)).result(SECONDS)
            found[name] = ANSWERED
        except Exception as error:  # an error is what comes of some losses
            found[name] = describe(error, was_sent=True)
    return found


def main(url: str, key: str, model: str) -> dict[str, Any]:
    """What came of each method; a twin that does another thing is an error."""
    warnings.simplefilter("ignore")
    asked = Asked(url, key, model)
    found: dict[str, dict[str, tuple[str, str]]] = {}
    with noted(asked):
        for client, calls in CALLS.items():
            methods = public_methods(getattr(tinker, client))
            assert methods == sorted(calls), f"{client}: the SDK has other methods than are called here: {methods}"
            found[client] = {name: call(asked, client, name, name) for name in methods}
            for name in (each for each in methods if hasattr(getattr(tinker, client), f"{each}_async")):
                twin = call(asked, client, f"{name}_async", name)[0]
                assert twin == found[client][name][0], f"{client}.{name}_async: {twin}; its twin: {found[client][name]}"
    return {"version": tinker.__version__, "methods": found, "losses": losses(asked)}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:4])), flush=True)
    os._exit(0)  # the threads of the SDK's transport may abort an interpreter that ends under them
