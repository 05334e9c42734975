"""The claims of a certificate, each worked out from what lies on disk; run in a process of its own by `fresh.py`."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from luthier.adapters.arithmetic import MOST_DIFFERING, Sums, check_sums, find_broken
from luthier.adapters.certificate import Certificate, Claim, hash_files
from luthier.adapters.start import open_start, read_precision
from luthier.data.prompts import read_prompts
from luthier.data.tokens import ModelText
from luthier.engines.registry import choose_kind, load_prober
from luthier.engines.verbs import Ints, Logits, Prober
from luthier.errors import CheckpointError, MissingPathError, ModelError, UnsupportedError
from luthier.machine import Machine, find_machine
from luthier.runs.events import utc_now
from luthier.runs.home import luthier_home
from luthier.runs.layout import FINAL_MODEL, MERGED_MODEL, PROBE
from luthier.runs.lineage import base_facts, is_same_base, list_versions, read_lineage
from luthier.runs.manifest import MANIFEST, read_manifest
from luthier.runs.resolve import AdapterRef, ResolvedModel, find_resolved, ref_of_run
from luthier.runs.run import Run
from luthier.training.probe import PLACES, Probe, read_probe, read_text_facts, render_chats
from luthier.weights.peft import read_adapter
from luthier.weights.tensors import read_model_shape

TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 6e-2}
"""How far two computations of one thing may part, as a share of the largest logit; on average a tenth of that."""
_CLEARLY = 3.0
_ANSWER_TOKENS = 12
_SHOWN = 3
_MOST_PROMPTS = 64
_PLAIN_PROMPT = np.arange(1, 17, dtype=np.int64)
"""For a model without a chat template."""


@dataclass(frozen=True)
class Order:
    """What is to be certified: a run, and perhaps a model merged from it, with `nf4` over the 4-bit values."""

    run: str
    merged: str | None = None
    nf4: bool = False
    is_sealed: bool = True
    """Whether the merged model has its manifest already."""
    prompts: str | None = None
    is_outside: bool = False
    """Whether `run` is the folder of an adapter that no run of ours trained."""


@dataclass
class _Claims:
    """Claims as they are made; `artefact` is whom they are about."""

    artefact: str
    made: list[Claim] = field(default_factory=list)

    def add(self, claim: str, found: str, allowed: str, holds: bool) -> bool:
        self.made.append(Claim(self.artefact, claim, found, allowed, bool(holds)))
        return bool(holds)

    @contextmanager
    def trying(self, claim: str, allowed: str) -> Iterator[None]:
        """A file that cannot be used is a claim that does not hold; what this machine lacks is an error as ever."""
        try:
            yield
        except (ModelError, CheckpointError, UnsupportedError, MissingPathError) as error:
            self.add(claim, error.message, allowed, False)


@dataclass(frozen=True)
class _Subject:
    """A run whose result is certified, and what it is held against."""

    run: Run
    final: Path
    base: ResolvedModel
    probe: Probe
    device: str

    @property
    def precision(self) -> str:
        """The one that the run computed in."""
        return self.run.spec.compute.precision

    @property
    def template(self) -> Path | None:
        """The chat template of the run, where it has its own."""
        given = self.run.spec.model.chat_template
        return Path(given) if given else None

    @property
    def ref(self) -> AdapterRef:
        """The run's adapter."""
        return ref_of_run(self.run, self.final)

    @property
    def is_quantised(self) -> bool:
        """Whether any adapter of the chain was trained over 4-bit values."""
        return any(ref.quantised for ref in (*self.base.adapters, self.ref))

    def load(self, resolved: ResolvedModel, over: AdapterRef | None = None) -> Prober:
        """A model read from disk, in the run's own precision."""
        kind = self.run.spec.engine.kind
        return load_prober(resolved, luthier_home(), precision=self.precision, device=self.device, over=over, kind=kind)


def gather_claims(order: Order) -> Certificate:
    """Everything that is claimed of the run's result; loads one model at a time."""
    if order.is_outside:
        return claim_adapter(Path(order.run))
    started = time.monotonic()
    run = Run(Path(order.run))
    final = run.final_weights
    assert final is not None
    claims = _Claims(final.name)
    subject = _check_surroundings(run, final, claims)
    files = hash_files(final, final.name)
    facts: dict[str, Any] = {"run": run.id, "made": utc_now().isoformat(timespec="seconds")}
    if subject is not None:
        prompts = _Prompts(subject, order)
        facts |= {"precision": subject.precision, "device": subject.device, "prompts": len(prompts.all)}
        facts["base"] = {"name": subject.base.name, "hash": run.lineage.get("base", {}).get("hash", "")}
        if final.name == FINAL_MODEL:
            _check_full(subject, prompts, claims)
        else:
            _check_adapter(subject, prompts, claims, order)
    artefact = final.name
    if order.merged is not None:
        artefact = MERGED_MODEL
        files |= hash_files(Path(order.merged), MERGED_MODEL)
        facts["nf4"] = order.nf4
    facts |= {"seconds": round(time.monotonic() - started, 2), "versions": list_versions()}
    return Certificate(artefact, tuple(claims.made), files, facts)


