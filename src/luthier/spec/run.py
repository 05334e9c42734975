"""RunSpec: the whole of what a person asks for, and the checks that span its parts."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from luthier.spec.about import About
from luthier.spec.compute import Compute
from luthier.spec.data import Data
from luthier.spec.engine import Engine
from luthier.spec.evaluate import Evaluate
from luthier.spec.method import AutoMethod, Method, QloraMethod
from luthier.spec.model import Model
from luthier.spec.objective import DpoObjective, Objective, SftObjective
from luthier.spec.optim import Optim
from luthier.spec.output import Output
from luthier.spec.parallelism import find_parallel_contradictions
from luthier.spec.part import Part
from luthier.spec.tinker import find_beyond_tinker

IN_ONE_PROCESS = ("mlx", "tinker")
"""Engines that do not share a step over processes."""


class RunSpec(Part):
    """One fine-tuning run, from raw rows to a verified model."""

    seed: int = Field(0, ge=0)
    """Decides the split, the order of the rows, the adapter's start and dropout."""
    about: About = About()
    """What a shipped recipe promises."""
    model: Model
    """The base model."""
    data: Data = Data()
    """The rows and the tokens trained."""
    method: Method = AutoMethod()
    """Which weights move: `auto`, `full`, `lora` or `qlora`."""
    objective: Objective = SftObjective()
    """What the loss rewards: `sft`, `pretrain`, `dpo`, `simpo` or `orpo`."""
    optim: Optim = Optim()
    """How far and how fast."""
    evaluate: Evaluate = Evaluate()
    """Measuring while training."""
    output: Output = Output()
    """Where results go."""
    engine: Engine = Engine()
    """The thing that trains."""
    compute: Compute = Compute()
    """How the machine is used."""

    @model_validator(mode="before")
    @classmethod
    def _fill_kinds(cls, tables: Any) -> Any:
        """A tagged table without its `kind` means the default one."""
        if not isinstance(tables, dict):
            return tables
        filled = dict(tables)
        for name, kind in (("method", "auto"), ("objective", "sft")):
            if isinstance(filled.get(name), dict):
                filled[name] = {"kind": kind, **filled[name]}
        return filled


def find_contradictions(spec: RunSpec) -> list[tuple[str, str]]:
    """Return (key path, message) for each pair of settings that cannot both hold."""
    found = []
    if spec.optim.warmup_ratio is not None and spec.optim.warmup_steps is not None:
        found.append(("optim.warmup_steps", "given beside `optim.warmup_ratio`; keep one of them"))
    if spec.optim.micro_batch is not None and spec.compute.micro_batch_tokens is not None:
        found.append(("compute.micro_batch_tokens", "given beside `optim.micro_batch`; keep one of them"))
    if spec.evaluate.keep == "best" and spec.evaluate.every_steps == 0:
        found.append(("evaluate.keep", '"best" needs evaluations to choose from; set `evaluate.every_steps`'))
    if spec.evaluate.early_stop_patience is not None and spec.evaluate.every_steps == 0:
        found.append(("evaluate.early_stop_patience", "needs evaluations; set `evaluate.every_steps`"))
    if spec.data.valid == 0 and spec.evaluate.every_steps > 0:
        found.append(("evaluate.every_steps", "nothing is held out to evaluate on; set `data.valid`"))
    if spec.objective.kind == "pretrain" and spec.data.unroll:
        found.append(("data.unroll", 'has no meaning for objective "pretrain", which has no turns'))
    if spec.objective.kind != "pretrain" and spec.data.too_long == "split":
        found.append(("data.too_long", '"split" cuts plain text into pieces, which only objective "pretrain" trains'))
    is_pairs = spec.objective.kind in ("dpo", "simpo", "orpo")
    if is_pairs and (spec.data.unroll or spec.data.train_on == "all"):
        key = "unroll" if spec.data.unroll else "train_on"
        found.append(
            (f"data.{key}", f'has no meaning for objective "{spec.objective.kind}", which compares two answers')
        )
    if spec.data.unroll and spec.data.train_on == "all":
        found.append(("data.unroll", 'trains one turn at a time, and `data.train_on` is "all"'))
    return found + find_parallel_contradictions(spec) + _beyond_engine(spec)


def _beyond_engine(spec: RunSpec) -> list[tuple[str, str]]:
    """What the chosen engine cannot honour; an error and never ignored."""
    kind = spec.engine.kind
    found = []
    if kind != "tinker" and spec.engine.model is not None:
        found.append(("engine.model", f"names a model of a Tinker service, and the engine is `{kind}`"))
    if kind in IN_ONE_PROCESS and spec.compute.processes > 1:
        found.append(("compute.processes", f"engine `{kind}` runs in one process"))
    if kind != "mlx" and isinstance(spec.method, QloraMethod) and spec.method.bits != 4:
        found.append(("method.bits", f"engine `{kind}` holds a base in 4-bit NF4; 8 bits are of engine `mlx`"))
    beyond = {"trl": _beyond_trl, "mlx": _beyond_mlx, "tinker": find_beyond_tinker}.get(kind)
    return found + (beyond(spec) if beyond else [])


def _beyond_mlx(spec: RunSpec) -> list[tuple[str, str]]:
    """What the `mlx` engine does not have."""
    found = []
    if spec.optim.kind not in ("adamw", "adam"):
        found.append(("optim.kind", f'engine `mlx` has "adamw" and "adam", found "{spec.optim.kind}"'))
    if spec.compute.precision == "fp16" or spec.compute.parallelism.fp16:
        key = "precision" if spec.compute.precision == "fp16" else "parallelism.fp16"
        found.append((f"compute.{key}", "engine `mlx` does not scale the loss, as fp16 would need"))
    return found


def _beyond_trl(spec: RunSpec) -> list[tuple[str, str]]:
    """What TRL's own trainers do not do, or do otherwise."""
    objective, found = spec.objective, []
    if objective.kind in ("simpo", "orpo"):
        why = f'TRL has "{objective.kind}" among its experiments only; engine `torch` trains it'
        found.append(("objective.kind", f"is beyond engine `trl`: {why}"))
    if isinstance(objective, DpoObjective) and objective.label_smoothing > 0:
        found.append(("objective.label_smoothing", "is beyond engine `trl`: TRL's losses have it no longer"))
    if "fp16" in (spec.compute.precision, "fp16" if spec.compute.parallelism.fp16 else ""):
        key = "precision" if spec.compute.precision == "fp16" else "parallelism.fp16"
        found.append((f"compute.{key}", "fp16 is beyond engine `trl`, which trains in bf16 or fp32"))
    return found
