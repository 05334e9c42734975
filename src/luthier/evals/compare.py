"""Base and tuned on the same prompts with the same seeds: what each answers, and what can be said of the difference."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from luthier.data.prompts import Prompt, read_prompts
from luthier.data.reasons import list_counts
from luthier.data.source import open_source
from luthier.engines.registry import REMOTE
from luthier.engines.verbs import SampleParams, Tick
from luthier.errors import CallError, DataError, ModelError
from luthier.evals.answers import Remembered, Said, Subject
from luthier.evals.asked import Asked, AskedRows, Reading, Scored, options_for, read_asked, read_plain
from luthier.evals.contamination import Overlap, find_overlap
from luthier.evals.forgetting import MAX_LENGTH, METRIC, find_general, read_general
from luthier.evals.heldout import find_rows, find_template
from luthier.evals.judge import Judge, Pair, judge_pairs
from luthier.evals.metrics import Checks, measure_answers, measure_drift
from luthier.evals.parroting import list_hashes, list_repeats
from luthier.evals.prompts import list_default_prompts
from luthier.evals.scores import BETTER
from luthier.evals.statistics import Floats, Measure, compare_means
from luthier.evals.verdict import describe
from luthier.runs.manifest import write_durably
from luthier.runs.resolve import ADAPTER_CONFIG, ResolvedModel, find_resolved, find_run, resolve_start
from luthier.runs.run import Run
from luthier.spec.data import Data
from luthier.weights.tensors import has_weights

LOSS = "held-out loss"
PAIRS = "chosen over rejected"
JUDGED = "preferred by the judge"
DEFAULT_ROWS = 100


@dataclass(frozen=True)
class Wanted:
    """What is compared, and how."""

    params: SampleParams
    prompts: Path | None = None
    data: str | None = None
    rows: int | None = None
    base: str | None = None
    with_base: bool = True
    chat_template: str | None = None
    general: Path | None = None
    checks: Checks = field(default_factory=Checks)
    judge: Judge | None = None
    on_service: bool = False
    """Whether the service that trained a run answers, although its weights are here."""


@dataclass(frozen=True)
class Compared:
    """What came of it: everything that `comparison.json` holds, and the run whose result was compared."""

    facts: dict[str, Any]
    run: Run | None

    def write(self, path: Path) -> None:
        """Write it, whole or not at all."""
        write_facts(path, self.facts)


@dataclass(frozen=True)
class _Sides:
    """Both models, base first, with what they read; a model that is looked at alone stands on both sides."""

    subjects: tuple[Subject, Subject]
    readings: tuple[Reading, Reading]
    general: tuple[list[Scored], list[Scored]]
    texts: str
    notes: list[str]

    @property
    def is_alone(self) -> bool:
        return self.subjects[0] is self.subjects[1]

    @property
    def asked(self) -> list[Asked]:
        """What waits for an answer, as the tuned model meets it."""
        return [each for each in self.readings[1].asked if each.is_asked]

    @property
    def is_of_one_text(self) -> bool:
        """Whether both count the same tokens, so that their losses can be set side by side."""
        return self.readings[0].text.hash == self.readings[1].text.hash


@dataclass
class _Found:
    """What both models made of it, base first."""

    said: tuple[Said, Said]
    measures: list[Measure]
    scored: list[Asked]
    forgetting: dict[str, Any]
    overlap: Overlap
    repeats: tuple[list[int], list[int]]
    details: dict[str, Any]


def write_facts(path: Path, facts: dict[str, Any]) -> None:
    """Write a comparison, or several, as one JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, orjson.dumps(facts, option=orjson.OPT_INDENT_2) + b"\n")


def list_named(names: Sequence[str]) -> list[str]:
    """Models by their names, and those that a pattern such as `runs/*/final_lora_weights` stands for."""
    found: list[str] = []
    for name in names:
        if glob.has_magic(name) and not Path(name).exists():
            pattern = Path(name).expanduser()
            top = Path(pattern.anchor)
            hits = sorted(str(each) for each in top.glob(str(pattern.relative_to(top))) if each.is_dir())
            if not hits:
                raise ModelError(f"no folder is like {name}", hint="`luthier models` lists what was trained here")
            found += hits
        else:
            found.append(name)
    return list(dict.fromkeys(found))


def compare_model(name: str, wanted: Wanted, home: Path, tick: Tick | None = None) -> Compared:
    """One model beside what it started from, or beside another one, or alone."""
    if wanted.prompts and wanted.data:
        raise CallError("--prompts and --data both say what is asked", hint="keep one of them")
    engine = _find_service(name, wanted)
    tuned = find_resolved(name, with_weights=engine is None)
    run = find_run(tuned)
    subject = Subject(tuned, home, engine)
    find = _find_base if engine is None else _find_base_elsewhere
    other = Subject(find(tuned, wanted), home, engine) if wanted.with_base else subject
    sides = _read(other, subject, run, wanted)
    found = _measure(sides, run, wanted, home, tick)
    return Compared(_list_facts(sides, found, wanted), run)