class _Prompts:
    """Token ids to ask about: those of the probe first, then fixed conversations, then the person's own."""

    def __init__(self, subject: _Subject, order: Order) -> None:
        own: tuple[Ints, ...] = ()
        if order.prompts:
            text = ModelText(subject.base.folder, chat_template=subject.template)
            asked = read_prompts(Path(order.prompts), drop_answers=True)[:_MOST_PROMPTS]
            own = render_chats(text, [each.messages for each in asked])
        self.all = [each for each in (*subject.probe.tokens, *subject.probe.text.chats, *own) if len(each)]
        self.live = len(subject.probe.tokens)


# -- what the result stands on ---------------------------------------------------------------------------------------


def _check_surroundings(run: Run, final: Path, claims: _Claims) -> _Subject | None:
    """The seal, the base and the probe; None where nothing can be computed without them."""
    _check_seal(final, claims)
    recorded = run.lineage["base"]
    base = find_resolved(run.spec.model.base, recorded.get("revision"), with_weights=True)
    probe, is_same = None, _check_base(recorded, base, claims)
    with claims.trying("the live model left its probe", PROBE):
        probe = read_probe(run.folder / PROBE)
    if probe is None or not is_same:
        return None
    return _Subject(run, final, base, probe, find_machine(engine=run.spec.engine.kind).device)


def _check_base(recorded: Mapping[str, Any], base: ResolvedModel, claims: _Claims) -> bool:
    now = base_facts(base)
    is_same, one, two = is_same_base(recorded, now), recorded["files"], now["files"]
    other = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    found = f"{len(one)} files" if is_same else f"changed: {_listed(other) or 'an adapter under the run'}"
    return claims.add("the base is the one that the run was trained on", found, "the same files", is_same)


def _check_seal(folder: Path, claims: _Claims) -> None:
    asked = "every byte is as it was sealed"
    with claims.trying(asked, "its manifest"):
        manifest = read_manifest(folder)
        claims.add(asked, f"{len(manifest.files)} files, {manifest.size_bytes:,} bytes", "its manifest", True)


def _check_text(subject: _Subject, folder: Path, template: Path | None, claims: _Claims) -> None:
    """Tokenizer, template and stop tokens against those of training."""
    asked = "tokenizer and template give the ids that they gave in training"
    with claims.trying(asked, "all, by the same files"):
        now, then = read_text_facts(folder, template), subject.probe.text
        pairs = zip(now.chats, then.chats, strict=True) if len(now.chats) == len(then.chats) else ()
        same = sum(np.array_equal(one, other) for one, other in pairs)
        found = f"{same} of {len(then.chats)} conversations" + ("" if now.hash == then.hash else ", by other files")
        held = bool(then.chats) and same == len(then.chats) and now.hash == then.hash
        claims.add(asked, found, "all, by the same files", held)
        found = f"{_ids(now.stops)}" + ("" if now.stops == then.stops else f", in training {_ids(then.stops)}")
        claims.add("the same tokens end an answer", found, _ids(then.stops), now.stops == then.stops)


def _ids(tokens: Sequence[int]) -> str:
    return ", ".join(map(str, tokens)) or "none"


# -- adapters --------------------------------------------------------------------------------------------------------


def _check_adapter(subject: _Subject, prompts: _Prompts, claims: _Claims, order: Order) -> None:
    """The adapter against the live model, then the merged model against base and adapter."""
    _check_tensors(subject.final, claims)
    _check_text(subject, subject.base.folder, subject.template, claims)
    pair: _Pair | None = None
    with claims.trying("base and adapter load", "without an error"):
        pair = _ask_pair(subject, prompts, claims, subject.base, over=subject.ref)
        _check_probe(subject, pair, claims)
    if order.merged is None or pair is None:
        return
    merged = _Claims(MERGED_MODEL, claims.made)
    if subject.is_quantised and not order.nf4:
        del pair.prober
        gc.collect()
        plain = replace(subject.base, adapters=tuple(replace(ref, quantised=False) for ref in subject.base.adapters))
        pair = _ask_pair(subject, prompts, None, plain, over=None)
    _check_merged(subject, prompts, merged, _Merged(Path(order.merged), order.nf4, order.is_sealed, pair))


