"""One session with a service through the SDK: models to train, samplers, and what the service says of itself."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from luthier.engines.tinker.address import Service, ask, check_service
from luthier.engines.tinker.waiting import Queue, Watch, translate, wait
from luthier.errors import ServerError
from luthier.extras import import_extra

_CLOSE_SECONDS = 10.0


@dataclass(frozen=True)
class Offered:
    """A base model that a service offers."""

    name: str
    max_context_length: int | None = None
    trainable: bool = True
    sampleable: bool = True


@dataclass(frozen=True)
class Layout:
    """Which parts of a base get an adapter, and how wide it is."""

    rank: int
    seed: int
    attn: bool = True
    mlp: bool = True
    unembed: bool = False


def list_offered(service: Service) -> list[Offered]:
    """The base models of a service; empty where it does not say."""
    found = ask(service, "GET", "get_server_capabilities")
    models = found.get("supported_models") if isinstance(found, dict) else None
    return [_offered(each) for each in models or () if isinstance(each, dict) and each.get("model_name")]


def _offered(found: dict[str, Any]) -> Offered:
    most = found.get("max_context_length")
    flags = {name: found.get(name) is not False for name in ("trainable", "sampleable")}
    return Offered(str(found["model_name"]), most if isinstance(most, int) else None, **flags)


class Connection:
    """A session, opened when it is first needed."""

    def __init__(self, service: Service, watch: Watch | None = None) -> None:
        self.service, self.watch = service, watch
        self.queue = Queue(watch)
        self._client: Any = None

    @property
    def client(self) -> Any:
        """The SDK's own client of the service."""
        if self._client is None:
            check_service(self.service)
            tinker = import_extra("tinker", "tinker")
            logging.getLogger("tinker").setLevel(logging.ERROR)  # what it would say is told by events
            try:
                self._client = tinker.ServiceClient(base_url=self.service.url, api_key=self.service.key)
            except Exception as error:  # the edge to the SDK
                raise translate(error, "opening a session", self.service) from None
        return self._client

    def wait(self, future: Any, what: str) -> Any:
        """The result of a future."""
        return wait(future, what, self.service, self.queue, self.watch)

    def create_model(self, base: str, layout: Layout) -> Any:
        """A new adapter over a base model of the service."""
        what = f"creating an adapter over {base}"
        arguments = {"train_attn": layout.attn, "train_mlp": layout.mlp, "train_unembed": layout.unembed}
        try:
            future = self._submit(
                what, "create_lora_training_client", base, rank=layout.rank, seed=layout.seed, **arguments
            )
            return self._listening(self.wait(future, what))
        except ServerError as error:
            with suppress(Exception):  # what helps to read the refusal must not replace it
                offered = [each.name for each in list_offered(self.service) if each.trainable]
                if offered and base not in offered:
                    more = f" and {len(offered) - 8} more" if len(offered) > 8 else ""
                    error.hint = f"the service trains {', '.join(offered[:8])}{more}; engine.model names one of them"
            raise

    def create_from_state(self, path: str, *, optimizer: bool) -> Any:
        """A model that goes on from a saved state."""
        what = f"going on from {path}"
        ending = "_with_optimizer" if optimizer else ""
        return self._listening(self.wait(self._submit(what, f"create_training_client_from_state{ending}", path), what))

    def create_sampler(self, *, base: str | None = None, path: str | None = None) -> Any:
        """What answers for a base model, or for saved weights."""
        what = f"a sampler of {path or base}"
        named = {"model_path": path} if path else {"base_model": base}
        return self.wait(self._submit(what, "create_sampling_client", **named), what)

    def rest(self) -> Any:
        """The SDK's client of what needs no session."""
        tinker = import_extra("tinker", "tinker")
        return tinker.RestClient(base_url=self.service.url, api_key=self.service.key)

    def _submit(self, what: str, method: str, *positional: Any, **named: Any) -> Any:
        try:
            return getattr(self.client, method)(*positional, **named)
        except Exception as error:  # the edge to the SDK
            raise translate(error, what, self.service) from None

    def _listening(self, model: Any) -> Any:
        """The SDK tells nobody of the queue for a quarter of an hour; we want to hear at once."""
        if hasattr(model, "_queue_state_logger"):
            model._queue_state_logger = self.queue
        return model

    def close(self) -> None:
        """Finish the session, as errored where an error is on its way out."""
        client, self._client = self._client, None
        if client is None:
            return
        status: Literal["success", "errored"] = "success" if sys.exc_info()[0] is None else "errored"
        with suppress(Exception):  # the session ends by itself when its heartbeats do
            client.close(status).result(timeout=_CLOSE_SECONDS)
