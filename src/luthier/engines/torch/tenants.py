"""Many adapters in training over one frozen base: one pass for the batches of all, gradients and steps for each.

On a CPU an adapter's results are the same, bit for bit, whoever shares its batches: rows do not see each other
(shared.py), and what adds rows up is computed for each adapter by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from luthier.engines.torch.ends import Ends, put_low
from luthier.engines.torch.head import ROUNDED, Head
from luthier.engines.torch.keeping import Files
from luthier.engines.torch.loading import Loaded, run_base
from luthier.engines.torch.memory import memory_errors
from luthier.engines.torch.sampling import few_threads
from luthier.engines.torch.shared import Pass, SharedLayers, Stretch
from luthier.engines.torch.tenant import Tenant, pick_layers
from luthier.engines.verbs import (
    AdapterLayout,
    Computed,
    Floats,
    Loss,
    LossResult,
    Share,
    StepParams,
    StepTaken,
    join_batches,
)
from luthier.errors import CallError, UnsupportedError
from luthier.runs.resolve import ResolvedModel
from luthier.weights.tensors import is_of_experts

MOST_RANKS = 256
_MLP = re.compile(r"(?:^|[._])(?:mlp|feed_forward|ffn|moe|experts?|fc\d?)(?:[._]|$)")
_BUDGETS = {"cpu": 1024, "cuda": 16_384}
_PREFIX = "trained:"


class TorchTenants:
    """The adapters in training over one loaded model."""

    def __init__(self, loaded: Loaded, shared: SharedLayers, resolved: ResolvedModel) -> None:
        self._loaded, self._shared, self._resolved = loaded, shared, resolved
        self._tenants: dict[str, Tenant] = {}
        self._anchor = torch.zeros((), device=loaded.device, requires_grad=True)
        # Experts get the rows that are routed to them in products of any size, where neighbours would show.
        self._has_experts = any(is_of_experts(name) for name, _ in loaded.model.named_parameters())

    @property
    def vocabulary(self) -> int:
        """How many tokens the base knows."""
        return int(self._loaded.head.weight.shape[0])

    @property
    def budget(self) -> int:
        """How many tokens are well computed at once on this device."""
        return _BUDGETS.get(self._loaded.device.type, _BUDGETS["cpu"])

    # -- tenants -----------------------------------------------------------------------------------------------

    def open(self, tenant: str, layout: AdapterLayout) -> None:
        """A new adapter, as training begins."""
        if not 1 <= layout.rank <= MOST_RANKS:
            raise CallError(f"rank: is {layout.rank}; it must lie between 1 and {MOST_RANKS}", where="rank")
        if self._loaded.dtype == torch.float16:
            raise UnsupportedError(
                "this accelerator computes in fp16, in which small gradients are lost",
                hint="luthier serve --precision fp32",
            )
        names = pick_layers(self._shared.targets, layout, lambda name: bool(_MLP.search(name)), self._shared.head)
        if layout.train_unembed and not self._shared.head:
            raise UnsupportedError("train_unembed: this model's head is no linear layer", where="train_unembed")
        if not names:
            raise CallError("train_mlp, train_attn and train_unembed are all false: nothing is left to train")
        self._freeze()
        layers = {name: self._shared.find(name) for name in names}
        sizes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
        with memory_errors():
            made = Tenant(layout, sizes, next(self._loaded.model.parameters()))
        self.drop(tenant)
        self._tenants[tenant] = made
        for name, low in made.lows.items():
            layers[name].updates[_PREFIX + tenant] = low

    def _freeze(self) -> None:
        """Every layer that anyone may train computes alike from the first one on."""
        self._loaded.model.requires_grad_(False)
        for name in self._shared.targets:
            self._shared.find(name)

    def drop(self, tenant: str) -> None:
        """Forget an adapter."""
        if self._tenants.pop(tenant, None):
            self._shared.forget(_PREFIX + tenant)

    def keep(self, tenant: str) -> None:
        """Add the fresh gradients to those that the next step takes."""
        self._tenants[tenant].keep()

    def discard(self, tenant: str) -> None:
        """Forget the fresh gradients."""
        self._tenants[tenant].discard()

    def optim_step(self, tenant: str, params: StepParams) -> StepTaken:
        """Step by the gradients that were kept, or refuse; forgets them."""
        self._tenants[tenant].check()
        with memory_errors():
            return self._tenants[tenant].step(params)

    def save(self, tenant: str, what: str) -> Files:
        """The adapter as it is published (`adapter`), or all that training needs to go on (`state`)."""
        found = self._tenants[tenant]
        found.check()
        return found.take_state() if what == "state" else found.take_adapter(self._resolved)

    def load(self, tenant: str, folder: Path, *, optimizer: bool) -> None:
        """Go on from what was saved; without the optimizer its state begins anew."""
        with memory_errors():
            self._tenants[tenant].load(folder, optimizer=optimizer)

    def find(self, tenant: str) -> Tenant:
        """An adapter that is open."""
        return self._tenants[tenant]

    # -- passes ------------------------------------------------------------------------------------------------

    def compute(self, shares: Sequence[Share]) -> list[Computed]:
        """One pass for all of them; gradients add up beside those that are kept, until `keep` or `discard`."""
        for share in shares:
            self._tenants[share.tenant].check()
            if share.loss is not None:
                self._tenants[share.tenant].gather()
        found: dict[int, Computed] = {}
        # The rows of one adapter lie together.
        order = sorted(range(len(shares)), key=lambda place: shares[place].tenant)
        with memory_errors(), few_threads(self._loaded.model):
            for trains in (True, False):
                places = [place for place in order if (shares[place].loss is not None) is trains]
                chosen = [shares[place] for place in places]
                found |= dict(zip(places, self._computed(chosen, trains=trains), strict=True))
        return [found[place] for place in range(len(shares))]

    def _computed(self, shares: list[Share], *, trains: bool) -> list[Computed]:
        if not shares:
            return []
        if self._is_joinable(shares):
            done = self._together(shares, trains=trains)
            # On a GPU all rows share a product, in which what is not a number spreads.
            if len(shares) == 1 or self._loaded.device.type != "cuda" or self._are_sound(shares, done):
                return done
            for tenant in {share.tenant for share in shares}:
                self._tenants[tenant].discard()
                self._tenants[tenant].gather()
        return [self._alone(share, trains=trains) for share in shares]

    def _is_joinable(self, shares: list[Share]) -> bool:
        batch = join_batches([share.batch for share in shares])
        return self._loaded.can_pack(batch) and (len(shares) == 1 or not self._has_experts)

    def _are_sound(self, shares: list[Share], done: list[Computed]) -> bool:
        tenants = {share.tenant for share in shares}
        is_finite = all(bool(np.isfinite(each.logprobs).all()) for each in done)
        return is_finite and all(self._tenants[tenant].is_sound() for tenant in tenants)

    def _alone(self, share: Share, *, trains: bool) -> Computed:
        """One adapter's part; sequence by sequence for models in which packed ones would leak."""
        if self._loaded.can_pack(share.batch):
            return self._together([share], trains=trains)[0]
        parts = share.batch.alone()
        rated = [self._together([Share(share.tenant, part)], trains=False)[0] for part in parts]
        found = np.concatenate([each.logprobs for each in rated])
        if share.loss is None:
            return Computed(found)
        result = share.loss.compute(found)
        for part, (start, stop) in zip(parts, pairwise(share.batch.offsets.tolist()), strict=True):
            weights = -result.slope[start:stop]
            self._together([Share(share.tenant, part, Loss(_known(weights), share.loss.scale, weights))], trains=trains)
        return Computed(found, result.value, result.metrics)

    def _together(self, shares: list[Share], *, trains: bool) -> list[Computed]:
        joined = join_batches([share.batch for share in shares])
        rounded = joined.rounded(ROUNDED) if self._loaded.is_packed else joined
        with self._passing(shares, len(rounded.tokens), trains=trains), torch.set_grad_enabled(trains):
            hidden = run_base(self._loaded, rounded)[self._tensor(joined.sources)]
            ends = Ends(hidden.detach(), shares, self._head_of)
            by_hidden = ends.pull() if trains else None
            if by_hidden is not None and hidden.requires_grad:
                torch.autograd.backward([hidden], [by_hidden])
        return ends.results()

    @contextmanager
    def _passing(self, shares: list[Share], count: int, *, trains: bool) -> Iterator[None]:
        ends = np.cumsum([0, *(len(share.batch.tokens) for share in shares)]).tolist()
        # One for each share, so that what adds rows up does not depend on how an adapter's shares are spread.
        stretches = [
            Stretch(_PREFIX + share.tenant, start, stop)
            for share, (start, stop) in zip(shares, pairwise(ends), strict=True)
        ]
        below = any(self._tenants[share.tenant].adapts_below(self._shared.head) for share in shares)
        self._shared.now = Pass(stretches, count, trains=True, anchor=self._anchor if trains and below else None)
        try:
            yield
        finally:
            self._shared.now = Pass()

    def _head_of(self, tenant: str) -> Head:
        """The head of the base, or a new one over it for an adapter that has its own."""
        low = self._tenants[tenant].lows.get(self._shared.head)
        return self._loaded.head if low is None else put_low(self._loaded.head, low)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._loaded.device)


def _known(weights: Floats) -> Callable[[Floats], LossResult]:
    return lambda logprobs: LossResult(float(-(weights * logprobs).sum()), -weights)