@dataclass
class _Pair:
    """What the start of training says at the prompts, and what it says with the adapter over it."""

    before: list[Logits]
    after: list[Logits]
    prober: Prober


def _ask_pair(
    subject: _Subject, prompts: _Prompts, claims: _Claims | None, base: ResolvedModel, *, over: AdapterRef | None
) -> _Pair:
    prober = subject.load(base, over)
    before = prober.logits(prompts.all, PLACES)
    left = prober.adapt(subject.final)
    if claims:
        count = len(read_adapter(subject.final)[1])
        found = f"{count - len(left)} of {count}" + (f", left over: {_listed(left)}" if left else "")
        claims.add("every tensor of the adapter has its place in the model", found, "all, none left over", not left)
    return _Pair(before, prober.logits(prompts.all, PLACES), prober)


def _check_tensors(adapter: Path, claims: _Claims) -> None:
    with claims.trying("the adapter is whole", "every target, and finite"):
        config, tensors = read_adapter(adapter)
        adapted = {name.rpartition(".")[0] for name in tensors if name.endswith(".lora_A")}
        bare = [
            target
            for target in config.targets
            if not any(name == target or name.endswith(f".{target}") for name in adapted)
        ]
        found = f"{len(adapted)} layers" + (f", none for {_listed(bare)}" if bare else "")
        claims.add("every layer that the adapter names has its tensors", found, "none missing", not bare)
        broken = [name for name, values in tensors.items() if not np.isfinite(values).all()]
        _add_finite(claims, broken, len(tensors))


def _add_finite(claims: _Claims, broken: Sequence[str], count: int) -> None:
    found = f"not finite: {_listed(broken)}" if broken else f"all of {count:,} tensors"
    claims.add("every weight is a finite number", found, "all", not broken)


def _check_probe(subject: _Subject, pair: _Pair, claims: _Claims) -> None:
    """The artefact is the live model, and not the base, at the places of the probe."""
    live = list(subject.probe.logprobs)
    count = len(live)
    found = [_log_softmax(each) for each in pair.after[:count]]
    apart = _distance(found, live)
    allowed = _allowed(subject.precision, pair.after[:count])
    claims.add(
        "it says what the live model said (log-probabilities of every token)",
        str(apart),
        f"{allowed} ({subject.precision})",
        allowed.holds(apart),
    )
    _add_greedy(claims, "its likeliest tokens are the live model's", (live, found), allowed.largest)
    moved = _distance(found, [_log_softmax(each) for each in pair.before[:count]])
    _add_moved(claims, "it differs from what it was trained from by more than noise", moved, apart, "the live model")


def _add_moved(claims: _Claims, asked: str, moved: _Distance, noise: _Distance, other: str) -> None:
    """That something moved counts only where it is clearly more than what should be nothing."""
    limit = max(_CLEARLY * noise.mean, 1e-6)
    allowed = f"more than {limit:.2g} on average: {_CLEARLY:.0f} times the distance to {other}"
    claims.add(asked, str(moved), allowed, moved.mean > limit)


# -- whole models ----------------------------------------------------------------------------------------------------


def _check_full(subject: _Subject, prompts: _Prompts, claims: _Claims) -> None:
    """A model that was trained in full: the live model, and not the base."""
    final, base = subject.final, subject.base
    with claims.trying("every weight is a finite number", "all"):
        shape, before = read_model_shape(final), read_model_shape(base.folder)
        found = f"{shape.total_parameters:,} weights"
        allowed = f"as many as the base: {before.total_parameters:,}"
        asked = "every weight of the base is there, and none besides"
        claims.add(asked, found, allowed, shape.total_parameters == before.total_parameters)
        _add_finite(claims, find_broken(final), len(shape.modules))
    _check_text(subject, final, None, claims)
    with claims.trying("the model loads", "without an error"):
        prober = subject.load(base)
        first = prober.logits(prompts.all, PLACES)
        del prober
        gc.collect()
        prober = subject.load(ResolvedModel(final, name=final.name))
        _check_probe(subject, _Pair(first, prober.logits(prompts.all, PLACES), prober), claims)


@dataclass(frozen=True)
class _Merged:
    folder: Path
    nf4: bool
    is_sealed: bool
    pair: _Pair