def _find_service(name: str, wanted: Wanted) -> str | None:
    """The engine whose service answers: where that was asked for, or base or weights are on it alone."""
    light = find_resolved(name)
    run = find_run(light)
    if run is None or run.spec.engine.kind not in REMOTE:
        if wanted.on_service:
            raise CallError(f"{name}: no Tinker service trained it", hint="leave --on-service out")
        return None
    is_here = has_weights(light.folder) and (light.adapters[-1].path / ADAPTER_CONFIG).is_file()
    return None if is_here and not wanted.on_service else run.spec.engine.kind


def _find_base_elsewhere(tuned: ResolvedModel, wanted: Wanted) -> ResolvedModel:
    """The other model under the name that the service knows it by; its text files are here."""
    if wanted.base is not None:
        return find_resolved(wanted.base)
    run = find_run(tuned)
    assert run is not None
    base = find_resolved(run.spec.model.base, run.lineage.get("base", {}).get("revision") or run.spec.model.revision)
    return replace(base, name=run.spec.engine.model or run.spec.model.base)


def _find_base(tuned: ResolvedModel, wanted: Wanted) -> ResolvedModel:
    if wanted.base is not None:
        return find_resolved(wanted.base, with_weights=True)
    if not tuned.adapters and find_run(tuned) is None:
        raise ModelError(
            f"{tuned.name} is a base model: nothing is known that it started from",
            hint="name the other model with --base MODEL, or ask this one alone with --no-compare-base",
        )
    return resolve_start(tuned)


def _read(base: Subject, tuned: Subject, run: Run | None, wanted: Wanted) -> _Sides:
    template = find_template(tuned.resolved, wanted.chat_template)
    with _open_asked(tuned.resolved, run, wanted) as (asked, texts, notes):
        folders = [each.resolved.folder for each in (base, tuned)]
        read = [read_asked(options_for(folder, template, _data_of(run, wanted)), asked) for folder in folders]
    places = {each.place for each in read[0].asked} & {each.place for each in read[1].asked}
    readings = read[0].only(places), read[1].only(places)
    if read[1].left_out:
        counts = list_counts(read[1].left_out)
        notes.append(f"left out, since they cannot be asked: {counts}")
    path = find_general(tuned.resolved, wanted.general)
    paragraphs = read_general(path)
    general = [read_plain(each.text, paragraphs, max_length=MAX_LENGTH) for each in readings]
    if wanted.general and not any(general):
        raise DataError(f"{path}: too short to measure forgetting by", hint="some hundred sentences are enough")
    sides = _Sides((base, tuned), readings, (general[0], general[1]), texts, notes)
    if not sides.is_of_one_text:
        notes.append("the two models have different tokenizers, so their losses are not compared")
    return sides


def _data_of(run: Run | None, wanted: Wanted) -> Data:
    """Tokens count as they were trained; the format is that of the run's own rows, or told row by row."""
    if run is None:
        return Data(train=wanted.data)
    own = run.spec.data
    if wanted.data is None:
        return own
    return Data(train=wanted.data, train_on=own.train_on, max_length=own.max_length)


@contextmanager
def _open_asked(
    tuned: ResolvedModel, run: Run | None, wanted: Wanted
) -> Iterator[tuple[AskedRows | list[Prompt], str, list[str]]]:
    """What is asked, where it comes from, and what there is to say of that."""
    if wanted.prompts:
        yield read_prompts(wanted.prompts)[: wanted.rows], str(wanted.prompts), []
        return
    try:
        named, only = find_rows(tuned, wanted.data)
    except CallError:
        notes = ["the run held no rows out, so the prompts that are shipped were asked"] if run else []
        yield list_default_prompts()[: wanted.rows], "the prompts that are shipped", notes
        return
    with open_source(named) as source:
        told = named if wanted.data else f"rows that {run.id if run else tuned.name} held out"
        yield AskedRows(source, only, wanted.rows or DEFAULT_ROWS), told, []


