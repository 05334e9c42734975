"""What a service supports: models, limits, and which methods answer, by calls that leave nothing behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from luthier.engines.tinker.address import Service, ask, check_service
from luthier.engines.tinker.connection import Connection, Layout, Offered, list_offered
from luthier.errors import LuthierError, ServerError

_LIMITS = (
    "fwdbwd_max_chunk_len",
    "fwdbwd_max_chunk_bytes_count",
    "sample_max_concurrent_requests",
    "parallel_fwdbwd_chunks",
    "proto_compress_fwdbwd",
    "custom_loss_server_side",
)
_READ = (
    ("health", "GET", "healthz", None),
    ("client flags", "POST", "client/config", {"sdk_version": "0.38.0"}),
    ("dynamic flags", "POST", "client/dynamic_config", {"sdk_version": "0.38.0"}),
    ("capabilities", "GET", "get_server_capabilities", None),
    ("training runs", "GET", "training_runs?limit=1&offset=0", None),
    ("checkpoints", "GET", "checkpoints?limit=1&offset=0", None),
    ("sessions", "GET", "sessions?limit=1&offset=0", None),
    ("who the key is", "GET", "auth/apikey/me", None),
)
_TOKENS = (1, 2, 3, 4)
_RANK = 8
_NAME = "luthier-inspect"


@dataclass(frozen=True)
class Answered:
    """One method that was called: whether it answered, how long that took, and what it said where it did not."""

    method: str
    call: str
    works: bool
    seconds: float
    said: str = ""


@dataclass(frozen=True)
class Inspection:
    """Everything that was found of a service."""

    url: str
    sdk: str
    models: list[Offered]
    limits: dict[str, Any]
    methods: list[Answered] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def inspect_service(
    service: Service, *, tried: str | None = None, tell: Callable[[str], None] | None = None
) -> Inspection:
    """What the service says of itself; `tried` names a base on which every verb is tried as well."""
    import importlib.metadata

    check_service(service)  # an address where nothing answers is an error, and no finding
    methods, config = [], {}
    for method, verb, path, body in _READ:
        answered, found = _time(method, f"{verb} {path.partition('?')[0]}", partial(ask, service, verb, path, body))
        methods.append(answered)
        if path == "client/config" and isinstance(found, dict):
            config = found
    models: list[Offered] = []
    with suppress(ServerError):  # that it does not say stands among the methods
        models = list_offered(service)
    if tried is not None:
        methods += _try_verbs(Connection(service), tried, tell or (lambda _: None))
    limits = {name: config[name] for name in _LIMITS if name in config}
    return Inspection(service.url, importlib.metadata.version("tinker"), models, limits, methods)


def _time(method: str, call: str, do: Callable[[], Any]) -> tuple[Answered, Any]:
    started = time.monotonic()
    try:
        found = do()
    except LuthierError as error:
        return Answered(method, call, False, time.monotonic() - started, error.message), None
    return Answered(method, call, True, time.monotonic() - started), found


def _try_verbs(connection: Connection, base: str, tell: Callable[[str], None]) -> list[Answered]:
    """A few tokens trained on a small adapter, saved, sampled and deleted again."""
    found: list[Answered] = []

    def attempt(method: str, do: Callable[[], Any]) -> Any:
        tell(method)
        answered, result = _time(method, "", lambda: connection.wait(do(), method))
        found.append(answered)
        return result

    tell("create_model")
    answered, model = _time("create_model", "", lambda: connection.create_model(base, Layout(_RANK, 0)))
    found.append(answered)
    if model is None:
        return found
    try:
        paths = _try_training(model, attempt)
        _try_sampling(connection, base, paths, attempt)
        for path in paths.values():
            kind = path.split("/")[-2]
            attempt(f"delete {kind}", partial(connection.rest().delete_checkpoint_from_tinker_path, path))
    finally:
        connection.close()
    return found


def _try_training(model: Any, attempt: Callable[[str, Callable[[], Any]], Any]) -> dict[str, str]:
    """The paths of what was saved."""
    from tinker import types

    inputs: Any = {"target_tokens": list(_TOKENS[1:]), "weights": [1.0] * (len(_TOKENS) - 1)}
    data = [types.Datum(model_input=types.ModelInput.from_ints(list(_TOKENS[:-1])), loss_fn_inputs=inputs)]
    wide: Any = {"target_tokens": [[2, 3], [3, 4], [4, 5]], "weights": [[0.5, 0.5]] * 3}
    soft = [types.Datum(model_input=types.ModelInput.from_ints(list(_TOKENS[:-1])), loss_fn_inputs=wide)]
    attempt("forward", lambda: model.forward(data, "cross_entropy"))
    attempt("forward of soft targets", lambda: model.forward(soft, "cross_entropy"))
    attempt("forward_backward", lambda: model.forward_backward(data, "cross_entropy"))
    attempt("optim_step", lambda: model.optim_step(types.AdamParams(learning_rate=1e-4)))
    saves = {"save_weights": "save_state", "save_weights_for_sampler": "save_weights_for_sampler"}
    saves["save_weights_external"] = "save_weights_external"
    results = {name: attempt(name, partial(getattr(model, method), _NAME)) for name, method in saves.items()}
    return {name: str(result.path) for name, result in results.items() if result is not None}


def _try_sampling(
    connection: Connection, base: str, paths: dict[str, str], attempt: Callable[[str, Callable[[], Any]], Any]
) -> None:
    from tinker import types

    prompt = types.ModelInput.from_ints(list(_TOKENS))
    how = types.SamplingParams(max_tokens=2, temperature=0.0, seed=0)
    saved = paths.get("save_weights_for_sampler")
    named: dict[str, dict[str, Any]] = {"base": {"base_model": base}, "tuned": {"model_path": saved}}
    for name, arguments in named.items():
        if None in arguments.values():
            continue
        sampler = attempt(f"sampler of the {name}", partial(connection.client.create_sampling_client, **arguments))
        if sampler is not None:
            attempt(f"sample from the {name}", partial(sampler.sample, prompt, 1, how))
            attempt(f"compute_logprobs of the {name}", partial(sampler.compute_logprobs, prompt))
    if state := paths.get("save_weights"):
        load = connection.client.create_training_client_from_state_with_optimizer
        attempt("load_weights with optimizer", partial(load, state))
    if external := paths.get("save_weights_external"):
        attempt("external_weights_urls", partial(connection.rest().get_external_weights_urls, external))
