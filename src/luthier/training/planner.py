"""Build the RunPlan: decide what the person left open, and reckon what the run takes before anything is loaded."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from luthier.data.order import count_steps
from luthier.data.prepared import Prepared
from luthier.errors import PlanError, SpecError, UnsupportedError
from luthier.machine import Machine, find_machine
from luthier.spec.method import AdapterKeys, AutoMethod, FullMethod, LoraMethod, QloraMethod
from luthier.spec.optim import DEFAULT_RATES, PAIRS_RATE_SHARE
from luthier.spec.plan import Decision, Memory, RunPlan, absolute_paths
from luthier.spec.run import RunSpec
from luthier.training.memory import (
    Layout,
    Trainable,
    Work,
    estimate_memory,
    estimate_seconds,
    read_correction,
    read_speed,
)
from luthier.training.parallel import settle_parallelism
from luthier.weights.groups import list_left_out
from luthier.weights.sketch import read_or_sketch
from luthier.weights.tensors import (
    ModelShape,
    build_model_shape,
    fetch_shapes,
    has_weights,
    is_in_last_layers,
    match_modules,
    read_config,
    read_model_shape,
)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PAIRS = ("dpo", "simpo", "orpo")
_WARMUP_RATIO = 0.03
_MOST_TOKENS = {"cpu": 4096, "cuda": 16384, "metal": 8192, "service": 65536}
# A choice of ours leaves this share of the memory alone; what the person fixed may take all of it.
_USED_SHARE = 0.9
_COMFORTABLE_SHARE = 0.5
GIB = 1 << 30


def plan_run(spec: RunSpec, prepared: Prepared, model_folder: Path, home: Path) -> RunPlan:
    """The plan of a run on this machine, with what earlier runs taught."""
    machine = find_machine(engine=spec.engine.kind)
    return build_plan(spec, prepared, _read_model(spec, model_folder), machine, home)


def _read_model(spec: RunSpec, folder: Path) -> ModelShape:
    base = spec.model.base
    if spec.engine.kind == "tinker":
        return read_or_sketch(folder, base)
    if has_weights(folder) or not _HUB_ID.fullmatch(base) or Path(base).is_dir():
        return read_model_shape(folder)
    # The hub's own cache names the folder by the commit, which is what will be trained.
    revision = folder.name if _COMMIT.fullmatch(folder.name) else spec.model.revision
    return build_model_shape(fetch_shapes(base, revision), read_config(folder), name=base)


def build_plan(
    spec: RunSpec, prepared: Prepared, model: ModelShape, machine: Machine, home: Path | None = None
) -> RunPlan:
    """The spec with nothing left to decide; PlanError when the run cannot fit the machine."""
    draft = _Draft(absolute_paths(spec, Path.cwd()), [], model, machine, home)
    _check_quantised(draft)
    _check_devices(draft)
    if draft.spec.engine.kind == "tinker":
        return _plan_elsewhere(draft, prepared)
    compute, noted = settle_parallelism(draft.spec, machine)
    draft.spec = draft.spec.model_copy(update={"compute": compute})
    draft.decisions += noted
    sizes = _measure(draft.spec, prepared)
    _decide_precision(draft)
    _decide_method(draft, sizes)
    steps, stream_end = _decide_schedule(draft, sizes)
    layout, memory = _decide_layout(draft, sizes)
    if draft.spec.engine.kind == "trl":
        reason = "memory and time are reckoned as for `torch`, until a run tells; it pads, and computes prompts twice"
        draft.decisions.append(Decision("engine.kind", "trl", reason))
    trainable = count_trainable(draft.spec.method, model)
    return RunPlan(
        spec=draft.spec,
        decisions=tuple(draft.decisions),
        steps=steps,
        train_examples=sizes.examples,
        stream_end=stream_end,
        tokens_per_epoch=sizes.tokens,
        trained_tokens_per_epoch=sizes.trained_tokens,
        total_parameters=model.total_parameters,
        trainable_parameters=trainable.total,
        memory=memory,
        seconds=_seconds(draft, sizes, layout, steps),
        device=machine.device,
        keeps_dequantised=layout.keeps_dequantised,
        memory_key=draft.memory_key,
        speed_key=draft.speed_key,
    )


def _plan_elsewhere(draft: _Draft, prepared: Prepared) -> RunPlan:
    """The plan of a run on a service, which takes none of this machine's memory."""
    sizes = _measure(draft.spec, prepared)
    if draft.spec.compute.precision == "auto":
        reason = "what services compute in; the certificate allows for it"
        draft.decide("compute.precision", "bf16", reason)
    _decide_method(draft, sizes)
    method, model = draft.spec.method, draft.model
    assert isinstance(method, LoraMethod)
    if method.dropout > 0:
        draft.decide("method.dropout", 0.0, "a Tinker service has no dropout")
    _check_groups(method, model)
    steps, stream_end = _decide_schedule(draft, sizes)
    if draft.spec.compute.micro_batch_tokens is None and draft.spec.optim.micro_batch is None:
        budget = max(_MOST_TOKENS["service"], sizes.longest)
        draft.decide("compute.micro_batch_tokens", budget, "as many as one request carries well")
    evaluate, optim = draft.spec.evaluate, draft.spec.optim
    key = f"service|{draft.spec.engine.model or draft.spec.model.base}|{draft.spec.objective.kind}"
    speed = None if draft.home is None else read_speed(draft.home, key)
    examples = steps * optim.batch if optim.steps > 0 else sizes.examples * optim.epochs
    looked = sizes.valid_tokens * ((steps // evaluate.every_steps if evaluate.every_steps else 0) + 1)
    tokens = sizes.tokens * examples / max(1, sizes.examples) + looked / 2
    return RunPlan(
        spec=draft.spec,
        decisions=tuple(draft.decisions),
        steps=steps,
        train_examples=sizes.examples,
        stream_end=stream_end,
        tokens_per_epoch=sizes.tokens,
        trained_tokens_per_epoch=sizes.trained_tokens,
        total_parameters=model.total_parameters,
        trainable_parameters=count_trainable(draft.spec.method, model).total if model.linears else 0,
        memory=Memory({}, 0, "a Tinker service"),
        seconds=tokens / speed if speed else None,
        device="service",
        speed_key=key,
    )


def _check_groups(method: LoraMethod, model: ModelShape) -> None:
    """A service adapts whole groups of layers, so targets that are a part of one are refused."""
    if isinstance(method.targets, str):
        return
    if left := list_left_out(method.targets, [*model.linears, *_head(model)]):
        raise UnsupportedError(
            f"method.targets leaves out {', '.join(left)}: a Tinker service adapts all layers of a group, or none; the "
            "groups are attention, the feed-forward part and the head",
            hint='set method.targets = "auto", or name every layer of the groups that are meant',
        )


@dataclass
class _Draft:
    """A plan in the making."""

    spec: RunSpec
    decisions: list[Decision]
    model: ModelShape
    machine: Machine
    home: Path | None

    def decide(self, key: str, value: object, reason: str) -> None:
        """Set a key of the spec that the person left open."""
        self.set(key, value)
        self.decisions.append(Decision(key, value, reason))

    def set(self, key: str, value: object) -> None:
        """Set a key without a word about it."""
        table, _, name = key.partition(".")
        part = getattr(self.spec, table).model_copy(update={name: value})
        self.spec = self.spec.model_copy(update={table: part})

    def key_for(self, method: str) -> str:
        """The name of this kind of run with that method."""
        return f"{self.model.key}|{self.spec.engine.kind}|{self.machine.device}|{method}"

    @property
    def memory_key(self) -> str:
        return self.key_for(self.spec.method.kind)

    @property
    def speed_key(self) -> str:
        spec = self.spec
        return f"{self.memory_key}|{spec.objective.kind}|{spec.compute.precision}|{self.machine.key}"


@dataclass(frozen=True)
class _Sizes:
    """The prepared data, as far as memory and time depend on it."""

    examples: int
    tokens: int
    trained_tokens: int
    valid_tokens: int
    longest: int
    """Tokens of the longest example, held out or not."""
    largest: npt.NDArray[np.int64]
    """Tokens of the 1, 2, 3, ... longest examples together, as many as one process has in a step."""

    def at_once(self, budget: int) -> int:
        """Tokens computed at once under a budget: no more than a step has, and an example is never parted."""
        return min(max(budget, self.longest), max(self.longest, int(self.largest[-1])))

    def of_examples(self, count: int) -> int:
        """Tokens of so many examples, at most."""
        return max(self.longest, int(self.largest[min(count, len(self.largest)) - 1]))


def _measure(spec: RunSpec, prepared: Prepared) -> _Sizes:
    lengths = prepared.example_lengths
    train, valid = lengths[prepared.train.astype(np.int64)], lengths[prepared.valid.astype(np.int64)]
    per_process = math.ceil(spec.optim.batch / spec.compute.processes)
    longest = np.sort(train)[::-1][:per_process]
    return _Sizes(
        examples=len(train),
        tokens=int(train.sum()),
        trained_tokens=int(prepared.summary["trained_tokens"]["train"]),
        valid_tokens=int(valid.sum()),
        longest=int(max(longest.max(initial=1), valid.max(initial=1))),
        largest=np.cumsum(longest) if len(longest) else np.ones(1, np.int64),
    )


def _check_quantised(draft: _Draft) -> None:
    """A base that mlx_lm has quantised already is trained as it is, by the engine that reads it."""
    bits, spec = draft.model.mlx_bits, draft.spec
    if bits is None:
        return
    name = f"{spec.model.base}: its weights are quantised by mlx_lm to {bits} bits"
    if spec.engine.kind != "mlx":
        raise UnsupportedError(
            f"{name}, which engine `{spec.engine.kind}` does not read",
            hint='name the original model, or set engine.kind = "mlx"',
        )
    if isinstance(spec.method, FullMethod | LoraMethod):
        raise SpecError(
            f'{name}, and method.kind = "{spec.method.kind}" wants the full ones', hint='set method.kind = "qlora"'
        )
    keys = spec.method.model_dump(exclude={"kind", "bits", "double_quant"})
    method = QloraMethod(kind="qlora", bits=8 if bits == 8 else 4, **keys)
    if method.bits != bits:
        raise UnsupportedError(f"{name}; 4 and 8 are known here", hint="convert it again: mlx_lm.convert --q-bits 4")
    draft.spec = spec.model_copy(update={"method": method})
    if not isinstance(spec.method, QloraMethod) or spec.method.bits != bits:
        draft.decisions.append(Decision("method.bits", bits, "as the base is quantised"))


def _check_devices(draft: _Draft) -> None:
    asked, machine = draft.spec.compute.processes, draft.machine
    compute = draft.spec.compute
    for key, wanted in (("gpu_type", compute.gpu_type), ("gpu_count", compute.gpu_count), ("nodes", compute.nodes)):
        if wanted is not None:
            draft.decide(f"compute.{key}", wanted, f"is asked of a server; this run is on {machine.device_name}")
    if machine.device == "cuda" and asked > machine.device_count:
        raise PlanError(
            f"compute.processes is {asked}, and this machine has {machine.device_count} x {machine.device_name}",
            hint=f"set compute.processes = {machine.device_count}: each process needs a device of its own",
        )
    if machine.device == "cuda" and asked > 1 and draft.spec.engine.kind == "trl":
        raise UnsupportedError(
            f"compute.processes is {asked}: engine `trl` shares its steps over processes on a CPU only",
            hint='set compute.processes = 1, or engine.kind = "torch"',
        )
    if asked > draft.spec.optim.batch:
        raise SpecError(
            f"compute.processes is {asked}, and a step has {draft.spec.optim.batch} examples (optim.batch)",
            hint="give each process at least one example of a step",
        )


def _decide_precision(draft: _Draft) -> None:
    machine, asked = draft.machine, draft.spec.compute.precision
    if asked == "fp16" and machine.device == "cpu":
        raise UnsupportedError(
            "fp16 on a CPU: its products are slow there and overflow",
            hint='set compute.precision = "auto"',
        )
    if asked != "auto":
        return
    where = "processor" if machine.device == "cpu" else machine.device_name
    reasons = {"bf16": "computes in bf16", "fp32": "has no bf16", "fp16": "has no bf16; the loss is scaled"}
    parallelism = draft.spec.compute.parallelism
    refused = [name for name in ("bf16", "fp16") if getattr(parallelism, name) is False]
    if machine.precision in refused:
        draft.decide("compute.precision", "fp32", f"compute.parallelism.{machine.precision} is false")
    elif machine.precision == "fp16" and draft.spec.engine.kind == "trl":
        draft.decide("compute.precision", "fp32", f"the {where} has no bf16, and engine `trl` no fp16")
    else:
        draft.decide("compute.precision", machine.precision, f"the {where} {reasons[machine.precision]}")


def _decide_method(draft: _Draft, sizes: _Sizes) -> None:
    method = draft.spec.method
    if isinstance(method, AutoMethod):
        chosen, reason = _chosen_method(draft, method, sizes)
        draft.spec = draft.spec.model_copy(update={"method": chosen})
        draft.decisions.append(Decision("method.kind", chosen.kind, reason))
    method = draft.spec.method
    if isinstance(method, QloraMethod) and method.double_quant and draft.spec.engine.kind == "mlx":
        draft.decide("method.double_quant", False, "mlx_lm's quantiser keeps its scales in 16 bits")
        method = draft.spec.method
    if isinstance(method, AdapterKeys) and method.targets == "auto":
        targets = draft.model.targets
        if not targets and draft.spec.engine.kind == "tinker":
            return  # the service knows the layers of its own models
        if not targets:
            raise UnsupportedError(
                f"{draft.model.architecture}: no linear layers to adapt were found in its decoder layers",
                hint='name them in method.targets, or set method.kind = "full"',
            )
        besides = "the head and the experts" if draft.model.expert_names else "the head"
        draft.decide("method.targets", targets, f"every linear layer but {besides}")


def _chosen_method(
    draft: _Draft, method: AutoMethod, sizes: _Sizes
) -> tuple[FullMethod | LoraMethod | QloraMethod, str]:
    keys = method.model_dump(exclude={"kind"})
    if draft.spec.engine.kind == "tinker":
        return LoraMethod(kind="lora", **keys), "engine `tinker` trains LoRA only"
    adapter = QloraMethod(kind="qlora", **keys)
    if given := sorted(method.model_fields_set - {"kind"}):
        return adapter, f"keys of an adapter are set ({', '.join(given)}), and 4 bits take the least memory"
    full = FullMethod(kind="full")
    available = draft.machine.device_free_bytes
    fitting = [
        memory
        for layout, memory in _layouts(_with_method(draft, full), sizes)
        if not layout.recompute and memory.total_bytes <= _COMFORTABLE_SHARE * available
    ]
    free = f"{available / GIB:.1f} GiB free"
    if fitting:
        return full, f"it takes {fitting[0].total_bytes / GIB:.1f} GiB, less than half of the {free}"
    least = _smallest(_with_method(draft, full), sizes).total_bytes
    return adapter, f"training every weight takes at least {least / GIB:.1f} GiB, too much beside {free}"


def _with_method(draft: _Draft, method: FullMethod | LoraMethod | QloraMethod) -> _Draft:
    return replace(draft, spec=draft.spec.model_copy(update={"method": method}), decisions=[])


def _decide_schedule(draft: _Draft, sizes: _Sizes) -> tuple[int, int | None]:
    """Learning rate, warm-up and length; returns the steps and where the stream of examples ends."""
    optim, method, objective = draft.spec.optim, draft.spec.method.kind, draft.spec.objective.kind
    if optim.learning_rate is None:
        rate = DEFAULT_RATES[method]
        if objective in _PAIRS:
            draft.decide(
                "optim.learning_rate",
                rate * PAIRS_RATE_SHARE,
                f"a tenth of the default of {method}, as {objective} wants",
            )
        else:
            draft.decide("optim.learning_rate", rate, f"the default of {method}")
    steps = count_steps(sizes.examples, optim.batch, epochs=optim.epochs, steps=optim.steps)
    if optim.warmup_steps is None:
        ratio = _WARMUP_RATIO if optim.warmup_ratio is None else optim.warmup_ratio
        warmup = math.ceil(round(ratio * steps, 9))
        draft.set("optim.warmup_ratio", None)
        draft.decide("optim.warmup_steps", warmup, f"{ratio:g} of {steps:,} steps")
    stream_end = None if optim.steps > 0 else max(1, round(sizes.examples * optim.epochs))
    return steps, stream_end


def _decide_layout(draft: _Draft, sizes: _Sizes) -> tuple[Layout, Memory]:
    """The fastest way to compute that fits; PlanError when none does."""
    available = draft.machine.device_free_bytes
    fitting = (each for each in _layouts(draft, sizes) if each[1].total_bytes <= _USED_SHARE * available)
    layout, memory = next(fitting, (None, None))
    if layout is None or memory is None:
        layout, memory = min(_layouts(draft, sizes), key=lambda each: each[1].total_bytes)
    if not memory.fits:
        raise _does_not_fit(draft, sizes, memory)
    compute, optim = draft.spec.compute, draft.spec.optim
    if compute.recompute == "auto":
        reason = "activations would not fit otherwise" if layout.recompute else "activations fit"
        draft.decide("compute.recompute", "always" if layout.recompute else "never", reason)
    if compute.micro_batch_tokens is None and optim.micro_batch is None:
        budget = next(each for each in _budgets(draft, sizes) if sizes.at_once(each) == layout.tokens)
        if budget == sizes.longest:
            reason = "the longest example alone"
        else:
            reason = "the most that pays" if budget == _MOST_TOKENS[layout.device] else "the most that fits"
        draft.decide("compute.micro_batch_tokens", budget, reason)
    return layout, memory


def _budgets(draft: _Draft, sizes: _Sizes) -> Iterator[int]:
    """Tokens that may be computed at once, largest first, down to the longest example."""
    budget = _MOST_TOKENS[draft.machine.device]
    while budget > sizes.longest:
        yield budget
        budget //= 2
    yield sizes.longest


def _layouts(draft: _Draft, sizes: _Sizes) -> Iterator[tuple[Layout, Memory]]:
    """Every way to compute the run that the spec leaves open, fastest first, with what it takes."""
    compute, optim, method = draft.spec.compute, draft.spec.optim, draft.spec.method
    trainable = count_trainable(method, draft.model)
    assert method.kind != "auto"
    assert compute.precision != "auto"
    if optim.micro_batch is not None:
        tokens = [sizes.of_examples(optim.micro_batch)]
    elif compute.micro_batch_tokens is not None:
        tokens = [sizes.at_once(compute.micro_batch_tokens)]
    else:
        tokens = list(dict.fromkeys(sizes.at_once(budget) for budget in _budgets(draft, sizes)))
    is_mlx = draft.spec.engine.kind == "mlx"
    correction = 1.0 if draft.home is None else read_correction(draft.home, draft.key_for(method.kind))
    for recompute in {"auto": (False, True), "always": (True,), "never": (False,)}[compute.recompute]:
        for keeps in _ways_to_keep(draft):
            for count in tokens:
                layout = Layout(
                    method=method.kind,
                    precision=compute.precision,
                    optimizer=optim.kind,
                    device=draft.machine.device,
                    tokens=count,
                    recompute=recompute,
                    keeps_dequantised=keeps,
                    double_quant=method.double_quant if isinstance(method, QloraMethod) else True,
                    processes=compute.processes,
                    mlx_bits=method.bits if is_mlx and not keeps and isinstance(method, QloraMethod) else None,
                    engine=draft.spec.engine.kind,
                )
                items = estimate_memory(draft.model, trainable, layout)
                yield (
                    layout,
                    Memory(items, draft.machine.device_free_bytes, draft.machine.device_name, correction),
                )


def _ways_to_keep(draft: _Draft) -> tuple[bool, ...]:
    """Whether a quantised base may be held in full width; mlx_lm's is so on a CPU, and never on an accelerator."""
    if draft.spec.method.kind != "qlora":
        return (False,)
    by_engine = {"mlx": (draft.machine.device == "cpu",), "trl": (False,)}
    return by_engine.get(draft.spec.engine.kind, (True, False))


def _smallest(draft: _Draft, sizes: _Sizes) -> Memory:
    return min((memory for _, memory in _layouts(draft, sizes)), key=lambda each: each.total_bytes)


def _does_not_fit(draft: _Draft, sizes: _Sizes, memory: Memory) -> PlanError:
    parts = ", ".join(f"{name} {size * memory.correction / GIB:.1f}" for name, size in memory.items.items())
    processes = draft.spec.compute.processes
    shared = f" in {processes} processes" if processes > 1 and draft.machine.device == "cpu" else ""
    per_device = " on each device" if processes > 1 and draft.machine.device == "cuda" else ""
    return PlanError(
        f"{draft.spec.method.kind} training of {draft.spec.model.base} takes at least "
        f"{memory.total_bytes / GIB:.1f} GiB{shared}{per_device} ({parts}), "
        f"and {memory.available_bytes / GIB:.1f} GiB are free on {memory.device}",
        hint="; ".join(_ways_out(draft, sizes, memory)),
        details=memory.as_dict(),
    )


def _ways_out(draft: _Draft, sizes: _Sizes, memory: Memory) -> list[str]:
    """What would help, each with its number."""
    tried: list[tuple[str, _Draft]] = []
    spec, method = draft.spec, draft.spec.method

    def with_key(key: str, value: object) -> _Draft:
        other = replace(draft, decisions=[])
        other.set(key, value)
        return other

    if spec.compute.recompute == "never":
        tried.append(('compute.recompute = "auto"', with_key("compute.recompute", "auto")))
    for key in ("optim.micro_batch", "compute.micro_batch_tokens"):
        table, _, name = key.partition(".")
        if getattr(getattr(spec, table), name) is not None:
            tried.append((f"no {key}", with_key(key, None)))
    if spec.compute.processes > 1 and draft.machine.device == "cpu":
        tried.append(("compute.processes = 1", with_key("compute.processes", 1)))
    if method.kind != "qlora":
        keys: dict[str, Any] = method.model_dump(exclude={"kind"}) if isinstance(method, AdapterKeys) else {}
        keys.setdefault("targets", draft.model.targets)
        tried.append(('method.kind = "qlora"', _with_method(draft, QloraMethod(kind="qlora", **keys))))
    found = []
    for words, other in tried:
        needed = _smallest(other, sizes)
        if needed.total_bytes < memory.total_bytes:
            found.append(f"{words} takes {needed.total_bytes / GIB:.1f} GiB")
    if memory.items["activations"] > 0.3 * sum(memory.items.values()):
        found.append(f"a smaller data.max_length helps (the longest example has {sizes.longest:,} tokens)")
    return found or ["take a smaller base model, or a machine with more memory"]


def _seconds(draft: _Draft, sizes: _Sizes, layout: Layout, steps: int) -> float:
    """Seconds of the run: by the speed of earlier ones, else by its operations."""
    optim, evaluate = draft.spec.optim, draft.spec.evaluate
    examples = steps * optim.batch if optim.steps > 0 else sizes.examples * optim.epochs
    tokens = sizes.tokens * examples / max(1, sizes.examples)
    evaluations = (steps // evaluate.every_steps if evaluate.every_steps else 0) + 1
    forward = float(sizes.valid_tokens * evaluations)
    if draft.spec.objective.kind == "dpo":
        forward += sizes.tokens + sizes.valid_tokens  # the reference, once
    speed = None if draft.home is None else read_speed(draft.home, draft.speed_key)
    if speed is not None:
        return (tokens + forward / 2) / speed
    work = Work(tokens, forward, max(float(steps), (tokens + forward) / max(1, layout.tokens)))
    return estimate_seconds(draft.model, layout, work, draft.machine.cores)


def count_trainable(method: AdapterKeys | FullMethod, model: ModelShape) -> Trainable:
    """Weights that a method trains; an error for a target that is none."""
    if isinstance(method, FullMethod):
        return Trainable(0, model.total_parameters)
    names = model.targets if isinstance(method.targets, str) else method.targets
    linears = {**model.linears, **_head(model)}
    chosen: set[str] = set()
    for name, modules in match_modules(linears, names).items():
        if not modules:
            raise _no_target(name, model)
        chosen |= {module for module in modules if is_in_last_layers(module, method.last_layers, model.layers)}
    if not chosen:
        raise SpecError(f"method.last_layers = {method.last_layers} leaves none of method.targets to adapt")
    adapter = sum(method.rank * sum(linears[module]) for module in chosen)
    whole = 0
    for name, modules in match_modules(model.modules, method.also_train).items():
        if not modules:
            raise _not_there("method.also_train", name, model)
        whole += sum(model.modules[module] for module in modules)
    return Trainable(adapter, whole)


def _head(model: ModelShape) -> dict[str, tuple[int, int]]:
    """The head can be named as a target, though `auto` leaves it out."""
    return {"lm_head": (model.vocab_size, model.hidden_size)} if "lm_head" in model.modules else {}


def _no_target(name: str, model: ModelShape) -> Exception:
    if any(f".{name}." in f".{tensor}." for tensor in model.expert_names):
        return UnsupportedError(
            f"method.targets: `{name}` is a parameter of mixture-of-experts layers, not a linear layer",
            hint=f"targets of this model: {', '.join(model.targets)}",
        )
    if match_modules(model.modules, [name])[name]:
        return UnsupportedError(
            f"method.targets: `{name}` is not a linear layer",
            hint=f"name it in method.also_train to train it whole; targets of this model: {', '.join(model.targets)}",
        )
    return _not_there("method.targets", name, model)


def _not_there(key: str, name: str, model: ModelShape) -> SpecError:
    known = sorted({module.rpartition(".")[2] for module in model.modules})
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean `{close[0]}`?" if close else "known modules: " + ", ".join(known)
    return SpecError(f"{key}: no module `{name}` in this model", hint=hint)