def _measure(sides: _Sides, run: Run | None, wanted: Wanted, home: Path, tick: Tick | None) -> _Found:
    said, scores, general = _hear(sides, wanted, tick)
    references = [each.reference for each in sides.asked]
    answers = said[0].answers, said[1].answers
    seed = wanted.params.seed
    marks = [each.marks for each in sides.asked]
    measures = measure_answers(references, answers, wanted.checks, marks, seed=seed) if sides.asked else []
    details: dict[str, Any] = {}
    if wanted.judge and sides.asked and not sides.is_alone:
        measures.insert(0, _judge(sides, answers, wanted.judge, home, details, seed=seed, tick=tick))
    every = sides.readings[1].asked
    numbers = [number for number, each in enumerate(every) if each.texts and each.texts[0].tokens]
    scored = [every[number] for number in numbers]
    if scored and sides.is_of_one_text:
        own = [[each[number] for number in numbers] for each in scores]
        measures += _measure_texts(scored, (own[0], own[1]), details, seed=seed)
    forgetting: dict[str, Any] = {}
    if sides.is_of_one_text and (weights := [text.tokens for text in sides.general[1]]):
        losses = [-np.array(each) / weights for each in general]
        difference = compare_means(*losses, weights=weights, is_higher_better=False, is_exponential=True, seed=seed)
        if measures or difference.change == "worse":
            measures.append(Measure(METRIC, losses[0], losses[1], difference))
        forgetting = {"metric": METRIC, "texts": len(weights), "tokens": sum(weights), **difference.as_dict()}
    hashes = list_hashes(answers[0], references) | list_hashes(answers[1], references)
    overlap = find_overlap(run, {each.content for each in every}, {each.asks for each in every}, hashes)
    repeats = [list_repeats(each, references, overlap.answers) for each in answers]
    return _Found(said, measures, scored, forgetting, overlap, (repeats[0], repeats[1]), details)


def _hear(
    sides: _Sides, wanted: Wanted, tick: Tick | None
) -> tuple[tuple[Said, Said], tuple[list[list[float]], list[list[float]]], tuple[list[float], list[float]]]:
    """Answers and likelihoods of each side; one model is in memory at a time."""
    heard: list[tuple[Said, list[list[float]], list[float]]] = []
    for number in (1, 0):
        if number == 0 and sides.is_alone:
            heard.append(heard[0])
            break
        subject, reading = sides.subjects[number], sides.readings[number]
        said = subject.answer(reading, wanted.params, tick)
        texts = [text for each in reading.asked for text in each.texts]
        flat = iter(subject.score(texts) if sides.is_of_one_text else [0.0] * len(texts))
        scores = [[next(flat) for _ in each.texts] for each in reading.asked]
        general = subject.score(sides.general[number]) if sides.is_of_one_text else []
        subject.forget()
        heard.append((said, scores, general))
    (said, scores, general), (first, base_scores, base_general) = heard
    return (first, said), (base_scores, scores), (base_general, general)


def _measure_texts(
    scored: list[Asked],
    scores: tuple[list[list[float]], list[list[float]]],
    details: dict[str, Any],
    *,
    seed: int,
) -> list[Measure]:
    """How likely the rows' own answers are, and of pairs whether the preferred one is the likelier."""
    found = []
    if all(len(each.texts) == 2 for each in scored):
        hits = [np.array([chosen > rejected for chosen, rejected in each], float) for each in scores]
        found.append(Measure(PAIRS, hits[0], hits[1], compare_means(*hits, seed=seed)))
    weights = np.array([each.texts[0].tokens for each in scored], float)
    losses = [-np.array([each[0] for each in own]) / weights for own in scores]
    difference = compare_means(*losses, weights=weights, is_higher_better=False, seed=seed)
    found.append(Measure(LOSS, losses[0], losses[1], difference))
    details["held_out"] = {
        "rows": len(scored),
        "tokens": int(weights.sum()),
        "base_perplexity": float(np.exp(min(difference.base, 700.0))),
        "tuned_perplexity": float(np.exp(min(difference.tuned, 700.0))),
    }
    return found


def _judge(
    sides: _Sides,
    answers: tuple[list[str], list[str]],
    judge: Judge,
    home: Path,
    details: dict[str, Any],
    *,
    seed: int,
    tick: Tick | None,
) -> Measure:
    remembered = Remembered(home, "judge", judge.url, judge.model)
    pairs = [
        Pair(each.messages, base, tuned, each.reference)
        for each, base, tuned in zip(sides.asked, *answers, strict=True)
    ]
    points = judge_pairs(lambda messages: remembered.get(list(messages), lambda: judge.ask(messages)), pairs, tick)
    unclear = sum(each is None for each in points)
    tuned = np.array([0.5 if each is None else each for each in points])
    details["judge"] = {"model": judge.model, "judged": len(pairs), "unclear": unclear}
    if unclear:
        sides.notes.append(f"{unclear:,} of {len(pairs):,} judgements could not be read and count as ties")
    return Measure(JUDGED, 1 - tuned, tuned, compare_means(1 - tuned, tuned, seed=seed))


