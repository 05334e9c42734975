"""Where a model answers: which base model a host holds, and which adapter it answers through."""

from __future__ import annotations

from dataclasses import dataclass

from luthier.runs.resolve import AdapterRef, ResolvedModel
from luthier.weights.shards import read_tensor_file

_LOW_RANK = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class Place:
    """A base model by its name, the values of NF4 that it holds where its adapters stand on those, and an adapter."""

    model: str
    nf4: str = ""
    """`plain` or `double` where the base is held in the values of NF4."""
    adapter: str | None = None

    @property
    def base(self) -> Place:
        """The same for all adapters of one host."""
        return Place(self.model, self.nf4)


def find_place(resolved: ResolvedModel) -> Place:
    """An adapter shares its base with others; one that holds more than low-rank updates is a base of its own."""
    if not resolved.adapters:
        return Place(str(resolved.folder))
    last = resolved.adapters[-1]
    if not _is_low_rank(last):
        return Place(str(last.path))
    below = resolved.adapters[-2].path if len(resolved.adapters) > 1 else resolved.folder
    return Place(str(below), _nf4(last), str(last.path))


def _nf4(ref: AdapterRef) -> str:
    if not ref.quantised:
        return ""
    return "double" if ref.double_quant else "plain"


def _is_low_rank(ref: AdapterRef) -> bool:
    files = ref.path.glob("*.safetensors")
    return all(name.endswith(_LOW_RANK) for path in files for name in read_tensor_file(path).entries)
