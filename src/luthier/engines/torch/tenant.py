"""One adapter in training: its weights as one vector in fp32, with the optimizer's state and gradients beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from luthier.engines.drawing import first_values
from luthier.engines.torch.keeping import Files, read_adapter_tensors
from luthier.engines.torch.shared import RANKS, Low
from luthier.engines.torch.steps import Masters, Stepper, put_moments, read_moments
from luthier.engines.verbs import AdapterLayout, StepParams, StepTaken
from luthier.errors import CheckpointError, NonFiniteError
from luthier.runs.resolve import ResolvedModel
from luthier.weights.peft import WEIGHTS, AdapterConfig, write_adapter

WEIGHTS_FILE = "weights.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
_STEPS = "steps"
_MOMENTS = ("exp_avg", "exp_avg_sq")
# Every matrix begins where a product may begin to read it.
_STRIDE = 32


@dataclass(frozen=True)
class Site:
    """One adapted layer, and where its matrices lie in the vector; ranks are rounded up, and the rest stays zero."""

    name: str
    width: int
    out: int
    down: int
    up: int
    ranks: int

    def views(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """A and B as they are computed with."""
        down = vector[self.down : self.down + self.ranks * self.width].view(self.ranks, self.width)
        return down, vector[self.up : self.up + self.out * self.ranks].view(self.out, self.ranks)


def lay_out_sites(layers: Mapping[str, tuple[int, int]], rank: int) -> tuple[list[Site], int]:
    """The sites of layers given as (in, out), and the length of the vector."""
    ranks, end, sites = _round_up(rank, RANKS), 0, []
    for name, (width, out) in layers.items():
        down = end
        up = down + _round_up(ranks * width, _STRIDE)
        end = up + _round_up(out * ranks, _STRIDE)
        sites.append(Site(name, width, out, down, up, ranks))
    return sites, end


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


class Tenant:
    """An adapter, its optimizer, the gradients that were kept, and the fresh ones of the request that runs."""

    def __init__(self, layout: AdapterLayout, layers: Mapping[str, tuple[int, int]], like: Tensor) -> None:
        self.layout = layout
        self.sites, self._length = lay_out_sites(layers, layout.rank)
        self.weights = nn.Parameter(torch.zeros(self._length, dtype=torch.float32, device=like.device))
        is_plain = like.dtype == torch.float32
        self.published = self.weights.detach() if is_plain else torch.zeros_like(self.weights, dtype=like.dtype)
        self.lows = {site.name: Low(*site.views(self.published), layout.scale) for site in self.sites}
        self._stepper = self._new_stepper()
        self._fresh: Tensor | None = None
        self.steps = 0
        self._is_finite = True
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        for site in self.sites:
            drawn = first_values(self.layout.seed, site.name, self.layout.rank, site.width)
            site.views(self.weights)[0][: self.layout.rank] = torch.from_numpy(drawn)
        self.publish()

    def publish(self) -> None:
        """Bring the weights that are computed with up to their masters."""
        if self.published.dtype != self.weights.dtype:
            self.published.copy_(self.weights.detach())

    # -- gradients ---------------------------------------------------------------------------------------------

    def gather(self) -> None:
        """Have a place for the gradients of the request that runs."""
        if self._fresh is None:
            self._fresh = torch.zeros_like(self.weights.detach())
            for site in self.sites:
                low = self.lows[site.name]
                low.slope_down, low.slope_up = site.views(self._fresh)

    def keep(self) -> None:
        """Add the fresh gradients to those of earlier requests."""
        if self._fresh is None:
            return
        if self.weights.grad is None:
            self.weights.grad = self._fresh
        else:
            self.weights.grad += self._fresh
        self.discard()

    def discard(self) -> None:
        """Forget the fresh gradients."""
        self._fresh = None
        for low in self.lows.values():
            low.slope_down = low.slope_up = None

    def is_sound(self) -> bool:
        """Whether the fresh gradients are finite."""
        return self._fresh is None or bool(torch.isfinite(self._fresh.sum()))

    def adapts_below(self, head: str) -> bool:
        """Whether it adapts more than the head."""
        return any(site.name != head for site in self.sites)

    def step(self, params: StepParams) -> StepTaken:
        """Step by what was kept, or refuse."""
        taken = self._stepper.step(params)
        if taken.taken:
            self.steps += 1
            self.publish()
            self._is_finite = bool(torch.isfinite(self.weights.detach().sum()))
        return taken

    def check(self) -> None:
        """Raise NonFiniteError where a step has led to weights that are no numbers; they would spoil nobody else's."""
        if not self._is_finite:
            raise NonFiniteError(
                "the adapter's weights are not finite any more: a step was too large",
                hint="load a checkpoint, and go on with a smaller learning rate",
            )

    # -- what is kept ------------------------------------------------------------------------------------------

    def _named(self, vector: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Both matrices of every site, without the ranks that only round up."""
        rank = self.layout.rank
        for site in self.sites:
            down, up = site.views(vector)
            yield f"{site.name}.lora_A", down[:rank]
            yield f"{site.name}.lora_B", up[:, :rank]

    def gradients(self) -> dict[str, Tensor]:
        """The gradients that were kept, by name."""
        return {} if self.weights.grad is None else dict(self._named(self.weights.grad))

    def named(self) -> dict[str, Tensor]:
        """The weights by name."""
        return dict(self._named(self.weights.detach()))

    def take_adapter(self, resolved: ResolvedModel) -> Files:
        """The adapter as it stands, to be written in PEFT's format."""
        found = _copies(self._named(self.weights.detach()))
        config = AdapterConfig(
            base=resolved.name,
            rank=self.layout.rank,
            alpha=self.layout.alpha,
            targets=tuple(site.name for site in self.sites),
            revision=resolved.revision,
        )
        arrays = {key: each.numpy() for key, each in found.items()}
        return Files({}, lambda folder: write_adapter(folder, config, arrays))

    def take_state(self) -> Files:
        """All that training needs to go on, gradients left out."""
        state: dict[str, Tensor] = {_STEPS: torch.tensor(self.steps)}
        for part, value in self._moments().items():
            kept = _copies(self._named(value)) if part in _MOMENTS else {"": value.cpu().clone()}
            state |= {f"{part}/{name}": tensor for name, tensor in kept.items()}
        return Files({WEIGHTS_FILE: _copies(self._named(self.weights.detach())), OPTIMIZER_FILE: state})

    def _moments(self) -> dict[str, Tensor]:
        found = read_moments(self._stepper.optimizer, {"": self.weights})
        return {key.partition("/")[0]: value for key, value in found.items()}

    @torch.no_grad()
    def load(self, folder: Path, *, optimizer: bool) -> None:
        """Go on from a state, or from the weights alone of a state or a published adapter."""
        is_adapter = (folder / WEIGHTS).is_file()
        found = read_adapter_tensors(folder) if is_adapter else load_file(str(folder / WEIGHTS_FILE))
        self._check_names(found, folder)
        state = load_file(str(folder / OPTIMIZER_FILE)) if optimizer and not is_adapter else {}
        moments = {part: self._vector(state, part, folder) for part in _MOMENTS if any(_of(state, part))}
        self._put(self.weights.detach(), found, folder)
        self._stepper = self._new_stepper()
        if moments:
            moments["step"] = state["step/"]
            put_moments(self._stepper.optimizer, {"": self.weights}, {f"{key}/": each for key, each in moments.items()})
        self.steps = int(state[_STEPS]) if state else 0
        self._is_finite = bool(torch.isfinite(self.weights.detach().sum()))
        self.weights.grad = None
        self.discard()
        self.publish()

    def _vector(self, state: Mapping[str, Tensor], part: str, folder: Path) -> Tensor:
        vector = torch.zeros_like(self.weights.detach())
        self._put(vector, dict(_of(state, part)), folder)
        return vector

    def _put(self, vector: Tensor, found: Mapping[str, Tensor], folder: Path) -> None:
        for name, view in self._named(vector):
            if name not in found or found[name].shape != view.shape:
                raise CheckpointError(f"{folder}: has no `{name}` of the shape {list(view.shape)}", where=str(folder))
            view.copy_(found[name])

    def _check_names(self, found: Mapping[str, Tensor], folder: Path) -> None:
        wanted = {name: view.shape for name, view in self._named(self.weights.detach())}
        for name in [*(set(found) ^ set(wanted))][:1]:
            raise CheckpointError(
                f"{folder}: adapts other layers than this model, such as `{name}`",
                hint="load it into a model with the same train_mlp, train_attn and train_unembed",
            )
        for name, shape in wanted.items():
            if found[name].shape != shape:
                raise CheckpointError(
                    f"{folder}: `{name}` is {list(found[name].shape)}, and this model's {list(shape)}",
                    hint="load it into a model of the same base and rank",
                )

    def _new_stepper(self) -> Stepper:
        return Stepper("adamw", Masters({"": self.weights}))


def _of(state: Mapping[str, Tensor], part: str) -> Iterator[tuple[str, Tensor]]:
    """What a state has of one part, by name."""
    return ((key.partition("/")[2], value) for key, value in state.items() if key.partition("/")[0] == part)


def _copies(named: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copies on the CPU, which later steps do not change."""
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in named}


def pick_layers(names: Sequence[str], layout: AdapterLayout, is_mlp: Callable[[str], bool], head: str) -> list[str]:
    """The layers that a layout adapts, in the order of the model."""
    chosen = [name for name in names if (layout.train_mlp if is_mlp(name) else layout.train_attn)]
    return [*chosen, head] if layout.train_unembed and head else chosen