def _list_facts(sides: _Sides, found: _Found, wanted: Wanted) -> dict[str, Any]:
    """Everything as it is written down: first what seed scripts expect, then what can be said of it."""
    base, tuned = sides.subjects
    metrics = {each.name: each.difference.as_dict() for each in found.measures}
    score, scores = _choose_scores(sides, found)
    answers = found.said[0].answers, found.said[1].answers
    sides.notes.extend(found.overlap.notes)
    facts: dict[str, Any] = {
        "base_model": None if sides.is_alone else base.name,
        "lora_weights": str(_weights_of(tuned.resolved)),
        "model": tuned.name,
        "verdict": describe(metrics, base.name, _count(sides)),
        "metrics": metrics,
        "drift": measure_drift(answers, seed=wanted.params.seed) if sides.asked else {},
        "forgetting": found.forgetting,
        "contamination": _list_overlap(sides, found.overlap),
        "parroting": {"base": len(found.repeats[0]), "tuned": len(found.repeats[1]), "answers": len(sides.asked)},
        **found.details,
        "asked": {
            "from": sides.texts,
            "prompts": len(sides.asked),
            "max_tokens": wanted.params.max_tokens,
            "temperature": wanted.params.temperature,
            "seed": wanted.params.seed,
            "cut": {"base": sum(found.said[0].is_cut), "tuned": sum(found.said[1].is_cut)},
        },
        "score": score,
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "notes": sides.notes,
        "results": _list_results(sides, found, scores),
    }
    return _alone(facts, _count(sides)) if sides.is_alone else facts


def _alone(facts: dict[str, Any], count: str) -> dict[str, Any]:
    """What is left where nothing is compared."""
    measured = {name: entry["tuned"] for name, entry in facts["metrics"].items()}
    if facts["forgetting"]:
        measured[METRIC] = facts["forgetting"]["tuned"]
    for result in facts["results"]:
        for key in ("base_response", "base_score"):
            result.pop(key, None)
    facts["asked"]["cut"].pop("base")
    facts["parroting"].pop("base")
    for key in ("base_model", "drift", "forgetting"):
        del facts[key]
    if "held_out" in facts:
        del facts["held_out"]["base_perplexity"]
    said = f"Looked at alone, on {count}; not compared with its base."
    return {**facts, "metrics": {}, "measured": measured, "verdict": said}


def _count(sides: _Sides) -> str:
    count, noun = (len(sides.asked), "prompt") if sides.asked else (len(sides.readings[1].asked), "text")
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _weights_of(resolved: ResolvedModel) -> Path:
    return resolved.adapters[-1].path if resolved.adapters else resolved.folder


def _choose_scores(sides: _Sides, found: _Found) -> tuple[str | None, tuple[Floats, Floats] | None]:
    """By what answers are ordered: the first metric in which their gains differ, else one in which any two do."""
    found_first: tuple[str, tuple[Floats, Floats]] | None = None
    for each in found.measures:
        is_likelihood = each.name == LOSS and found.scored == sides.asked
        if each.name in (PAIRS, BETTER, METRIC) or (each.name == LOSS and not is_likelihood):
            continue
        if len(each.base) != len(sides.asked) or not np.ptp(np.concatenate([each.base, each.tuned])):
            continue
        sign = 1 if each.difference.is_higher_better else -1
        scores = "likelihood of the reference" if is_likelihood else each.name, (each.base * sign, each.tuned * sign)
        if np.ptp(each.tuned if sides.is_alone else each.tuned - each.base):
            return scores
        found_first = found_first or scores
    return found_first or (None, None)


def _list_results(sides: _Sides, found: _Found, scores: tuple[Floats, Floats] | None) -> list[dict[str, Any]]:
    results = []
    for number, each in enumerate(sides.asked):
        entry: dict[str, Any] = {
            "prompt": each.messages,
            "lora_response": found.said[1].answers[number],
            "base_response": found.said[0].answers[number],
            "reference": each.reference,
            "place": "{}:{}".format(*each.place),
        }
        if scores is not None:
            entry |= {"lora_score": float(scores[1][number]), "base_score": float(scores[0][number])}
        if each.content in found.overlap.contents or each.asks in found.overlap.prompts:
            entry["in_training"] = "row" if each.content in found.overlap.contents else "prompt"
        if number in found.repeats[1]:
            entry["repeats_training"] = True
        results.append(entry)
    return results


def _list_overlap(sides: _Sides, overlap: Overlap) -> dict[str, int]:
    every = sides.readings[1].asked
    return {
        "rows": len(every),
        "training_rows": overlap.rows,
        "same_row": sum(each.content in overlap.contents for each in every),
        "same_prompt": sum(each.asks in overlap.prompts for each in every),
    }