def _check_merged(subject: _Subject, prompts: _Prompts, claims: _Claims, merged: _Merged) -> None:
    """The merged model against base and adapter, as sums and as answers."""
    if merged.is_sealed:
        _check_seal(merged.folder, claims)
    with claims.trying("every number is the base's plus scale * B @ A", "all, rounded once"):
        chain = replace(subject.base, adapters=(*subject.base.adapters, subject.ref))
        with open_start(chain, nf4=merged.nf4, precision=subject.precision, beside=merged.folder.parent) as start:
            _add_sums(claims, check_sums(merged.folder, start))
    _check_text(subject, merged.folder, None, claims)
    with claims.trying("the merged model loads", "without an error"):
        _check_answers(subject, prompts, claims, merged)


def _add_sums(claims: _Claims, sums: Sums) -> None:
    gone = [*sums.missing, *sums.misshapen, *sums.homeless]
    parts = [f"{sums.tensors:,} tensors"]
    parts += [f"missing or of another shape: {_listed(gone)}"] if gone else []
    parts += [f"left over: {_listed(sums.left_over)}"] if sums.left_over else []
    asked = "every tensor of base and adapter has its place, none is left over"
    claims.add(asked, ", ".join(parts), "all", not gone and not sums.left_over)
    _add_finite(claims, sums.not_finite, sums.tensors)
    found = f"{sums.differing:,} of {sums.values:,} numbers are not"
    found += f", in {_listed(sums.wrong)}" if sums.wrong else ""
    allowed = f"none; of a changed tensor {MOST_DIFFERING:.1%} may be rounded the other way"
    claims.add("every number is the base's plus scale * B @ A", found, allowed, not sums.wrong)


def _check_answers(subject: _Subject, prompts: _Prompts, claims: _Claims, merged: _Merged) -> None:
    pair = merged.pair
    answers = pair.prober.answer(prompts.all, _ANSWER_TOKENS)
    pairs = zip(prompts.all, answers, strict=True)
    spoken = [np.concatenate([prompt, answer]).astype(np.int64) for prompt, answer in pairs]
    places = _ANSWER_TOKENS + 1
    expected = pair.prober.logits(spoken, places)
    del pair.prober
    gc.collect()
    prober = subject.load(ResolvedModel(merged.folder, name=merged.folder.name))
    found, asked = prober.logits(spoken, places), prober.logits(prompts.all, PLACES)
    dtype = _coarser(subject.precision, read_precision(merged.folder) or subject.precision)
    allowed = _allowed(dtype, expected)
    apart = _distance(found, expected)
    claims.add("it says what base + adapter say (logits)", str(apart), f"{allowed} ({dtype})", allowed.holds(apart))
    _add_greedy(claims, "its likeliest tokens are those of base + adapter", (expected, found), allowed.largest)
    noise, moved = _distance(asked, pair.after), _distance(asked, pair.before)
    _add_moved(claims, "the adapter is in it: it differs from the base", moved, noise, "base + adapter")
    live = list(subject.probe.logprobs)
    near = _distance([_log_softmax(each) for each in asked[: len(live)]], live)
    is_judged = not subject.is_quantised or merged.nf4
    limit = f"{allowed} ({dtype})" if is_judged else "stated: the run was trained over NF4, this is over the full base"
    claims.add(
        "it says what the live model said (log-probabilities)", str(near), limit, not is_judged or allowed.holds(near)
    )


# -- adapters from elsewhere -----------------------------------------------------------------------------------------


def claim_merge(resolved: ResolvedModel, merged: Path, artefact: str) -> Certificate:
    """A model merged from adapters that no run of ours trained, held against base and adapters as they lie on disk.

    There is no live model to hold it against: that the adapter is what was trained is nobody's word here.
    """
    started = time.monotonic()
    claims, kind = _Claims(artefact), choose_kind(resolved)
    machine = find_machine(engine=kind)
    load = partial(load_prober, home=luthier_home(), precision=machine.precision, device=machine.device, kind=kind)
    with open_start(resolved, nf4=True, precision=machine.precision, beside=merged.parent) as start:
        _add_sums(claims, check_sums(merged, start))
    prompts = [each for each in read_text_facts(merged, None).chats if len(each)]
    prober = load(replace(resolved, adapters=resolved.adapters[:-1]))
    before = prober.logits(prompts, PLACES)
    left = prober.adapt(resolved.adapters[-1].path)
    claims.add("every tensor of the adapter has its place in the model", _listed(left) or "all", "all", not left)
    after = prober.logits(prompts, PLACES)
    del prober
    gc.collect()
    found = load(ResolvedModel(merged, name=artefact)).logits(prompts, PLACES)
    dtype = _coarser(machine.precision, read_precision(merged) or machine.precision)
    allowed, apart = _allowed(dtype, after), _distance(found, after)
    claims.add("it says what base + adapter say (logits)", str(apart), f"{allowed} ({dtype})", allowed.holds(apart))
    _add_moved(
        claims, "the adapter is in it: it differs from the base", _distance(found, before), apart, "base + adapter"
    )
    facts = _facts(machine, started)
    files = {name.partition("/")[2]: digest for name, digest in hash_files(merged, artefact).items()}
    return Certificate(artefact, tuple(claims.made), files, facts)


