"""RunPlan: the run spec with nothing left to decide, and what was reckoned from it before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from luthier.spec.load import PATH_KEYS, absolute_path, dump_spec, is_local_path
from luthier.spec.run import RunSpec

_UNHASHED = ("about", "output")


@dataclass(frozen=True)
class Decision:
    """What was chosen for the person, and why in one short clause."""

    key: str
    value: object
    reason: str


@dataclass(frozen=True)
class Memory:
    """What a run needs, item by item in bytes, against what the device has."""

    items: dict[str, int]
    available_bytes: int
    device: str
    correction: float = 1.0
    """What earlier runs of this kind took, divided by what was predicted for them."""

    @property
    def total_bytes(self) -> int:
        """The sum of the items, times the correction."""
        return round(sum(self.items.values()) * self.correction)

    @property
    def fits(self) -> bool:
        """Whether the device has as much."""
        return self.total_bytes <= self.available_bytes

    def as_dict(self) -> dict[str, object]:
        """The items and what follows from them, for JSON."""
        return {
            "items": self.items,
            "correction": self.correction,
            "total_bytes": self.total_bytes,
            "available_bytes": self.available_bytes,
            "device": self.device,
            "fits": self.fits,
        }


@dataclass(frozen=True)
class RunPlan:
    """A run to its last detail: the resolved spec, its size, and its cost."""

    spec: RunSpec
    decisions: tuple[Decision, ...]
    steps: int
    train_examples: int
    stream_end: int | None
    """Position at which the stream of examples ends; None when `optim.steps` decides."""
    tokens_per_epoch: int
    trained_tokens_per_epoch: int
    total_parameters: int
    trainable_parameters: int
    memory: Memory
    seconds: float | None
    device: str
    keeps_dequantised: bool = False
    """Whether a 4-bit base is held dequantised, because memory allows it; the numbers are the same."""
    memory_key: str = ""
    """The name under which what the run really takes is remembered."""
    speed_key: str = ""
    """The name under which the tokens per second of the run are remembered."""

    def hash(self) -> str:
        """SHA-256 of everything in the spec that decides the result."""
        return hashlib.sha256(orjson.dumps(self._deciding(), option=orjson.OPT_SORT_KEYS)).hexdigest()

    def settings(self) -> dict[str, object]:
        """The same by dotted keys."""
        found: dict[str, object] = {}
        for name, value in self._deciding().items():
            found |= (
                {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
            )
        return found

    def _deciding(self) -> dict[str, Any]:
        return {name: table for name, table in dump_spec(self.spec).items() if name not in _UNHASHED}

    def as_dict(self) -> dict[str, Any]:
        """The plan as `luthier plan --json` and the events show it."""
        processes, batch = self.spec.compute.processes, self.spec.optim.batch
        return {
            "spec": dump_spec(self.spec),
            "hash": self.hash(),
            "decisions": [{"key": each.key, "value": each.value, "reason": each.reason} for each in self.decisions],
            "steps": self.steps,
            "train_examples": self.train_examples,
            "stream_end": self.stream_end,
            "tokens_per_epoch": self.tokens_per_epoch,
            "trained_tokens_per_epoch": self.trained_tokens_per_epoch,
            "total_parameters": self.total_parameters,
            "trainable_parameters": self.trainable_parameters,
            "memory": self.memory.as_dict(),
            "seconds": self.seconds,
            "device": self.device,
            "keeps_dequantised": self.keeps_dequantised,
            "processes": processes,
            "batch_per_process": batch / processes,
        }


def absolute_paths(spec: RunSpec, base_dir: Path) -> RunSpec:
    """The spec with its paths made absolute from `base_dir`, so that it means the same from any folder."""
    tables: dict[str, dict[str, object]] = {}
    for dotted in PATH_KEYS:
        table, key = dotted.split(".")
        value = getattr(getattr(spec, table), key)
        is_shipped = dotted == "model.base" and value == "practice"  # wins over a folder of that name
        if isinstance(value, str) and not is_shipped and is_local_path(dotted, value, base_dir):
            tables.setdefault(table, {})[key] = absolute_path(value, base_dir)
    return spec.model_copy(update={name: getattr(spec, name).model_copy(update=keys) for name, keys in tables.items()})


def render_plan_yaml(plan: RunPlan) -> str:
    """The resolved spec as `finetune_config.yaml`, its decisions above it; `load_spec` reads an equal spec from it."""
    import yaml

    class PlainDumper(yaml.SafeDumper):
        """YAML that `load_spec` reads back: text such as `2e-4` is quoted, because it would be a number there."""

        def ignore_aliases(self, data: object) -> bool:
            return True

    PlainDumper.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    head = ["# The plan of this run. Run it again: luthier train finetune_config.yaml"]
    head += [f"# {each.key} = {json.dumps(each.value)}: {each.reason}" for each in plan.decisions]
    body = yaml.dump(dump_spec(plan.spec), Dumper=PlainDumper, sort_keys=False, width=1000)
    return "\n".join(head) + "\n\n" + body