def claim_adapter(adapter: Path) -> Certificate:
    """The same of the adapter alone, with what lies beside it: its seal, and the base that its lineage names."""
    started = time.monotonic()
    claims = _Claims(adapter.name)
    if (adapter / MANIFEST).is_file():
        _check_seal(adapter, claims)
    resolved = find_resolved(str(adapter), with_weights=True)
    base = replace(resolved, adapters=resolved.adapters[:-1])
    if recorded := read_lineage(adapter).get("base"):
        _check_base(recorded, base, claims)
    _check_tensors(adapter, claims)
    kind = choose_kind(resolved)
    machine = find_machine(engine=kind)
    with claims.trying("base and adapter load", "without an error"):
        prober = load_prober(base, luthier_home(), precision=machine.precision, device=machine.device, kind=kind)
        prompts = [each for each in read_text_facts(base.folder, None).chats if len(each)] or [_PLAIN_PROMPT]
        before = prober.logits(prompts, PLACES)
        left = prober.adapt(adapter)
        claims.add("every tensor of the adapter has its place in the model", _listed(left) or "all", "all", not left)
        moved = _distance(prober.logits(prompts, PLACES), before)
        _add_moved(claims, "it differs from the base", moved, _Distance(0.0, 0.0), "the base itself")
    return Certificate(adapter.name, tuple(claims.made), hash_files(adapter, adapter.name), _facts(machine, started))


def _facts(machine: Machine, started: float) -> dict[str, Any]:
    return {
        "made": utc_now().isoformat(timespec="seconds"),
        "precision": machine.precision,
        "device": machine.device,
        "seconds": round(time.monotonic() - started, 2),
        "versions": list_versions(),
    }


# -- distances -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Distance:
    """How far apart two sets of logits are."""

    largest: float
    mean: float

    def __str__(self) -> str:
        return f"largest {self.largest:.2g}, mean {self.mean:.2g}"

    def holds(self, found: _Distance) -> bool:
        """Whether another distance is within this one; one that is no number never is."""
        return found.largest <= self.largest and found.mean <= self.mean


def _distance(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> _Distance:
    gaps = [np.abs(one.astype(np.float64) - other) for one, other in zip(found, expected, strict=True)]
    flat = np.concatenate([gap.ravel() for gap in gaps])
    return _Distance(float(flat.max()), float(flat.mean()))


def _allowed(dtype: str, logits: Sequence[Logits]) -> _Distance:
    size = max((float(np.nanmax(np.abs(each), initial=1.0)) for each in logits), default=1.0)
    largest = TOLERANCES[dtype] * max(1.0, size if np.isfinite(size) else 1.0)
    return _Distance(largest, largest / 10)


def _coarser(one: str, other: str) -> str:
    return max(one, other, key=lambda name: TOLERANCES[name])


def _add_greedy(claims: _Claims, asked: str, pair: tuple[list[Any], list[Any]], margin: float) -> None:
    """Likeliest tokens where the first is clearly ahead of the second."""
    clear = same = count = 0
    for expected, found in zip(*pair, strict=True):
        two = np.partition(expected, -2, axis=1)[:, -2:]
        is_clear = two[:, 1] - two[:, 0] > margin
        count += len(expected)
        clear += int(is_clear.sum())
        same += int((is_clear & (expected.argmax(1) == found.argmax(1)) & np.isfinite(found).all(1)).sum())
    left = f"; {count - clear} nearer than {margin:.2g} left out" if clear < count else ""
    claims.add(asked, f"{same} of {clear}{left}", "all that are clear", same == clear)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    top = wide.max(1, keepdims=True)
    found: np.ndarray = wide - top - np.log(np.exp(wide - top).sum(1, keepdims=True))
    return found


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
